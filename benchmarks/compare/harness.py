"""Runs contenders in turns, each in its own process and environment, and compares neighbours in time.

Ours and one other take turns (ABBA); each pair gives a ratio, and a comparison is their median with a bootstrap 95%
interval. A contender that dies, returns a wrong byte or has not read what it returned is reported so, and no ratio is
claimed for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from benchmarks import paired
from benchmarks.compare.adaptors import Place
from benchmarks.compare.environments import ROOT
from benchmarks.compare.worker import LAZY_BYTES, LAZY_FRACTION

__all__ = ["Contender", "Failed", "Runner", "Task", "compare", "compare_with_itself", "one", "order"]

RUN_SECONDS = 240.0


class Failed(RuntimeError):
    """A contender died, or its bytes are wrong; the message says which."""


@dataclass(frozen=True)
class Contender:
    """A way of loading: an adaptor's name and the interpreter that has its library."""

    name: str
    python: Path
    place: Place
    server: int | None = None
    """The process id of the server that it loads from, whose CPU time counts beside."""
    module: str = "benchmarks.compare.worker"


@dataclass(frozen=True)
class Task:
    """One region of work."""

    name: str
    bytes: int
    """That one run moves, over all readers."""
    readers: int = 1
    prepare: Callable[[], None] | None = None
    """Before each run: warms or empties the page cache."""


class Runner:
    """One contender's process, which lives through all of its runs."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [str(contender.python), "-m", contender.module, contender.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
        )
        self._tail = ""
        try:
            self._answer(120)
        except Failed:
            self.close()
            raise

    def run(self, task: Task) -> dict[str, Any]:
        asked = {
            "place": dataclasses.asdict(self.contender.place),
            "readers": task.readers,
            "server": self.contender.server,
            "limit": RUN_SECONDS,
        }
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died() from None
        answer = self._answer(RUN_SECONDS + 60)
        if "failure" in answer:
            raise Failed(f"{self.contender.name}: {answer['failure'].strip().splitlines()[-1]}")
        return answer

    def _answer(self, seconds: float) -> dict[str, Any]:
        """The next line; its noise on stderr is read meanwhile, so that it never waits for us."""
        out, err = self._process.stdout, self._process.stderr
        assert out is not None
        assert err is not None
        line = b""
        streams = [out, err]
        while not line.endswith(b"\n"):
            ready = select.select(streams, [], [], seconds)[0]
            if not ready:
                self._process.kill()
                raise Failed(f"{self.contender.name}: no answer for {seconds:g} s")
            if err in ready:
                noise = os.read(err.fileno(), 1 << 16)
                self._tail = (self._tail + noise.decode(errors="replace"))[-2000:]
                if not noise:
                    streams = [out]
            if out in ready:
                block = os.read(out.fileno(), 1 << 16)
                if not block:
                    raise self._died()
                line += block
        found: dict[str, Any] = json.loads(line)
        return found

    def _died(self) -> Failed:
        code = self._process.wait(10)
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stderr is not None
            self._tail += self._process.stderr.read().decode(errors="replace")
        last = self._tail.strip().splitlines()[-1:] or ["it said nothing"]
        return Failed(f"{self.contender.name}: its process ended with {code}: {last[0][:300]}")

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._process.kill()
        self._process.wait()


@dataclass
class _Runs:
    """What one contender did."""

    trials: list[dict[str, Any]] = field(default_factory=list)

    def summary(self, total_bytes: int) -> dict[str, Any]:
        gb = total_bytes / 1e9
        trials = self.trials
        server = [trial["server_cpu_seconds"] for trial in trials]
        return {
            "gb_per_s": paired.quartiles([gb / trial["seconds"] for trial in trials]),
            "seconds": paired.quartiles([trial["seconds"] for trial in trials]),
            "cpu_s_per_gb": paired.quartiles([trial["cpu_seconds"] / gb for trial in trials]),
            "server_cpu_s_per_gb": None if None in server else paired.quartiles([used / gb for used in server]),
            "peak_bytes": max(trial["peak_bytes"] for trial in trials),
            "load_average": paired.quartiles([trial["load_average"] for trial in trials]),
            "all_seconds": [round(trial["seconds"], 4) for trial in trials],
        }


def _checked(answer: dict[str, Any], contender: Contender, task: Task) -> dict[str, Any]:
    if answer["wrong"]:
        raise Failed(f"{contender.name}: WRONG BYTES: {answer['wrong']}")
    each = task.bytes / task.readers
    if answer["late_bytes"] > LAZY_BYTES + LAZY_FRACTION * each:
        late = answer["late_bytes"] / each
        raise Failed(
            f"{contender.name}: only maps: {min(late, 1):.0%} of its bytes were read by whoever looked at them"
        )
    return answer


def order(pairs: int) -> Iterator[tuple[int, int]]:
    """Who goes first: 0 1, 1 0, 0 1 and so on, so that a drift of the machine favours nobody."""
    for number in range(pairs):
        yield (0, 1) if number % 2 == 0 else (1, 0)


def compare(
    ours: Contender,
    others: Sequence[Contender],
    task: Task,
    pairs: int,
    seconds: float = math.inf,
    keep: Callable[[dict[str, Any]], None] = lambda so_far: None,
) -> dict[str, Any]:
    """Measure `ours` against each of `others`; ratios above 1 mean that `ours` is faster.

    After `seconds` for one of them no more pairs are begun, and the result says how many there were. `keep` gets what
    there is after each of them, for a run that is cut short.
    """
    results: dict[str, Any] = {}
    whole = {"task": task.name, "bytes": task.bytes, "readers": task.readers, "ours": ours.name, "against": results}
    with contextlib.closing(Runner(ours)) as own:
        one(own, task)  # everything is in place, and its bytes are right, before time counts
        for other in others:
            results[other.name] = _against(own, other, task, pairs, seconds)
            keep(whole)
    return whole


def one(runner: Runner, task: Task) -> dict[str, Any]:
    """One run, checked. Raises Failed."""
    if task.prepare is not None:
        task.prepare()
    paired.back_memory(int(task.bytes * paired.MEMORY_FACTOR))
    load_average = os.getloadavg()[0]
    answer = _checked(runner.run(task), runner.contender, task)
    return {**answer, "load_average": load_average}


def _against(own: Runner, other: Contender, task: Task, pairs: int, seconds: float) -> dict[str, Any]:
    try:
        with contextlib.closing(Runner(other)) as theirs:
            one(theirs, task)
            found = _take_turns((own, theirs), (task, task), pairs, seconds, other.name)
    except Failed as failure:
        if str(failure).startswith(f"{own.contender.name}:"):
            raise
        paired.say(str(failure))
        return {"failed": str(failure), "pairs": 0}
    return _ratio(found, (task, task), "theirs")


def compare_with_itself(
    ours: tuple[Contender, Task], fewer: tuple[Contender, Task], pairs: int, seconds: float = math.inf
) -> dict[str, Any]:
    """The speed of ours at one task by its speed at another with less to do; 1 means that more of it costs nothing."""
    tasks = (ours[1], fewer[1])
    with contextlib.closing(Runner(ours[0])) as whole, contextlib.closing(Runner(fewer[0])) as less:
        for runner, task in zip((whole, less), tasks, strict=True):
            one(runner, task)  # untimed, as in every comparison
        return _ratio(_take_turns((whole, less), tasks, pairs, seconds, fewer[1].name), tasks, "compared")


def _take_turns(
    runners: tuple[Runner, Runner], tasks: tuple[Task, Task], pairs: int, seconds: float, other: str
) -> tuple[_Runs, _Runs]:
    runs = (_Runs(), _Runs())
    end = time.monotonic() + seconds
    for first, second in order(pairs):
        if runs[0].trials and time.monotonic() > end:
            break
        for which in (first, second):
            runs[which].trials.append(one(runners[which], tasks[which]))
        pair = [found.trials[-1]["seconds"] / task.bytes for found, task in zip(runs, tasks, strict=True)]
        paired.say(f"{tasks[0].name}: {other} {len(runs[0].trials)}/{pairs}: {pair[1] / pair[0]:.3f}")
    return runs


def _ratio(runs: tuple[_Runs, _Runs], tasks: tuple[Task, Task], other: str) -> dict[str, Any]:
    """Our speed by the other's of each pair, and what both needed for it."""
    speeds = [
        [task.bytes / trial["seconds"] for trial in found.trials] for found, task in zip(runs, tasks, strict=True)
    ]
    ratios = [ours / theirs for ours, theirs in zip(*speeds, strict=True)]
    low, high = paired.bootstrap_interval(ratios)
    return {
        "median_ratio": round(float(numpy.median(ratios)), 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "pairs": len(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "ours": runs[0].summary(tasks[0].bytes),
        other: runs[1].summary(tasks[1].bytes),
    }

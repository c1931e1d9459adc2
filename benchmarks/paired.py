"""Measures ways of doing one thing in turns, each run in its own process, and compares pairs.

A way is a function that returns what it loaded; only its call is timed, in a child forked from a
parent that has imported what it needs but loaded nothing. Memory is therefore fresh in every run,
as it is when a server starts. Machines are noisy, so that only neighbours in time are compared:
each pair gives one ratio, in ABBA order, and the result is the median ratio with a bootstrap
interval.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import mmap
import os
import pkgutil
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy

from benchmarks import machine

__all__ = [
    "back_memory",
    "Measured",
    "Series",
    "Trial",
    "TrialFailed",
    "Way",
    "add_arguments",
    "bootstrap_interval",
    "compare",
    "congestion",
    "import_everything",
    "in_child",
    "measure",
    "peak_bytes",
    "quartiles",
    "report",
    "say",
    "table",
]

TRIAL_SECONDS = 600.0
RESAMPLES = 10_000
MEMORY_FACTOR = 2.5  # a loader that copies has its result and one more copy of it at once


class TrialFailed(RuntimeError):
    """A run raised, died or took too long; the message has its traceback."""


@dataclass(frozen=True)
class Measured:
    """What a way returns when it measures itself, as another program does."""

    seconds: float
    cpu_seconds: float
    server_cpu_seconds: float | None = None  # of a server of its own


@dataclass(frozen=True)
class Way:
    """One way of loading. `run` is timed and returns what it loaded, or `Measured`.

    `prepare` runs before each run, untimed, in the parent. `check` gets what `run` returned, once,
    untimed, before any measuring; it raises when a byte is wrong. `server_pid` is a process whose
    CPU time is counted beside.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], None] | None = None
    check: Callable[[object], None] | None = None
    server_pid: Callable[[], int] | None = None


@dataclass(frozen=True)
class Trial:
    """One run of one way. CPU seconds are user and system together."""

    seconds: float
    cpu_seconds: float
    server_cpu_seconds: float | None
    peak_bytes: int
    load_average: float


@dataclass
class Series:
    """All runs of one way."""

    trials: list[Trial] = field(default_factory=list)

    def summary(self, total_bytes: int) -> dict[str, object]:
        gb = total_bytes / 1e9
        speeds = [gb / trial.seconds for trial in self.trials]
        server = [trial.server_cpu_seconds for trial in self.trials]
        return {
            "gb_per_s": quartiles(speeds),
            "seconds": quartiles([trial.seconds for trial in self.trials]),
            "cpu_s_per_gb": quartiles([trial.cpu_seconds / gb for trial in self.trials]),
            "server_cpu_s_per_gb": None
            if None in server
            else quartiles([cast(float, seconds) / gb for seconds in server]),
            "peak_bytes": max(trial.peak_bytes for trial in self.trials),
            "load_average": quartiles([trial.load_average for trial in self.trials]),
            "all_gb_per_s": [round(speed, 4) for speed in speeds],
        }


def quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = numpy.percentile(values, [25, 50, 75])
    return {
        "median": round(float(middle), 4),
        "q1": round(float(low), 4),
        "q3": round(float(high), 4),
    }


def bootstrap_interval(ratios: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the median of `ratios`, by resampling; a function of `ratios` alone."""
    generator = numpy.random.default_rng(0)
    values = numpy.asarray(ratios)
    samples = numpy.median(generator.choice(values, (RESAMPLES, len(values))), axis=1)
    low, high = numpy.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def in_child(work: Callable[[], Mapping[str, object]], limit: float = TRIAL_SECONDS) -> dict[str, object]:
    """Run `work` in a forked child and return its (JSON) answer."""
    gc.collect()
    # What the parent freed would be copied, not zeroed, when the child touches it: give it back
    # before.
    ctypes.CDLL(None).malloc_trim(0)
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            try:
                answer: dict[str, object] = {"answer": dict(work())}
                status = 0
            except BaseException:
                answer = {"failure": traceback.format_exc()}
            with open(writer, "w") as pipe:
                json.dump(answer, pipe)
        finally:
            os._exit(status)  # no cleaning up of what belongs to the parent
    os.close(writer)
    received = b""
    deadline = time.monotonic() + limit
    try:
        while True:
            ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
            block = os.read(reader, 1 << 16) if ready else b""
            received += block
            if not block:
                break
    finally:
        os.close(reader)
        late = time.monotonic() >= deadline
        with contextlib.suppress(ProcessLookupError):
            if late:
                os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if late:
        raise TrialFailed(f"a run took more than {limit:g} seconds")
    if not received:
        raise TrialFailed(f"a run died with exit code {code}")
    answer = json.loads(received)
    if "failure" in answer:
        raise TrialFailed(str(answer["failure"]))
    return cast("dict[str, object]", answer["answer"])


def import_everything() -> None:
    """Import what a load may import lazily, so that no run pays for it in time or memory."""
    import redis  # noqa: F401
    import torch

    import rdmaload

    torch.zeros(1).clone()
    for name in rdmaload.__all__:
        getattr(rdmaload, name)
    for found in pkgutil.walk_packages(rdmaload.__path__, "rdmaload."):
        if found.name.split(".")[1] not in ("__main__", "cli", "integrations"):
            importlib.import_module(found.name)


def _own_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_bytes() -> int:
    """The most memory that this process has had resident (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def back_memory(nbytes: int) -> None:
    """Touch and free `nbytes` in a child, so that a hypervisor has them backed for the run that follows.

    Hypervisors take free memory back within seconds (free page reporting) and charge whoever touches it next: here
    0.5 to 2 s of CPU per GB, more than any loader itself takes. Without this a run measures how long ago the memory it
    gets was used by somebody else.
    """
    pid = os.fork()
    if pid == 0:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, nbytes, mmap.PAGESIZE):
            memory[at] = 1
        os._exit(0)
    os.waitpid(pid, 0)


def measure(way: Way, memory_bytes: int = 0) -> Trial:
    """One run of `way` in a child of its own, with `memory_bytes` backed by the hypervisor."""
    if way.prepare is not None:
        way.prepare()
    if memory_bytes:
        back_memory(memory_bytes)
    load = os.getloadavg()[0]

    def work() -> dict[str, object]:
        server = None if way.server_pid is None else way.server_pid()
        server_before = 0.0 if server is None else machine.cpu_seconds(server)
        cpu_before = _own_cpu_seconds()
        start = time.perf_counter()
        result = way.run()
        seconds = time.perf_counter() - start
        cpu = _own_cpu_seconds() - cpu_before
        server_cpu = None if server is None else machine.cpu_seconds(server) - server_before
        if isinstance(result, Measured):
            seconds, cpu = result.seconds, result.cpu_seconds
            server_cpu = result.server_cpu_seconds if server is None else server_cpu
        return {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "server_cpu_seconds": server_cpu,
            "peak_bytes": peak_bytes(),
            "load_average": load,
        }

    return Trial(**in_child(work))  # type: ignore[arg-type]


def check(way: Way) -> None:
    """Run `way` once, untimed, and compare what it loaded."""
    if way.check is None:
        return
    if way.prepare is not None:
        way.prepare()
    compare_result = way.check

    def work() -> dict[str, object]:
        compare_result(way.run())
        return {}

    in_child(work)


def compare(
    ours: Way, others: Sequence[Way], total_bytes: int, pairs: int, *, cold_memory: bool = False
) -> dict[str, object]:
    """Measure `ours` against each of `others`; ratios above 1 mean that `ours` is faster."""
    memory_bytes = 0 if cold_memory else int(total_bytes * MEMORY_FACTOR)
    for way in (ours, *others):
        check(way)
    comparisons: dict[str, dict[str, Any]] = {}
    for other in others:
        series = {ours.name: Series(), other.name: Series()}
        for number in range(pairs):
            for way in (ours, other) if number % 2 == 0 else (other, ours):
                series[way.name].trials.append(measure(way, memory_bytes))
            pair = [found.trials[-1].seconds for found in series.values()]
            say(f"{ours.name} / {other.name} {number + 1}/{pairs}: {pair[1] / pair[0]:.3f}")
        ratios = [
            theirs.seconds / own.seconds
            for own, theirs in zip(series[ours.name].trials, series[other.name].trials, strict=True)
        ]
        low, high = bootstrap_interval(ratios)
        comparisons[other.name] = {
            "median_ratio": round(float(numpy.median(ratios)), 4),
            "interval_95": [round(low, 4), round(high, 4)],
            "pairs": pairs,
            "ratios": [round(ratio, 4) for ratio in ratios],
            "ways": {name: found.summary(total_bytes) for name, found in series.items()},
        }
    return {"bytes": total_bytes, "ours": ours.name, "against": comparisons}


def say(text: str) -> None:
    """Progress and tables, which go to stderr so that stdout is JSON."""
    print(text, file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser, *, total_bytes: float = 1e9, pairs: int = 15) -> None:
    """The options that every paired benchmark has."""
    parser.add_argument("--bytes", type=float, default=total_bytes, help="size of the model")
    parser.add_argument("--pairs", type=int, default=pairs, help="runs of each way")
    parser.add_argument("--json", type=Path, help="write the result here, not to stdout")
    parser.add_argument("--dir", type=Path, help="directory for temporary files")
    parser.add_argument("--cold-memory", action="store_true", help="do not have the hypervisor back memory first")
    parser.add_argument("--congestion-control", help="set for the run, when permitted, then restored")


@contextlib.contextmanager
def congestion(arguments: argparse.Namespace) -> Iterator[None]:
    """Apply --congestion-control, or stop the program when that is not permitted."""
    with machine.server_congestion_control(arguments.congestion_control) as in_force:
        if not in_force:
            raise SystemExit(f"cannot set congestion control {arguments.congestion_control}")
        yield


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows as aligned text, the first row being the heading."""
    texts = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in texts
    )


def report(name: str, result: Mapping[str, object], target: Path | None) -> None:
    """Write the result with the machine's facts as JSON, and its comparisons as a table."""
    whole = {"benchmark": name, "machine": machine.facts(), **result}
    text = json.dumps(whole, indent=1) + "\n"
    if target is None:
        sys.stdout.write(text)
    else:
        target.write_text(text)
    heading = ["ours", "against", "ratio", "95%", "GB/s", "theirs", "CPU s/GB", "theirs"]
    rows: list[list[object]] = [list(heading)]
    for part in result.values():
        if not isinstance(part, dict) or "against" not in part:
            continue
        for other, found in part["against"].items():
            ways = [found["ways"][name] for name in (part["ours"], other)]
            rows.append(
                [
                    part["ours"],
                    other,
                    found["median_ratio"],
                    "{} to {}".format(*found["interval_95"]),
                    *(way["gb_per_s"]["median"] for way in ways),
                    *(way["cpu_s_per_gb"]["median"] for way in ways),
                ]
            )
    if len(rows) > 1:
        say(table(rows))

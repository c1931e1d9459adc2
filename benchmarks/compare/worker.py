"""A contender's process: imports its library once, then forks a child for each run. JSON lines in and out.

Run by harness.py in the contender's environment: `python -m benchmarks.compare.worker NAME`. A run is timed in a child
that has imported everything (also what the first run, which is untimed, had to import) and loaded nothing; then every
byte is compared with the files, and pages that only this comparison brought in are counted: a contender that has not
read what it returned is found out. What was saved is read back first.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import json
import mmap
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy

from benchmarks import checkpoints, machine, paired
from benchmarks.compare.adaptors import ADAPTORS, Adaptor, Place

__all__ = ["LAZY_BYTES", "LAZY_FRACTION", "main", "measured", "touched_late"]

LAZY_FRACTION = 0.02
LAZY_BYTES = 16 << 20
"""More than both together brought in by whoever looks at the tensors means that they were not read."""

_PR_SET_PDEATHSIG = 1


def _cpu_seconds(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def _server_seconds(pid: int | None) -> float:
    """CPU seconds of a server and of the processes that it made, as nginx does its work in them."""
    if pid is None:
        return 0.0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return machine.cpu_seconds(pid) + sum(machine.cpu_seconds(int(child)) for child in children)


def touched_late(state: Mapping[str, Any]) -> int:
    """Bytes that were not resident until this function read one byte of each page."""
    before = _resident_bytes()
    for tensor in state.values():
        if tensor.numel():
            numpy.ctypeslib.as_array(_pointer(tensor), (tensor.nbytes,))[:: mmap.PAGESIZE].sum()
    return max(0, _resident_bytes() - before)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _pointer(tensor: Any) -> Any:
    return ctypes.cast(tensor.data_ptr(), ctypes.POINTER(ctypes.c_uint8))


def _looked_at(state: Mapping[str, Any], adaptor: Adaptor, place: Place) -> dict[str, Any]:
    """What became of the bytes: how many had not been read, and the first that is wrong. Of a save, what it saved."""
    if adaptor.saved is None:
        answer: dict[str, Any] = {"late_bytes": touched_late(state), "wrong": None}
    else:
        state = adaptor.saved(place)
        answer = {"late_bytes": 0, "wrong": None}
    try:
        checkpoints.compare(state, place.directory)
    except checkpoints.Mismatch as mismatch:
        answer["wrong"] = str(mismatch)
    return answer


def measured(adaptor: Adaptor, place: Place, server: int | None) -> dict[str, Any]:
    """One timed run, and what became of the bytes."""
    load = adaptor.ready(place)
    modules = set(sys.modules)
    server_before = _server_seconds(server)
    cpu, start = _cpu_seconds(resource.RUSAGE_SELF), time.perf_counter()
    state = load()
    seconds = time.perf_counter() - start
    answer: dict[str, Any] = {
        "seconds": seconds,
        "cpu_seconds": _cpu_seconds(resource.RUSAGE_SELF) - cpu,
        "server_cpu_seconds": None if server is None else _server_seconds(server) - server_before,
        "peak_bytes": paired.peak_bytes(),
        "imported": [name for name in sys.modules if name not in modules],
    }
    return {**answer, **_looked_at(state, adaptor, place)}


def _reader(adaptor: Adaptor, place: Place, start: int, loaded: int, pipe: IO[str]) -> None:
    """One of several readers: loads when `start` opens; compares when `loaded` does, after the last has loaded."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a run that failed or hangs leaves nobody behind
    load = adaptor.ready(place)
    os.read(start, 1)  # ends when the last writer closes it
    cpu = _cpu_seconds(resource.RUSAGE_SELF)
    modules = set(sys.modules)
    state = load()
    done = time.perf_counter()
    cpu = _cpu_seconds(resource.RUSAGE_SELF) - cpu
    imported = [name for name in sys.modules if name not in modules]
    answer = {"done": done, "cpu": cpu, "peak": paired.peak_bytes(), "imported": imported}
    print(json.dumps(answer), file=pipe, flush=True)
    os.read(loaded, 1)
    print(json.dumps(_looked_at(state, adaptor, place)), file=pipe, flush=True)


def _answers(pipes: Sequence[IO[str]]) -> list[dict[str, Any]]:
    """A line of every reader."""
    found = [json.loads(pipe.readline() or "{}") for pipe in pipes]
    if not all(found):
        raise paired.TrialFailed(f"{sum(not one for one in found)} of {len(found)} readers died")
    return found


def _together(count: int, adaptor: Adaptor, place: Place, server: int | None) -> dict[str, Any]:
    """`count` processes that begin at once; the time until the last has all of its tensors, which each compares."""
    start, opens_start = os.pipe()
    loaded, opens_loaded = os.pipe()

    def fork() -> int:
        reader, writer = os.pipe()
        if os.fork() == 0:
            status = 1
            try:
                os.close(opens_start)
                os.close(opens_loaded)
                with open(writer, "w") as pipe:
                    _reader(adaptor, place, start, loaded, pipe)
                status = 0
            finally:
                if status:
                    traceback.print_exc()
                os._exit(status)
        os.close(writer)
        return reader

    with contextlib.ExitStack() as stack:
        pipes = [stack.enter_context(open(fork())) for _ in range(count)]
        server_before = _server_seconds(server)
        time.sleep(0.2)  # all of them stand at the gate
        begin = time.perf_counter()
        os.close(opens_start)
        found = _answers(pipes)
        server_after = _server_seconds(server)
        os.close(opens_loaded)  # nobody loads any more
        looked = _answers(pipes)
    wrong = [f"reader {number}: {one['wrong']}" for number, one in enumerate(looked, 1) if one["wrong"]]
    return {
        "seconds": max(one["done"] for one in found) - begin,
        "cpu_seconds": sum(one["cpu"] for one in found),
        "server_cpu_seconds": None if server is None else server_after - server_before,
        "peak_bytes": sum(one["peak"] for one in found),
        "imported": found[0]["imported"],
        "late_bytes": max(one["late_bytes"] for one in looked),
        "wrong": wrong[0] if wrong else None,
    }


def main() -> None:
    adaptor = ADAPTORS[sys.argv[1]]
    for name in adaptor.imports:
        importlib.import_module(name)
    if "rdmaload" in adaptor.imports:
        paired.import_everything()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        place = Place(**asked["place"])
        try:
            if asked["readers"] > 1:
                work = functools.partial(_together, asked["readers"], adaptor, place, asked["server"])
            else:
                work = functools.partial(measured, adaptor, place, asked["server"])
            answer = paired.in_child(work, asked["limit"])
            for name in cast("list[str]", answer.pop("imported")):  # it is there, untimed, when time counts
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        except paired.TrialFailed as failure:
            answer = {"failure": str(failure)[-2000:]}
        print(json.dumps(answer), file=out, flush=True)
    os._exit(0)  # taking torch down takes half a second, of which the next run would have a part


if __name__ == "__main__":
    main()

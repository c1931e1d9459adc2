"""A contender's process: imports its library once, then forks a child for each run. JSON lines in and out.

Run by harness.py in the contender's environment: `python -m benchmarks.compare.worker NAME`. A run is timed in a child
that has imported everything and loaded nothing; then every byte is compared with the files, and pages that only this
comparison brought in are counted: a contender that has not read what it returned is found out.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import mmap
import os
import resource
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy

from benchmarks import checkpoints, machine, paired
from benchmarks.compare.adaptors import ADAPTORS, Adaptor, Place

__all__ = ["LAZY_BYTES", "LAZY_FRACTION", "main", "measured", "touched_late"]

LAZY_FRACTION = 0.02
LAZY_BYTES = 16 << 20
"""More than both together brought in by whoever looks at the tensors means that they were not read."""


def _cpu_seconds(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


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


def measured(adaptor: Adaptor, place: Place, directory: Path | None, server: int | None) -> dict[str, Any]:
    """One timed run, and what became of the bytes. Without a directory there is nothing to compare."""
    load = adaptor.ready(place)
    server_before = 0.0 if server is None else machine.cpu_seconds(server)
    cpu, start = _cpu_seconds(resource.RUSAGE_SELF), time.perf_counter()
    state = load()
    seconds = time.perf_counter() - start
    answer: dict[str, Any] = {
        "seconds": seconds,
        "cpu_seconds": _cpu_seconds(resource.RUSAGE_SELF) - cpu,
        "server_cpu_seconds": None if server is None else machine.cpu_seconds(server) - server_before,
        "peak_bytes": paired.peak_bytes(),
        "late_bytes": 0,
        "wrong": None,
    }
    if directory is not None:
        answer["late_bytes"] = touched_late(state)
        try:
            checkpoints.compare(state, directory)
        except checkpoints.Mismatch as mismatch:
            answer["wrong"] = str(mismatch)
    return answer


def _together(count: int, adaptor: Adaptor, place: Place, server: int | None) -> dict[str, Any]:
    """`count` processes that begin at once; the time until the last has all of its tensors."""
    gate, opened = os.pipe()
    answers = []
    for _ in range(count):
        reader, writer = os.pipe()
        if os.fork() == 0:
            status = 1
            try:
                os.close(opened)
                os.close(reader)
                load = adaptor.ready(place)
                os.read(gate, 1)  # ends when the last writer closes it
                cpu = _cpu_seconds(resource.RUSAGE_SELF)
                state = load()
                done = time.perf_counter()
                cpu = _cpu_seconds(resource.RUSAGE_SELF) - cpu
                answer = {"done": done, "cpu": cpu, "peak": paired.peak_bytes(), "late": touched_late(state)}
                os.write(writer, json.dumps(answer).encode())
                status = 0
            finally:
                if status:
                    traceback.print_exc()
                os._exit(status)
        os.close(writer)
        answers.append(reader)
    server_before = 0.0 if server is None else machine.cpu_seconds(server)
    time.sleep(0.2)  # all of them stand at the gate
    start = time.perf_counter()
    os.close(gate)
    os.close(opened)
    found = []
    for reader in answers:
        with open(reader) as pipe:
            found.append(json.loads(pipe.read() or "{}"))
    for _ in range(count):
        os.wait()
    if not all(found):
        raise paired.TrialFailed(f"{sum(not one for one in found)} of {count} readers died")
    return {
        "seconds": max(one["done"] for one in found) - start,
        "cpu_seconds": sum(one["cpu"] for one in found),
        "server_cpu_seconds": None if server is None else machine.cpu_seconds(server) - server_before,
        "peak_bytes": sum(one["peak"] for one in found),
        "late_bytes": max(one["late"] for one in found),
        "wrong": None,  # of readers at once no bytes are compared: other regions do that
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
        directory = Path(place.directory) if asked["compare"] else None
        try:
            if asked["readers"] > 1:
                work = functools.partial(_together, asked["readers"], adaptor, place, asked["server"])
            else:
                work = functools.partial(measured, adaptor, place, directory, asked["server"])
            answer = paired.in_child(work, asked["limit"])
        except paired.TrialFailed as failure:
            answer = {"failure": str(failure)[-2000:]}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()

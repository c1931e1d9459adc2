"""Loads into GPU memory against what bounds them: the source's own speed, and page-locked copies to the device.

For each source: its limit (the same load into host memory), ours into the device, and where they apply
`safetensors.torch.load_file(device=...)` and `load` + `.to(device)`. The share is ours / min(source limit, copy limit);
goal 0.95. A timeline of one load shows receiving and copying at the same time. One process, runs in turns, every byte
compared once before anything is timed. Runs unattended; it stops starting new rounds after `--seconds`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import rdmaload
from benchmarks import checkpoints, machine, paired
from rdmaload import devices
from rdmaload.model import Model

GOAL = 0.95
Trace = Sequence[tuple[float, float, float, int]]


def copy_limit(device: torch.device, nbytes: int = 256 << 20, rounds: int = 8) -> float:
    """GB/s of page-locked host memory to the device: the best of several rounds of four copies each."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    best = 0.0
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(4):
            target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        best = max(best, 4 * nbytes / (begin.elapsed_time(end) / 1e3) / 1e9)
    return best


def timed(work: Callable[[], object]) -> float:
    """Seconds of one run; what it returns is dropped outside of them."""
    gc.collect()
    begin = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    del result
    return seconds


def in_turns(ways: dict[str, Callable[[], object]], nbytes: int, rounds: int, until: float) -> dict[str, Any]:
    """Median and all GB/s of each way; each round runs all of them, every second one backwards."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        if number > 0 and time.monotonic() > until:
            break
        for name in list(ways)[:: -1 if number % 2 else 1]:
            rates[name].append(nbytes / timed(ways[name]) / 1e9)
    return {name: {"gb_per_s": statistics.median(runs), "runs": runs} for name, runs in rates.items()}


def timeline(url: str | Path, device: torch.device, **options: Any) -> dict[str, Any]:
    """One load with the times of every read: begun, received, copied; and how much of it overlapped."""
    with rdmaload.open(url, **options) as model:
        trace = traced_load(model, device.index or 0)
    received = [(begun, arrived) for begun, arrived, _, _ in trace]
    copied = [(arrived, done) for _, arrived, done, _ in trace]
    receiving, copying = union(received), union(copied)
    both = receiving + copying - union([*received, *copied])
    return {
        "reads": len(trace),
        "receiving_seconds": receiving,
        "copying_seconds": copying,
        "overlap_seconds": both,
        "overlapped_share_of_copying": both / copying if copying else 0.0,
        "events": [list(entry) for entry in sorted(trace)[:2000]],
    }


def traced_load(model: Model, ordinal: int) -> Trace:
    reader = model._reader
    weights = model._weights_of(None)
    selection, _ = weights.select(None, None)
    total = sum(weights.specs[position].nbytes for position in selection)
    road = devices.DeviceRoad(
        reader.transport(),
        ordinal,
        model._connector.options,
        read_bytes=reader.read_bytes,
        expected_bytes=total,
        trace=True,
    )
    plan = reader.plan(weights.native, selection, into_tensors=True)
    tensors = [road.empty(weights.specs[position]) for position in selection]
    batch = reader.start(plan, road.destinations(tensors), road=road, tensors=tensors)
    reader.finish(batch, rdmaload.LoadStats())
    road.hand_out(tensors)
    return road.transport.trace()


def union(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds that at least one of the spans covers."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


@contextlib.contextmanager
def sources(directory: Path, redis: bool) -> Iterator[dict[str, str]]:
    """Urls of the same checkpoint by kind of source."""
    urls = {"file": str(directory), "memory": "memory://benchmark/device"}
    rdmaload.save(directory, urls["memory"])
    with contextlib.ExitStack() as stack:
        if redis and shutil.which("redis-server"):
            from tests.support.servers import RedisServer

            server = stack.enter_context(RedisServer())
            urls["redis"] = server.url("device")
            rdmaload.save(directory, urls["redis"])
        yield urls


def compare(
    url: str, directory: Path, nbytes: int, device: torch.device, limit: float | None, rounds: int, until: float
) -> dict[str, Any]:
    """One source: its limit, ours and the others."""
    ways: dict[str, Callable[[], object]] = {
        "source": lambda: rdmaload.load(url),
        "rdmaload": lambda: rdmaload.load(url, device=device),
    }
    if limit is not None:  # a real device
        ways["load, then to"] = lambda: {name: t.to(device) for name, t in rdmaload.load(url).items()}
        if url == str(directory):
            from safetensors.torch import load_file

            ways["safetensors"] = lambda: [
                load_file(path, device=str(device)) for path in checkpoints.weight_files(directory)
            ]
    for way in ways.values():
        way()  # pages, connections, kernels and the allocator are warm
    result = in_turns(ways, nbytes, rounds, until)
    bound = min(result["source"]["gb_per_s"], limit or float("inf"))
    result["share_of_limit"] = result["rdmaload"]["gb_per_s"] / bound
    result["reaches_goal"] = result["share_of_limit"] >= GOAL
    result["timeline"] = timeline(url, device)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=float, default=4e9)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=300, help="start no new round after so long")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dir", help="where the checkpoint is made")
    parser.add_argument("--output", "--json", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    device = devices.checked_device(arguments.device)
    begin = time.monotonic()
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__}
    result["copy_limit_gb_per_s"] = limit = copy_limit(device)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        checkpoint = checkpoints.llama_like(Path(name) / "model", arguments.bytes)
        loaded = {key: tensor.cpu() for key, tensor in rdmaload.load(checkpoint.directory, device=device).items()}
        assert checkpoints.compare(loaded, checkpoint.directory) == checkpoint.bytes
        del loaded
        with sources(checkpoint.directory, True) as urls:
            for number, (kind, url) in enumerate(urls.items(), start=1):
                machine.warm_page_cache(checkpoint.directory)
                until = begin + arguments.seconds * number / len(urls)
                result[kind] = compare(
                    url, checkpoint.directory, checkpoint.bytes, device, limit, arguments.rounds, until
                )
    result["seconds"] = time.monotonic() - begin
    paired.report("device", result, arguments.output)


if __name__ == "__main__":
    main()

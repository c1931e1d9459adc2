"""Loads into GPU memory against what bounds them: the source's own speed, and page-locked copies to the device.

Sources: a directory (in the page cache, and evicted from it), our weight server inside this process over loopback,
Redis (where there is a redis-server), and a store written in Python. For each: its limit (the same load into host
memory), ours into the device, and where they apply `load` + `.to(device)`, `safetensors.torch.load_file(device=...)`
and other loaders that are installed. The share is ours / min(source limit, copy limit); goal 0.95. A timeline of one
load shows receiving and copying at the same time. Then what was never measured: how many page-locked bytes, in pieces
of what size, and what page-locking costs. One process, runs in turns, every byte compared once before anything is
timed. Runs unattended; after `--seconds` it starts no new round, and with `--json` the result is written after each
part.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import rdmaload
from benchmarks import checkpoints, machine, paired
from rdmaload import _core, devices, reader
from rdmaload.model import Model
from rdmaload.tensors import torch_dtype

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


def in_turns(
    ways: dict[str, Callable[[], object]],
    nbytes: int,
    rounds: int,
    until: float,
    prepare: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Median and all GB/s of each way; each round runs all of them, every second one backwards."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        if number > 0 and time.monotonic() > until:
            break
        for name in list(ways)[:: -1 if number % 2 else 1]:
            prepare()
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
    return road.staged.trace()


def union(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds that at least one of the spans covers."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


@contextlib.contextmanager
def weight_server(limit_bytes: int) -> Iterator[str]:
    """The url of a model on a server that runs in this process, its threads beside the loader's."""
    server = _core.WeightServer(_core.WeightStore(limit_bytes), threads=2)
    try:
        yield f"redis://127.0.0.1:{server.port}/device"
    finally:
        server.close()


@contextlib.contextmanager
def sources(directory: Path, redis: bool) -> Iterator[dict[str, str]]:
    """Urls of the same checkpoint by kind of source."""
    nbytes = sum(path.stat().st_size for path in directory.iterdir())
    with contextlib.ExitStack() as stack:
        urls = {"file": str(directory), "server": stack.enter_context(weight_server(2 * nbytes + (64 << 20)))}
        if redis and shutil.which("redis-server"):
            from tests.support.servers import RedisServer

            urls["redis"] = stack.enter_context(RedisServer()).url("device")
        urls["python"] = "memory://benchmark/device"
        for kind, url in urls.items():
            if kind != "file":
                rdmaload.save(directory, url)
        yield urls


def other_loaders(directory: Path, device: torch.device) -> dict[str, Callable[[], object]]:
    """What else is installed here and reads a directory into a GPU's memory."""
    from safetensors.torch import load_file

    files = checkpoints.weight_files(directory)
    ways: dict[str, Callable[[], object]] = {
        "safetensors": lambda: [load_file(path, device=str(device)) for path in files]
    }
    if importlib.util.find_spec("fastsafetensors") is not None:
        from fastsafetensors import fastsafe_open

        def fast() -> object:
            state = {}
            for path in files:
                with fastsafe_open([str(path)], device=str(device)) as opened:
                    state.update({name: opened.get_tensor(name).clone() for name in opened.keys()})  # noqa: SIM118
            return state

        ways["fastsafetensors"] = fast
    if importlib.util.find_spec("runai_model_streamer") is not None:
        from runai_model_streamer import SafetensorsStreamer

        def runai() -> object:
            with SafetensorsStreamer() as streamer:
                streamer.stream_files([str(path) for path in files])
                return {name: tensor.to(device) for name, tensor in streamer.get_tensors()}

        ways["runai_model_streamer"] = runai
    return ways


def compare(
    url: str,
    directory: Path,
    nbytes: int,
    device: torch.device,
    limit: float | None,
    rounds: int,
    until: float,
    prepare: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One source: its limit, ours and the others."""
    stats = rdmaload.LoadStats()
    ways: dict[str, Callable[[], object]] = {
        "source": lambda: rdmaload.load(url),
        "rdmaload": lambda: rdmaload.load(url, device=device, stats=stats),
    }
    if limit is not None:  # a real device
        ways["load, then to"] = lambda: {name: t.to(device) for name, t in rdmaload.load(url).items()}
        if url == str(directory):
            ways.update(other_loaders(directory, device))
    failed = {}
    for name, way in list(ways.items()):
        prepare()
        try:
            way()  # pages, connections, kernels and the allocator are warm
        except Exception as error:  # somebody else's loader that does not run here is no reason to stop
            if name in ("source", "rdmaload"):
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            del ways[name]
    result = in_turns(ways, nbytes, rounds, until, prepare)
    result["failed"] = failed
    result["path"], result["fallback_reason"] = stats.path, stats.fallback_reason
    bound = min(result["source"]["gb_per_s"], limit or float("inf"))
    for way in ways:
        result[way]["share_of_limit"] = result[way]["gb_per_s"] / bound
    result["reaches_goal"] = result["rdmaload"]["share_of_limit"] >= GOAL
    prepare()
    result["timeline"] = timeline(url, device)
    return result


def staging_sweep(
    url: str, nbytes: int, device: torch.device, until: float, stagings: Sequence[int], pieces: Sequence[int]
) -> list[dict[str, Any]]:
    """GB/s by page-locked bytes and by the length of reads (of files; a store's chunks are as they were saved)."""
    rows = []
    default = reader._READ_BYTES
    try:
        for piece in pieces:
            reader._READ_BYTES = piece
            for staging in stagings:
                if time.monotonic() > until:
                    return rows
                runs = []
                for _ in range(3):
                    seconds = timed(lambda staging=staging: rdmaload.load(url, device=device, staging_bytes=staging))
                    runs.append(nbytes / seconds / 1e9)
                best = statistics.median(runs)
                rows.append({"staging_bytes": staging, "read_bytes": piece, "gb_per_s": best, "runs": runs})
    finally:
        reader._READ_BYTES = default
    return rows


def page_locking(url: str, device: torch.device) -> dict[str, float]:
    """Seconds to make the ring anew, and to take the one that was kept."""

    def seconds() -> float:
        with rdmaload.open(url) as model:
            source = model._reader.transport()
            begin = time.perf_counter()
            road = devices.DeviceRoad(
                source, device.index or 0, model._connector.options, read_bytes=8 << 20, expected_bytes=1 << 40
            )
            spent = time.perf_counter() - begin
            del road
        gc.collect()
        return spent

    seconds()
    _core.release_pinned_memory()
    return {"new_seconds": seconds(), "kept_seconds": seconds()}


def all_devices(url: str, nbytes: int, device: torch.device) -> dict[str, float]:
    """GB/s of `load_into` tensors that lie on every device in turns."""
    count = devices.allocator().device_count()
    with rdmaload.open(url) as model:
        targets = {}
        for number, (name, spec) in enumerate(model.tensors.items()):
            dtype, shape = torch_dtype(spec)
            targets[name] = devices.allocator().empty(shape, dtype, number % count)
        model.load_into(targets)
        return {"devices": count, "gb_per_s": nbytes / timed(lambda: model.load_into(targets)) / 1e9}


def measure(
    directory: Path,
    nbytes: int,
    device: torch.device,
    limit: float | None,
    *,
    rounds: int,
    seconds: float,
    stagings: Sequence[int] = tuple(size << 20 for size in (16, 32, 64, 128, 256)),
    pieces: Sequence[int] = tuple(size << 20 for size in (1, 2, 4, 8, 16)),
    redis: bool = True,
    report: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Everything, in the order of what matters; `report` gets the result after each part."""
    begin = time.monotonic()
    result: dict[str, Any] = {"copy_limit_gb_per_s": limit, "cufile": _core.cufile_refusal() or "direct"}

    def done(part: str, value: object) -> None:
        result[part] = value
        result["seconds"] = time.monotonic() - begin
        report(result)

    def attempt(part: str, work: Callable[[], object]) -> None:
        """The parts do not depend on each other: what one cannot do costs no other its turn."""
        try:
            value = work()
        except Exception as error:
            value = {"error": f"{type(error).__name__}: {error}"}
        done(part, value)

    with sources(directory, redis) as urls:
        parts = len(urls) + 3
        for number, (kind, url) in enumerate(urls.items(), start=1):
            if kind == "file":
                machine.warm_page_cache(directory)
            until = begin + seconds * number / parts
            attempt(kind, partial(compare, url, directory, nbytes, device, limit, rounds, until))
        until = begin + seconds * (len(urls) + 1) / parts
        checked = partial(rdmaload.load, urls["server"], device=device, verify_device="on")
        attempt("verify_device", lambda: timed(checked))
        machine.warm_page_cache(directory)
        attempt("staging_file", partial(staging_sweep, urls["file"], nbytes, device, until, stagings, pieces))
        until = begin + seconds * (len(urls) + 2) / parts
        attempt("staging_server", partial(staging_sweep, urls["server"], nbytes, device, until, stagings, pieces[:1]))
        attempt("page_locking", partial(page_locking, urls["file"], device))
        attempt("all_devices", partial(all_devices, urls["file"], nbytes, device))
        if time.monotonic() < begin + seconds:  # last: disks are slow
            cold = partial(
                compare,
                urls["file"],
                directory,
                nbytes,
                device,
                limit,
                min(rounds, 3),
                begin + seconds,
                lambda: machine.drop_from_page_cache(directory),
            )
            attempt("file_cold", cold)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=float, default=4e9)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=300, help="start no new round after so long")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dir", help="where the checkpoint is made")
    parser.add_argument("--output", "--json", type=Path, help="write the result as JSON, after each part")
    arguments = parser.parse_args()
    device = devices.checked_device(arguments.device)
    begin = time.monotonic()
    about = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "machine": machine.facts()}

    def write(result: dict[str, Any]) -> None:
        if arguments.output is not None:
            arguments.output.write_text(json.dumps({**about, **result, "finished": False}, indent=1))

    limit = copy_limit(device)
    write({"copy_limit_gb_per_s": limit})
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        checkpoint = checkpoints.llama_like(Path(name) / "model", arguments.bytes)
        loaded = {key: tensor.cpu() for key, tensor in rdmaload.load(checkpoint.directory, device=device).items()}
        assert checkpoints.compare(loaded, checkpoint.directory) == checkpoint.bytes
        del loaded
        result = measure(
            checkpoint.directory,
            checkpoint.bytes,
            device,
            limit,
            rounds=arguments.rounds,
            seconds=arguments.seconds - (time.monotonic() - begin),
            report=write,
        )
    paired.report("device", {**about, **result, "seconds": time.monotonic() - begin}, arguments.output)


if __name__ == "__main__":
    main()

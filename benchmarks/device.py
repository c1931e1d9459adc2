"""Loads into GPU memory against what bounds them: the source's own speed, and page-locked copies to the device.

Sources: host memory of this process, a directory (in the page cache, and evicted from it), our weight server inside
this process over loopback, Redis (where there is a redis-server), and a store written in Python. For each: its limit
(the same load into host memory), ours into the device, and where they apply `load` + `.to(device)`,
`safetensors.torch.load_file(device=...)` and other loaders that are installed. The share is ours / min(source limit,
copy limit); goal 0.95. A timeline of one load shows receiving and copying at the same time. Then what was never
measured: how many page-locked bytes, in pieces of what size, and what page-locking costs. One process, runs in turns,
every byte compared once before anything is timed. Runs unattended, what matters most first: each part begins only while
there is time for it, no round begins after `--seconds`, and with `--json` the result is written after each part.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
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
from rdmaload.connectors.local import LocalConnector
from rdmaload.connectors.registry import register_connector
from rdmaload.model import Model
from rdmaload.options import Options
from rdmaload.tensors import torch_dtype
from rdmaload.urls import Url, parse_url

GOAL = 0.95
COPY_BYTES = 256 << 20  # of one copy that is timed for the limit
MOST_SECONDS = 400  # so that what had begun when the time was up still ends within eight minutes
KEPT_BYTES = 128 << 20  # of page-locked memory between loads, as csrc/device/pinned_pool.h says
Trace = Sequence[tuple[float, float, float, int]]


def copy_limit(device: torch.device, rounds: int = 8) -> float:
    """GB/s of page-locked host memory to the device: the best of several rounds of four copies each."""
    nbytes = COPY_BYTES
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
    """Median and all GB/s of each way; each round runs all of them, every second one backwards.

    A way that fails leaves with its error, unless it is ours or the limit: somebody else's loader that does not run
    here is no reason to stop.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for name in list(rates)[:: -1 if number % 2 else 1]:
            if rates[name] and time.monotonic() > until:
                continue
            prepare()
            try:
                rates[name].append(nbytes / timed(ways[name]) / 1e9)
            except Exception as error:
                if name in ("source", "rdmaload"):
                    raise
                failed[name] = f"{type(error).__name__}: {error}"[:300]
                del rates[name]
    found = {name: {"gb_per_s": statistics.median(runs), "runs": runs} for name, runs in rates.items()}
    return {**found, "failed": failed}


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


@functools.cache
def host_memory(directory: str, threads: int) -> _core.MemoryTransport:
    """The files of a directory in this process's memory, read once."""
    held = _core.MemoryTransport(threads=threads)
    for path in Path(directory).iterdir():
        held.put(path.name, path.read_bytes())
    return held


class HostMemoryConnector(LocalConnector):
    """A directory whose bytes come from this process's memory: no disk, page cache or socket in the way."""

    def __init__(self, url: Url, options: Options | None = None) -> None:
        super().__init__(parse_url("/" + (url.model or "").lstrip("/")), options)

    def native_transport(self) -> object:
        return host_memory(str(self.root), self.options.threads)


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
        register_connector("benchmark-memory", HostMemoryConnector)
        stack.callback(host_memory.cache_clear)
        urls = {"file": str(directory), "memory": f"benchmark-memory://{directory}"}
        urls |= {"server": stack.enter_context(weight_server(2 * nbytes + (64 << 20)))}
        if redis and shutil.which("redis-server"):
            from tests.support.servers import RedisServer

            urls["redis"] = stack.enter_context(RedisServer()).url("device")
        urls["python"] = "memory://benchmark/device"
        for kind, url in urls.items():
            if kind not in ("file", "memory"):
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
    prepare: Callable[[], None] | None = None,
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
    if prepare is None:  # else it is cold on purpose
        in_turns(ways, nbytes, 1, until)  # pages, connections, kernels and the allocator are warm
    result = in_turns(ways, nbytes, rounds, until, prepare or (lambda: None))
    result["path"], result["fallback_reason"] = stats.path, stats.fallback_reason
    bound = min(result["source"]["gb_per_s"], limit or float("inf"))
    for way in ways.keys() & result.keys():
        result[way]["share_of_limit"] = result[way]["gb_per_s"] / bound
    result["reaches_goal"] = result["rdmaload"]["share_of_limit"] >= GOAL
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
                # No ring of another size is left over; the first run page-locks one, and the others find it kept, or
                # pay again where it is too large for that, as a user does.
                _core.release_pinned_memory()
                load = partial(rdmaload.load, url, device=device, staging_bytes=staging)
                first = nbytes / timed(load) / 1e9
                runs = [nbytes / timed(load) / 1e9 for _ in range(3)]
                rows.append(
                    {
                        "staging_bytes": staging,
                        "read_bytes": piece,
                        "ring_is_kept": staging <= KEPT_BYTES,
                        "first_gb_per_s": first,
                        "gb_per_s": statistics.median(runs),
                        "runs": runs,
                    }
                )
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
    end = begin + seconds
    result: dict[str, Any] = {"copy_limit_gb_per_s": limit, "cufile": _core.cufile_refusal() or "direct"}

    def done(part: str, value: object) -> None:
        result[part] = value
        result["seconds"] = time.monotonic() - begin
        report(result)

    def attempt(part: str, share: float, work: Callable[[float], object]) -> None:
        """The parts do not depend on each other: what one cannot do costs no other its turn.

        `share` is of the time that is left; what a part does not use is the others'.
        """
        now = time.monotonic()
        if now > end:
            done(part, {"skipped": "no time was left"})
            return
        try:
            value = work(now + share * (end - now))
        except Exception as error:
            value = {"error": f"{type(error).__name__}: {error}"}
        done(part, value)

    with sources(directory, redis) as urls:
        for number, (kind, url) in enumerate(urls.items()):
            if kind == "file":
                machine.warm_page_cache(directory)
            share = 0.6 / (len(urls) - 0.6 * number)
            attempt(kind, share, partial(compare, url, directory, nbytes, device, limit, rounds))
        for kind in ("file", "server"):
            checked = partial(rdmaload.load, urls[kind], device=device, verify_device="on")
            part = f"verify_device_{kind}"
            attempt(part, 0.2, lambda until, checked=checked: {"gb_per_s": nbytes / timed(checked) / 1e9})
        attempt("page_locking", 0.2, lambda until: page_locking(urls["file"], device))
        attempt("all_devices", 0.2, lambda until: all_devices(urls["file"], nbytes, device))
        sweep = partial(staging_sweep, nbytes=nbytes, device=device, stagings=stagings)
        attempt("staging_memory", 0.5, lambda until: sweep(urls["memory"], until=until, pieces=pieces))
        attempt("staging_server", 0.5, lambda until: sweep(urls["server"], until=until, pieces=pieces[:1]))
        cold = partial(compare, urls["file"], directory, nbytes, device, limit, min(rounds, 3))
        drop = partial(machine.drop_from_page_cache, directory)
        attempt("file_cold", 1.0, lambda until: cold(until, drop))  # last: disks are slow
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=float, default=4e9)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=300, help="start no new round after so long (at most 400)")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dir", help="where the checkpoint is made")
    parser.add_argument("--output", "--json", type=Path, help="write the result as JSON, after each part")
    arguments = parser.parse_args(argv)
    device = devices.checked_device(arguments.device)
    begin = time.monotonic()
    seconds = min(arguments.seconds, MOST_SECONDS)
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
            seconds=seconds - (time.monotonic() - begin),
            report=write,
        )
    whole = {**about, **result, "finished": True, "seconds": time.monotonic() - begin}
    paired.report("device", whole, arguments.output)


if __name__ == "__main__":
    main()

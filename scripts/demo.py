"""The whole road in a minute: make a checkpoint, start a store, save, load, compare every byte.

The store is `rdmaload serve`, so that nothing has to be installed; --store redis-server takes that one.

`scripts/demo` sets the environment up and calls this. Exit code 1 means that a byte differed or a
step failed.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the packages benchmarks and tests.support

from benchmarks import checkpoints  # noqa: E402
from benchmarks.paired import table  # noqa: E402
from tests.support.servers import RedisServer, ServerError  # noqa: E402
from tests.support.weight_server import WeightServer  # noqa: E402

MEMORY_FACTOR = 2.3  # the store's copy and the loaded tensors, and room for everything else
DISK_FACTOR = 1.1  # the checkpoint and its small files once more


@dataclass
class Step:
    """A line of the table."""

    name: str
    bytes: int = 0
    seconds: float = 0.0
    path: str = "-"
    verified: str = "-"

    def cells(self) -> list[object]:
        speed = f"{self.bytes / self.seconds / 1e9:.2f}" if self.bytes and self.seconds else "-"
        size = f"{self.bytes:,}" if self.bytes else "-"
        return [self.name, size, f"{self.seconds:.2f}", speed, self.path, self.verified]


class Steps:
    """Runs and times the steps, saying which one is running."""

    def __init__(self) -> None:
        self.done: list[Step] = []

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Step]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        step = Step(name)
        start = time.perf_counter()
        yield step
        step.seconds = step.seconds or time.perf_counter() - start
        self.done.append(step)

    def print(self) -> None:
        heading = ["step", "bytes", "seconds", "GB/s", "path", "verified"]
        print(table([heading, *(step.cells() for step in self.done)]))


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no MemAvailable in /proc/meminfo")


def files_differing(original: Path, copy: Path) -> list[str]:
    """Names of the non-weight files of `original` that are absent from `copy` or differ there."""
    names = [path.name for path in original.iterdir() if path.suffix != ".safetensors"]
    return [
        name
        for name in sorted(names)
        if not (copy / name).is_file() or (copy / name).read_bytes() != (original / name).read_bytes()
    ]


def store_of(name: str, total_bytes: float) -> WeightServer | RedisServer:
    """A server that runs."""
    if name == "rdmaload serve":
        return WeightServer(max_memory=int(1.1 * total_bytes) + 2**26)
    return RedisServer(executable=name)


def run(total_bytes: float, directory: Path, steps: Steps, store: str) -> None:
    import torch  # noqa: F401  (imported here, so that no step's time contains it)

    import rdmaload
    from rdmaload.stats import LoadStats

    with steps.step("make a checkpoint") as step:
        checkpoint = checkpoints.llama_like(directory / "checkpoint", total_bytes)
        step.bytes = checkpoint.file_bytes
        step.verified = f"{len(checkpoint.tensors)} tensors, {len(checkpoint.weight_files)} weight files"
    with contextlib.ExitStack() as stack:
        with steps.step(f"start {store}") as step:
            server = stack.enter_context(store_of(store, total_bytes))
            step.path = f"{server.host}:{server.port}"
        url = server.url("llama")
        with steps.step("save") as step:
            saved = rdmaload.save(checkpoint.directory, url)
            step.bytes, step.seconds, step.path = saved.bytes, saved.seconds, saved.path
            step.verified = f"{saved.files} files in {saved.chunks} chunks, published"
        with steps.step("load") as step:
            stats = LoadStats()
            state = rdmaload.load(url, stats=stats)
            step.bytes, step.seconds, step.path = stats.bytes, stats.seconds, stats.path
            step.verified = f"{stats.verified_bytes:,} bytes by CRC32C"
        with steps.step("compare with the files") as step:
            step.bytes = checkpoints.compare(state, checkpoint.directory)
            step.verified = "every byte of every tensor is equal"
        with steps.step("pull the other files") as step:
            pulled = rdmaload.pull_files(url, directory / "pulled")
            if differing := files_differing(checkpoint.directory, Path(pulled)):
                raise checkpoints.Mismatch(f"pulled files differ: {', '.join(differing)}")
            step.bytes = sum(path.stat().st_size for path in Path(pulled).rglob("*") if path.is_file())
            step.verified = "every byte of every file is equal"
        del state
        with steps.step("load from the directory") as step:
            stats = LoadStats()
            state = rdmaload.load(checkpoint.directory, stats=stats)
            step.bytes, step.seconds, step.path = stats.bytes, stats.seconds, stats.path
            step.verified = "files have no checksums"
        with steps.step("compare with the files") as step:
            step.bytes = checkpoints.compare(state, checkpoint.directory)
            step.verified = "every byte of every tensor is equal"


def refuse_when_short(total_bytes: float, directory: Path) -> str | None:
    """Why the demo does not fit on this machine; None when it does."""
    for what, free, needed in (
        ("memory", available_bytes(), MEMORY_FACTOR * total_bytes),
        (
            f"disk space in {directory}",
            shutil.disk_usage(directory).free,
            DISK_FACTOR * total_bytes,
        ),
    ):
        if free < needed:
            return f"{what}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed; try --bytes 2e8"
    return None


def size(text: str) -> float:
    value = float(text)
    if not 1e5 <= value <= 1e12:
        raise argparse.ArgumentTypeError("between 1e5 and 1e12")
    return value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=size, default=1e9, help="size of the checkpoint (default 1e9)")
    parser.add_argument("--dir", type=Path, help="where the temporary directory is made")
    parser.add_argument(
        "--store",
        choices=["rdmaload serve", "redis-server", "valkey-server"],
        default="rdmaload serve",
        help="the server that keeps the model (default: rdmaload serve, which needs no other software)",
    )
    options = parser.parse_args(arguments)
    from rdmaload.errors import RdmaloadError

    steps = Steps()
    with tempfile.TemporaryDirectory(prefix="rdmaload-demo-", dir=options.dir) as name:
        if reason := refuse_when_short(options.bytes, Path(name)):
            print(f"demo: {reason}", file=sys.stderr)
            return 1
        try:
            run(options.bytes, Path(name), steps, options.store)
        except checkpoints.Mismatch as mismatch:
            steps.print()
            print(f"demo: MISMATCH: {mismatch}", file=sys.stderr)
            return 1
        except (ServerError, RdmaloadError) as failure:
            print(f"demo: {failure}", file=sys.stderr)
            return 1
    steps.print()
    return 0


if __name__ == "__main__":
    sys.exit(main())

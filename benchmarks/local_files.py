"""rdmaload.load of a directory against safetensors into memory of its own, warm and cold.

Owned means that every byte has been read into memory of its own: `load_file` maps its file, so each
tensor is cloned; `load_file(backend="pread")` reads. "plain preads" is what files cost without a
format: two threads, 4 MiB pieces, fresh huge pages; "direct preads" is that past the page cache, by eight
threads and in pieces of 2 MiB, and the same into small pages. runai-model-streamer takes part where it is
importable. Cold files are written back and evicted before each run, which leaves the disk's and, in
a virtual machine, the host's own caches as they are.
Target: at least 1.0.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
import mmap
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, machine, paired

# Memory that lies together is filled fast by a disk.
_HUGE_PAGE_BYTES = 2 << 20

_PLAIN = "plain preads"
_DIRECT = "direct preads"


def load_and_clone(directory: Path) -> object:
    from safetensors.torch import load_file

    state = {}
    for path in checkpoints.weight_files(directory):
        for name, tensor in load_file(path).items():
            state[name] = tensor.clone()
    return state


def load_pread(directory: Path) -> object:
    from safetensors.torch import load_file

    state = {}
    for path in checkpoints.weight_files(directory):
        state.update(load_file(path, backend="pread"))
    return state


def read_plainly(
    directory: Path, flags: int = 0, threads: int = 2, piece_bytes: int = 4 << 20, advice: int = mmap.MADV_HUGEPAGE
) -> dict[str, mmap.mmap]:
    """Every weight file whole, into memory of its own, which ends with the last block that a disk may want."""
    pieces = []
    memory = {}
    for path in checkpoints.weight_files(directory):
        size = path.stat().st_size
        room = -(-size // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        memory[path.name] = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[path.name].madvise(advice)
        descriptor = os.open(path, os.O_RDONLY | flags)
        view = memoryview(memory[path.name])
        pieces += [(descriptor, view[at : at + piece_bytes], at, size) for at in range(0, size, piece_bytes)]

    def read(piece: tuple[int, memoryview, int, int]) -> None:
        descriptor, view, at, size = piece
        while view and at < size:
            got = os.preadv(descriptor, [view], at)
            view, at = view[got:], at + got

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, pieces))
    for descriptor in {piece[0] for piece in pieces}:
        os.close(descriptor)
    return memory


def check_plain(memory: Any, directory: Path) -> None:
    for path in checkpoints.weight_files(directory):
        content = path.read_bytes()
        assert memory[path.name][: len(content)] == content


def stream_with_runai(strategy: str, directory: Path) -> object:
    """Tensors of their own storage; read in a child, so that setting the environment harms nobody."""
    os.environ["RUNAI_STREAMER_FS_STRATEGY"] = strategy
    from runai_model_streamer import SafetensorsStreamer

    state = {}
    for path in checkpoints.weight_files(directory):
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(str(path))
            state.update(streamer.get_tensors())
    return state


def alternatives() -> dict[str, Callable[[Path], object]]:
    """The ways that the installed packages have."""
    from safetensors.torch import load_file

    ways: dict[str, Callable[[Path], object]] = {"load_file + clone": load_and_clone}
    if "backend" in inspect.signature(load_file).parameters:
        ways["load_file(pread)"] = load_pread
    ways[_PLAIN] = read_plainly
    direct = {"flags": os.O_DIRECT, "threads": 8, "piece_bytes": 2 << 20}
    ways[_DIRECT] = functools.partial(read_plainly, **direct)
    ways[f"{_DIRECT} into small pages"] = functools.partial(read_plainly, **direct, advice=mmap.MADV_NOHUGEPAGE)
    if importlib.util.find_spec("runai_model_streamer") is not None:
        import runai_model_streamer  # noqa: F401  # here, so that no run pays for it

        for strategy in ("io_uring_buffered", "io_uring_direct"):
            ways[f"runai {strategy}"] = functools.partial(stream_with_runai, strategy)
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    paired.add_arguments(parser)
    parser.add_argument("--cache", choices=["warm", "cold", "both"], default="both")
    parser.add_argument("--drop-caches", action="store_true", help="cold: drop the system's page cache (root)")
    parser.add_argument("--threads", type=int, help="rdmaload's option; default: its default")
    parser.add_argument("--file-io", choices=["auto", "buffered", "direct"], help="rdmaload's option")
    parser.add_argument("--against", help="only alternatives whose name contains this")
    parser.add_argument("--only-others", action="store_true", help="measure the alternatives alone")
    arguments = parser.parse_args()

    options: dict[str, Any] = {} if arguments.threads is None else {"threads": arguments.threads}
    if arguments.file_io is not None:
        options["file_io"] = arguments.file_io
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        checkpoint = checkpoints.llama_like(Path(name) / "model", arguments.bytes)
        directory = checkpoint.directory

        def check(state: Any) -> None:
            assert checkpoints.compare(state, directory) == checkpoint.bytes

        def cold() -> None:
            machine.drop_from_page_cache(directory, arguments.drop_caches)

        def warm() -> None:
            machine.warm_page_cache(directory)

        cold()
        result["cached_after_eviction"] = machine.cached_fraction(directory)
        for cache, prepare in (("warm", warm), ("cold", cold)):
            if arguments.cache not in (cache, "both"):
                continue
            others = [
                paired.Way(
                    f"{cache}, {title}",
                    functools.partial(way, directory),
                    prepare,
                    functools.partial(check_plain, directory=directory) if "preads" in title else check,
                )
                for title, way in alternatives().items()
                if (arguments.against is None or arguments.against in title)
                and (cache == "cold" or _DIRECT not in title)
            ]
            if arguments.only_others:
                own, others = others[0], others[1:]
            else:
                import rdmaload

                paired.import_everything()
                own = paired.Way(
                    f"{cache}, rdmaload",
                    lambda: rdmaload.load(directory, **options),
                    prepare,
                    check,
                )
            result[cache] = paired.compare(
                own, others, checkpoint.bytes, arguments.pairs, cold_memory=arguments.cold_memory
            )
    paired.report("local_files", result, arguments.json)


if __name__ == "__main__":
    main()

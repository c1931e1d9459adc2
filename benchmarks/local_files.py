"""rdmaload.load of a directory against safetensors into memory of its own, warm and cold.

Owned means that every byte has been read into memory of its own: `load_file` maps its file, so each
tensor is cloned; `load_file(backend="pread")` reads. Cold files are written back and evicted before
each run, which leaves the disk's and, in a virtual machine, the host's own caches as they are.
Target: at least 1.0.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, machine, paired


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


def alternatives() -> dict[str, Callable[[Path], object]]:
    """The ways that the installed safetensors has."""
    from safetensors.torch import load_file

    ways: dict[str, Callable[[Path], object]] = {"load_file + clone": load_and_clone}
    if "backend" in inspect.signature(load_file).parameters:
        ways["load_file(pread)"] = load_pread
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    paired.add_arguments(parser)
    parser.add_argument("--cache", choices=["warm", "cold", "both"], default="both")
    parser.add_argument("--drop-caches", action="store_true", help="cold: drop the system's page cache (root)")
    parser.add_argument("--threads", type=int, help="rdmaload's option; default: its default")
    parser.add_argument("--only-others", action="store_true", help="measure the alternatives alone")
    arguments = parser.parse_args()

    options: dict[str, Any] = {} if arguments.threads is None else {"threads": arguments.threads}
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
                paired.Way(f"{cache}, {title}", functools.partial(way, directory), prepare, check)
                for title, way in alternatives().items()
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

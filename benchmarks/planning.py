"""What opening and planning 1 TB costs: 1,000 files, a million chunks, 100,000 tensors, no data.

Manifest and index are those of a real model; the chunks are absent, and nothing reads them. Each
stage runs in a fresh child after the ones before it, with the time it took and the memory that it
added.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import paired
from benchmarks.peak_memory import resident_bytes

URL = "memory://planning/model"
GENERATION = "0123456789abcdef" * 2


def simulated_index(total_bytes: float, files: int, tensors: int) -> Any:
    """An Index whose files hold equally many bf16 tensors of one size; its checksums are zeros."""
    from rdmaload.index import DEFAULT_CHUNK_BYTES, Index, IndexFile

    per_file = tensors // files
    rows = int(total_bytes / tensors / 2 / 8192)
    tensor_bytes = rows * 8192 * 2
    entries = []
    for number in range(files):
        header = json.dumps(
            {
                f"model.layers.{number // 4}.mlp.experts.{number % 4 * per_file + place}.weight": {
                    "dtype": "BF16",
                    "shape": [rows, 8192],
                    "data_offsets": [place * tensor_bytes, (place + 1) * tensor_bytes],
                }
                for place in range(per_file)
            },
            separators=(",", ":"),
        ).encode()
        header += b" " * (-len(header) % 8)
        size = 8 + len(header) + per_file * tensor_bytes
        path = f"model-{number + 1:05}-of-{files:05}.safetensors"
        entries.append(IndexFile(path, size, number, header=header))
    chunks = sum(entry.chunk_count(DEFAULT_CHUNK_BYTES) for entry in entries)
    return Index.of(entries, chunk_bytes=DEFAULT_CHUNK_BYTES, crcs=bytes(4 * chunks))


def publish(index: Any) -> None:
    """Put manifest and index where `rdmaload.open(URL)` finds them, here and in children."""
    import rdmaload
    from rdmaload.connectors.registry import connector_for
    from rdmaload.index import index_key
    from rdmaload.manifest import Manifest, manifest_key

    value = index.encode()
    manifest = Manifest.of(
        value,
        generation=GENERATION,
        files=len(index.files),
        bytes=index.total_bytes,
        writer=f"rdmaload {rdmaload.__version__}",
    )
    with connector_for(URL) as connector:
        store: Any = connector
        store.set(index_key("model", GENERATION), value)
        store.set(manifest_key("model"), manifest.encode())


def open_model() -> Any:
    """The public way: manifest, index and headers, checked."""
    import rdmaload

    return rdmaload.open(URL)


def list_tensors(model: Any) -> Any:
    """The public way: names, dtypes and shapes of all tensors."""
    return model.tensors


def plan_load(index: Any) -> Any:
    """The plan of a load of everything, as `Model.load` makes it."""
    from rdmaload import _core

    files = [file for file in index.files if file.header is not None]
    tensors = _core.TensorIndex()
    for number, file in enumerate(files):
        tensors.add_file(number, file.path, file.size, file.header)
    layout = _core.StoreLayout(
        [(f"model/chunks/{GENERATION}/{file.number}/", file.size, file.first_chunk) for file in files],
        index.chunk_bytes,
        True,
        index.crcs,
    )
    return _core.plan_into_arenas(tensors, layout, list(range(len(tensors))), _core.PlanLimits(whole_chunks=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=float, default=1e12)
    parser.add_argument("--files", type=int, default=1_000)
    parser.add_argument("--tensors", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    paired.import_everything()
    index = simulated_index(arguments.bytes, arguments.files, arguments.tensors)
    encoded = index.encode()
    publish(index)

    def stages() -> dict[str, object]:
        from rdmaload.index import Index

        found: dict[str, object] = {}

        def stage(name: str, work: Callable[[], Any]) -> Any:
            memory = resident_bytes()
            start = time.perf_counter()
            answer = work()
            seconds = time.perf_counter() - start
            found[name] = {"seconds": round(seconds, 4), "bytes": resident_bytes() - memory}
            return answer

        decoded = stage("decode the index", lambda: Index.decode(encoded))
        plan = stage("parse headers and plan", lambda: plan_load(decoded))
        model = stage("open", open_model)
        listed = stage("list tensors", lambda: list_tensors(model))
        assert len(listed) == arguments.tensors
        found["plan"] = {"reads": plan.reads, "read_bytes": plan.read_bytes}
        return found

    runs = [paired.in_child(stages) for _ in range(arguments.rounds)]
    names = [name for name in runs[0] if name != "plan"]
    whole: list[Any] = [*runs]
    stages_found: dict[str, Any] = {
        name: {
            "seconds": paired.quartiles([run[name]["seconds"] for run in whole]),
            "bytes": max(run[name]["bytes"] for run in whole),
        }
        for name in names
    }
    result = {
        "model": {
            "bytes": index.total_bytes,
            "files": len(index.files),
            "chunks": index.total_chunks,
            "tensors": arguments.tensors,
            "index_bytes": len(encoded),
        },
        "plan": runs[0]["plan"],
        "stages": stages_found,
    }
    paired.report("planning", result, arguments.json)
    rows: list[list[object]] = [["stage", "seconds", "MiB"]]
    for name, found in stages_found.items():
        rows.append([name, found["seconds"]["median"], found["bytes"] / 2**20])
    paired.say(paired.table(rows))


if __name__ == "__main__":
    main()

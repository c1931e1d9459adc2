"""ls and info: what is in a store, and what a model is."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rdmaload.amounts import count_text, size_text
from rdmaload.cli.arguments import Commands, add_command, add_url, options_of
from rdmaload.cli.output import columns, printable, write_result

if TYPE_CHECKING:
    from rdmaload.index import IndexFile
    from rdmaload.model import Model
    from rdmaload.tensors import TensorSpec

__all__ = ["register"]


def register(commands: Commands) -> None:
    """Add the commands of this module."""
    ls = add_command(
        commands,
        "ls",
        _ls,
        help="list the models in a store, or the files of a model",
        description="List the models in a store; for a url with a model, its files, or the models "
        "whose names start with it and a slash. Models come from a list that saves keep in the "
        "store; --scan looks at every key instead and puts the list right.",
        prints="One name per line, or size and path of each file; with --json url and models, or url and files "
        "(path, size, rank, weights).",
        examples=[
            "rdmaload ls redis://10.0.0.5",
            "rdmaload ls redis://10.0.0.5 --scan",
            "rdmaload ls redis://10.0.0.5/llama",
        ],
    )
    add_url(ls, help="a store (redis://10.0.0.5:6379), or a model in it")
    ls.add_argument("--scan", action="store_true", help="find models by looking at every key of the store")
    info = add_command(
        commands,
        "info",
        _info,
        help="say what a model is",
        description="Say what a model is: kind, generation, who wrote it and when, files, tensors, "
        "dtypes, sizes, chunks, parallel layout and identity.",
        prints="One line per fact; with --json kind, world_size, generation, created, writer, layout, identity, "
        "bytes, tensors, dtypes, chunks, files and, with --tensors, tensor_list.",
        examples=[
            "rdmaload info redis://10.0.0.5/llama",
            "rdmaload info redis://10.0.0.5/llama --tensors",
            "rdmaload info /models/llama --json",
        ],
    )
    add_url(info)
    info.add_argument("--tensors", action="store_true", help="list every tensor")


def _ls(args: argparse.Namespace) -> int:
    import rdmaload
    from rdmaload.connectors import FileConnector
    from rdmaload.connectors.registry import connector_class
    from rdmaload.urls import parse_url

    location = parse_url(args.url, require_model=False)
    opts = options_of(args)
    missing: rdmaload.NotFoundError | None = None
    keeps_files = issubclass(connector_class(location.scheme), FileConnector)
    if keeps_files or (location.model and not args.scan):
        try:
            with rdmaload.open(args.url, **opts) as model:  # type: ignore[arg-type]
                files, store_layout = model.files, model.store_layout
        except rdmaload.NotFoundError as err:
            if keeps_files:  # it has no list of models to look into
                raise
            missing = err
        else:
            rows = [(size_text(file.size), file.path) for file in files]
            document: dict[str, object] = {
                "url": location.redacted,
                "store_layout": store_layout,
                "files": [_file_json(file) for file in files],
            }
            write_result(args.json, document, columns(rows, right=1))
            return 0
    names = rdmaload.models(args.url, scan=args.scan, **opts)  # type: ignore[arg-type]
    if location.model:
        # A model named so, when it was scanned for, and what lies below that name.
        prefix = f"{location.model}/"
        names = [name for name in names if name == location.model or name.startswith(prefix)]
        if missing is not None and not names:
            raise missing
    document = {"url": location.redacted, "models": names}
    write_result(args.json, document, [printable(name) for name in names])
    return 0


def _info(args: argparse.Namespace) -> int:
    import rdmaload

    with rdmaload.open(args.url, **options_of(args)) as model:  # type: ignore[arg-type]
        tensors = _tensors(model)
        document = _description(model, tensors)
        lines = _info_lines(document)
        if args.tensors:
            document["tensor_list"] = [_tensor_json(rank, spec) for rank, spec in tensors]
            lines += ["", *columns(_tensor_row(spec) for _, spec in tensors)]
    write_result(args.json, document, lines)
    return 0


def _tensors(model: Model) -> list[tuple[int | None, TensorSpec]]:
    """Every tensor of every rank; those of files that ranks share once, without a rank."""
    if not any(file.header is not None for file in model.files):
        return []
    rank_of = {file.path: file.rank for file in model.files}
    ranks: list[int | None] = [*sorted({rank for rank in rank_of.values() if rank is not None})]
    found: dict[tuple[int | None, str], TensorSpec] = {}
    for rank in ranks if model.kind == "sharded" and ranks else [None]:
        for name, spec in model.rank_tensors(rank).items():
            found[rank_of[spec.file], name] = spec
    return [(rank, spec) for (rank, _), spec in found.items()]


def _description(model: Model, tensors: list[tuple[int | None, TensorSpec]]) -> dict[str, object]:
    dtypes: dict[str, dict[str, int]] = {}
    aliases = {(file.rank, alias) for file in model.files for alias in file.tied}
    for rank, spec in tensors:
        entry = dtypes.setdefault(spec.dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += 0 if (rank, spec.name) in aliases else spec.nbytes
    manifest, chunk_bytes = model.manifest, model.chunk_bytes
    chunks = sum(file.chunk_count(chunk_bytes) for file in model.files)
    return {
        "url": model.url,
        "store_layout": model.store_layout,
        "kind": model.kind,
        "world_size": model.world_size,
        "generation": model.generation,
        "format": None if manifest is None else manifest.format,
        "created": None if manifest is None else manifest.created,
        "writer": None if manifest is None else manifest.writer,
        "layout": {} if manifest is None else dict(manifest.layout),
        "identity": {} if manifest is None else dict(manifest.identity),
        "bytes": sum(file.size for file in model.files),
        "tensor_bytes": sum(entry["bytes"] for entry in dtypes.values()),
        "tensors": len(tensors),
        "tied": len(aliases),
        "dtypes": dict(sorted(dtypes.items())),
        "chunk_bytes": chunk_bytes,
        "chunks": chunks,
        "checksums": "pending" if model.checksums_pending else None if chunk_bytes is None else "crc32c",
        "files": [_file_json(file) for file in model.files],
    }


def _info_lines(document: Mapping[str, object]) -> list[str]:
    def number(name: str) -> int:
        value = document[name]
        assert isinstance(value, int)
        return value

    def pairs(name: str) -> str:
        value = document[name]
        assert isinstance(value, dict)
        return ", ".join(f"{key}={member}" for key, member in value.items()) or "-"

    files, dtypes = document["files"], document["dtypes"]
    assert isinstance(files, list)
    assert isinstance(dtypes, dict)
    weights = sum(file["weights"] for file in files)
    kind = str(document["kind"])
    if kind == "sharded":
        kind += f" over {count_text(number('world_size'), 'rank')}"
    stored_as = {"rdmaload": "format 1", "sglang": "SGLang's layout: one value per tensor", "files": "plain files"}
    chunks = "none: plain files, without checksums"
    if document["store_layout"] == "sglang":
        chunks = "none: whole values, without checksums"
    if document["chunk_bytes"] is not None:
        verified = "checksums pending" if document["checksums"] == "pending" else "with CRC32C"
        chunks = f"{number('chunks'):,} of {number('chunk_bytes'):,} bytes, {verified}"
    tied = f", {number('tied')} of them tied" if document["tied"] else ""
    rows = [
        ("url", str(document["url"])),
        ("stored as", stored_as[str(document["store_layout"])]),
        ("kind", kind),
        ("generation", str(document["generation"] or "-")),
        ("created", str(document["created"] or "-")),
        ("writer", str(document["writer"] or "-")),
        ("layout", pairs("layout")),
        ("identity", pairs("identity")),
        (
            "files",
            f"{len(files):,}, {size_text(number('bytes'))}; {count_text(weights, 'weight file')} among them",
        ),
        ("tensors", f"{number('tensors'):,}, {size_text(number('tensor_bytes'))}{tied}"),
        *(
            (
                f"  {dtype}",
                f"{count_text(entry['tensors'], 'tensor')}, {size_text(entry['bytes'])}",
            )
            for dtype, entry in dtypes.items()
        ),
        ("chunks", chunks),
    ]
    return columns(rows)


def _file_json(file: IndexFile) -> dict[str, object]:
    return {
        "path": file.path,
        "size": file.size,
        "rank": file.rank,
        "weights": file.header is not None,
    }


def _tensor_json(rank: int | None, spec: TensorSpec) -> dict[str, object]:
    return {
        "name": spec.name,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "bytes": spec.nbytes,
        "rank": rank,
        "file": spec.file,
    }


def _tensor_row(spec: TensorSpec) -> tuple[str, ...]:
    shape = "x".join(map(str, spec.shape)) or "scalar"
    return spec.name, spec.dtype, shape, size_text(spec.nbytes), spec.file

"""Reads a model's files as they are, in blocks, and writes them into a directory, each whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rdmaload import _core
from rdmaload.connectors.local import LocalConnector
from rdmaload.index import Index, IndexFile
from rdmaload.reader import StoreReader, Tick
from rdmaload.stats import LoadStats
from rdmaload.urls import parse_url

__all__ = ["blocks_of", "pull"]

_WINDOW_BYTES = 128 << 20  # read ahead of what has been written
_BLOCK_BYTES = 16 << 20  # long enough to keep every connection busy within one


def blocks_of(
    reader: StoreReader,
    index: Index,
    files: Sequence[tuple[int, IndexFile]],
    stats: LoadStats,
    tick: Tick | None,
) -> Iterator[tuple[IndexFile, Iterator[memoryview]]]:
    """Each file (with its position in the index) and its verified content; a block is valid until the next."""
    chunk_bytes = index.chunk_bytes or 1
    block_bytes = max(1, _BLOCK_BYTES // chunk_bytes) * chunk_bytes  # whole chunks: none is read for two blocks
    done_before = 0
    for position, file in files:
        blocks = _core.TensorIndex()
        blocks.add_blocks(position, file.size, block_bytes)
        plans = (reader.plan(blocks, [block]) for block in range(len(blocks)))
        tick_of = None if tick is None else (lambda done, before=done_before: tick(before + done))
        batches = reader.stream(plans, window_bytes=_WINDOW_BYTES, stats=stats, tick=tick_of, reuse=True)
        yield file, (memoryview(batch.arenas[0])[: batch.plan.wanted_bytes] for batch in batches)
        done_before += file.size


def pull(files: Iterable[tuple[IndexFile, Iterator[memoryview]]], directory: Path) -> None:
    """Write the files; their paths were checked when the index was decoded, and stay inside `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    with LocalConnector(parse_url(directory.absolute())) as target:
        for file, blocks in files:
            target.write(file.path, file.size, blocks)

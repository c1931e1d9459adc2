"""Reads a model's files as they are, in blocks, and writes them into a directory, each whole or not at all."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from rdmaload import _core
from rdmaload.connectors.local import LocalConnector
from rdmaload.errors import NotFoundError
from rdmaload.index import Index, IndexFile
from rdmaload.options import Options
from rdmaload.reader import StoreReader, Tick
from rdmaload.selection import is_selected
from rdmaload.stats import LoadStats
from rdmaload.urls import parse_url
from rdmaload.weights import has_weight_suffix

__all__ = ["blocks_of", "check_weights", "pull"]

_log = logging.getLogger("rdmaload")

_WINDOW_BYTES = 128 << 20  # read ahead of what has been written
_FEW_FILES = 100
_LARGE_BYTES = 1 << 20
_BLOCK_BYTES = 16 << 20  # long enough to keep every connection busy within one


def check_weights(
    index: Index, chosen: Iterable[tuple[int, IndexFile]], allow: list[str] | None, directory: str, url: str
) -> None:
    """Say that tensors which the store keeps as values of their own do not become the weight files of a directory.

    Raises NotFoundError when `allow` names weight files and means none of those values.
    """
    values = [file for file in index.files if file.tensor is not None]
    if not values:
        return
    way_out = f"`rdmaload save {url} {directory}` makes a directory of safetensors files that can be loaded"
    if any(file.tensor is not None for _, file in chosen):
        _log.warning(
            "%s keeps a value per tensor, SGLang's layout: they are copied as they are, to keys/, where nothing looks "
            "for a model's weights; %s",
            url,
            way_out,
        )
        return
    named = [pattern for pattern in allow or () if has_weight_suffix(pattern)]
    if named and not any(is_selected(file.path, named, None) for file in values):
        raise NotFoundError(
            f"{url} has no weight file that matches {', '.join(named)}: it keeps a value per tensor, SGLang's layout "
            f"({values[0].path}); {way_out}",
            url=url,
            key=values[0].key,
        )


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
    # One more request per file: not for thousands of small ones.
    all_of_them = len(files) <= _FEW_FILES or reader.requires_whole
    reader.expect_whole([position for position, file in files if all_of_them or file.size >= _LARGE_BYTES])
    reader.require_whole(lambda: {file.path: (file.size, file.size) for _, file in files if file.size})
    done_before = 0
    finished: set[str] = set()
    for position, file in files:
        blocks = _core.TensorIndex()
        blocks.add_blocks(position, file.size, block_bytes)
        plans = (reader.plan(blocks, [block]) for block in range(len(blocks)))
        tick_of = None if tick is None else _tick_within(tick, done_before, finished)
        batches = reader.stream(plans, window_bytes=_WINDOW_BYTES, stats=stats, tick=tick_of, reuse=True)
        yield file, (memoryview(batch.arenas[0])[: batch.plan.wanted_bytes] for batch in batches)
        done_before += file.size
        finished.add(file.path)


def _tick_within(tick: Tick, before: int, finished: AbstractSet[str]) -> Tick:
    """The tick of one file, which itself is done only when its last block was taken."""
    return lambda done, _: tick(before + done, finished)


def pull(files: Iterable[tuple[IndexFile, Iterator[memoryview]]], directory: Path) -> None:
    """Write the files; their paths were checked when the index was decoded, and stay inside `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    # Who pulls files reads them next: they stay in the page cache.
    with LocalConnector(parse_url(directory.absolute()), Options(file_io="buffered")) as target:
        for file, blocks in files:
            target.write(file.path, file.size, blocks)

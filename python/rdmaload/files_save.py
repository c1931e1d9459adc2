"""Save into a store of plain files, such as a local directory.

Files are written whole or not at all, several at once, in an order that leaves what readers look at
first (the list of weight files, config.json) to the end.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence

from rdmaload import _core
from rdmaload.connectors.connector import FileConnector
from rdmaload.errors import AlreadyExistsError, IntegrityError, NotFoundError
from rdmaload.index import DEFAULT_CHUNK_BYTES
from rdmaload.sources import Source, SourceModel, rank_of_path
from rdmaload.threads import run_in_threads
from rdmaload.weights import WEIGHT_INDEX_SUFFIX

__all__ = ["existing_files", "is_ours_to_remove", "refuse_existing", "save_files", "save_phase"]

_log = logging.getLogger("rdmaload")

# Large enough that a write's cost is the copy, small enough to be nothing beside a model; disks want multiples of 4096.
_BLOCK_BYTES = 4 << 20


def save_files(
    connector: FileConnector,
    model: SourceModel,
    *,
    rank: int | None,
    overwrite: bool,
    tick: Callable[[int, int], None],
    threads: int,
) -> None:
    """Write the files of `model`, then remove weight files of an older one.

    Of a sharded model each rank writes its own weight files; plain files that exist already are
    left to rank 0. `tick` gets bytes and files done. Raises AlreadyExistsError when
    overwrite=False and weight files are there.
    """
    tied = sum(len(source.tied) for source in model.files)
    if tied:
        _log.warning(
            "%s: %d tied names are kept in the metadata of the safetensors files only, as plain "
            "files have no other place for them",
            connector.url,
            tied,
        )
    paths = {source.path for source in model.files}
    existing = existing_files(connector)
    if not overwrite:
        refuse_existing(connector, existing, paths, rank)
    writer = _Writer(connector, _block_bytes(model.chunk_bytes or DEFAULT_CHUNK_BYTES), tick)
    files = [source for source in model.files if not (rank and source.header is None and source.path in existing)]
    for phase in range(3):
        writer.write([source for source in files if save_phase(source) == phase], threads)
    model.check_unchanged()
    for path in sorted(existing - paths):
        if is_ours_to_remove(path, rank, model.world_size):
            connector.delete(path)


def refuse_existing(connector: FileConnector, existing: set[str], paths: set[str], rank: int | None) -> None:
    """Raise AlreadyExistsError when a file of the model, or an older model's weights, are there."""
    there = sorted(path for path in existing if path in paths or (rank is None and _is_weight(path)))
    if there:
        raise AlreadyExistsError(
            f"{connector.url} holds {there[0]} and overwrite=False. Save elsewhere, or remove the old model first.",
            url=connector.url,
            key=there[0],
        )


def existing_files(connector: FileConnector) -> set[str]:
    """The paths that are there; none where there is no model."""
    try:
        return {info.path for info in connector.list_files()}
    except NotFoundError:
        return set()


def save_phase(source: Source) -> int:
    """0 to 2: weights, plain files, and what readers look at first."""
    if source.header is not None:
        return 0
    return 2 if source.path == "config.json" or source.path.endswith(WEIGHT_INDEX_SUFFIX) else 1


def _block_bytes(chunk_bytes: int) -> int:
    """Whole chunks of the source, so that each is read once, unless a disk could not take such blocks."""
    whole = max(1, _BLOCK_BYTES // chunk_bytes) * chunk_bytes
    return whole if whole % 4096 == 0 or whole > _BLOCK_BYTES else _BLOCK_BYTES


def _is_weight(path: str) -> bool:
    """What a reader of the directory would take for part of the model's weights."""
    return "/" not in path and path.endswith((".safetensors", WEIGHT_INDEX_SUFFIX))


def is_ours_to_remove(path: str, rank: int | None, world_size: int) -> bool:
    """Whether a file of an older model goes when this one is saved."""
    if rank is None:
        return _is_weight(path)
    # Other ranks write here at the same time: only what is named after this rank, or after one
    # that no longer exists.
    owner = rank_of_path(path)
    return owner is not None and (owner == rank or (rank == 0 and owner >= world_size))


class _Writer:
    """Writes lists of files with threads that each own one block of memory."""

    def __init__(self, connector: FileConnector, block_bytes: int, tick: Callable[[int, int], None]) -> None:
        self._connector = connector
        self._block_bytes = block_bytes
        self._tick = tick
        self._lock = threading.Lock()
        self._bytes_done = 0  # Guarded by _lock, as is the next.
        self._files_done = 0

    def write(self, sources: Sequence[Source], threads: int) -> None:
        pending = iter(sources)

        def work(stop: threading.Event) -> None:
            buffer = memoryview(_core.HostArena(self._block_bytes))
            while not stop.is_set():
                with self._lock:
                    source = next(pending, None)
                if source is None:
                    return
                blocks = self._blocks(source, buffer, stop)
                self._connector.write(source.path, source.size, blocks)
                source.close()
                with self._lock:
                    self._files_done += 1

        if sources:
            run_in_threads(
                work,
                min(threads, len(sources)),
                tick=lambda: self._tick(self._bytes_done, self._files_done),
                name="rdmaload-save",
            )

    def _blocks(self, source: Source, buffer: memoryview, stop: threading.Event) -> Iterator[memoryview]:
        offset = 0
        while offset < source.size:
            if stop.is_set():
                raise _Stopped
            view = buffer[: min(len(buffer), source.size - offset)]
            count = source.read_into(offset, view)
            if count != len(view):
                raise IntegrityError(
                    f"{source.path} ends at byte {offset + count} of {source.size}: it was cut "
                    "while it was saved; save again.",
                    url=self._connector.url,
                )
            yield view
            offset += count
            with self._lock:
                self._bytes_done += count
        # Raised before the connector makes the file visible.
        source.check_unchanged()


class _Stopped(Exception):
    """Another thread failed; never seen by callers, as the first error wins."""

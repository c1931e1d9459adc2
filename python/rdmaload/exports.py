"""Directories that the weight server gives out as models, without a save: what format 1 says of them.

The manifest and the index are made here and kept by the server; the chunks are ranges of the files. The generation
follows from the content, so that it stays when nothing changed and servers agree about it. Until a model's checksums
are known it is given out under another generation, that follows from names, sizes and times, and whose manifest says
that they are pending. That one stays for those who have opened it, as any replaced generation: `prune` may remove it.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rdmaload._core import WeightStore
from rdmaload.connectors.connector import MODELS_KEY
from rdmaload.connectors.local import LocalConnector
from rdmaload.errors import NotFoundError, RdmaloadError, UrlError
from rdmaload.export_checksums import ChecksumCache, FileChecksums
from rdmaload.index import DEFAULT_CHUNK_BYTES, PENDING, Index, IndexFile, chunk_key, index_key
from rdmaload.manifest import Manifest, generation_manifest_key, manifest_key, utc_now
from rdmaload.publish import superseded_key
from rdmaload.sources import SourceModel, directory_model
from rdmaload.stats import Progress
from rdmaload.urls import parse_url

__all__ = ["BackgroundChecksums", "DirectoryExport", "Export", "export_directories", "model_directories"]

_WRITER = "rdmaload serve"


@dataclass(frozen=True)
class Export:
    """A model that is given out."""

    model: str
    files: int
    bytes: int
    generation: str
    cached_bytes: int
    """Of files whose checksums were known already."""
    checksums: str
    """"crc32c", or "pending" while they are not known."""


def model_directories(root: Path) -> list[tuple[str, Path]]:
    """The models below `root`: each sub-directory that holds weights, by its name, in order.

    Raises NotFoundError when there is no such directory or no model in it.
    """
    if not root.is_dir():
        raise NotFoundError(f"no directory {root}: --models wants the directory that models are in", key=str(root))
    found = [
        (entry.name, entry)
        for entry in sorted(root.iterdir())
        if entry.is_dir() and not entry.name.startswith(".") and any(entry.rglob("*.safetensors"))
    ]
    if not found:
        raise NotFoundError(
            f"{root} has no sub-directory with *.safetensors files: each model is a directory in it", key=str(root)
        )
    return found


def export_directories(
    store: WeightStore,
    models: Sequence[tuple[str, Path]],
    *,
    cache: Path,
    threads: int = 2,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    wait_checksums: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[DirectoryExport]:
    """Give out each directory as the model of that name; `progress` is called while checksums are computed.

    Without `wait_checksums` models whose checksums the cache lacks are `pending`, for BackgroundChecksums.

    Raises FormatError for a file that is no weight file although it is named so, IntegrityError when a file
    changes meanwhile, UrlError for a directory whose name cannot be a model's.
    """
    for model, directory in models:
        try:
            parse_url(f"redis://localhost/{model}")
        except UrlError as err:
            raise UrlError(f"{directory}: its name cannot be a model's: {err}", url=str(directory)) from err
        export = DirectoryExport(store, model, directory, ChecksumCache(cache), chunk_bytes)
        if export.pending and wait_checksums:
            export.compute(threads, progress)
        else:
            export.publish()
        yield export


class DirectoryExport:
    """One directory as a model: found when this is made, there for readers from `publish` or `compute` on.

    One thread at a time; `description` says what has been published last.
    """

    def __init__(self, store: WeightStore, model: str, directory: Path, cache: ChecksumCache, chunk_bytes: int) -> None:
        self.model = model
        self._store = store
        self._directory = directory.absolute()
        self._chunk_bytes = chunk_bytes
        with LocalConnector(parse_url(str(self._directory))) as connector:
            self._source: SourceModel = directory_model(connector, connector.root, rank=None, world_size=None)
        try:
            self._source.check_weights()
            self._times = [os.stat(self._directory / file.path).st_mtime_ns for file in self._source.files]
            self._checksums = FileChecksums(self._source.files, chunk_bytes, cache)
        finally:
            self._source.close()
        self._files = [
            IndexFile(file.path, file.size, number, file.rank, file.header, file.tied)
            for number, file in enumerate(self._source.files)
        ]
        self.description: Export | None = None

    @property
    def pending(self) -> bool:
        """Some checksums are not known."""
        return not self._checksums.complete

    def compute(self, threads: int, progress: Callable[[Progress], None] | None = None) -> None:
        """Compute the checksums that are missing, and publish with them. `progress` may raise, which ends it."""
        try:
            self._checksums.compute(threads, progress)
            self._source.check_unchanged()
        finally:
            self._source.close()
        self.publish()

    def publish(self) -> None:
        """Give the model out with the checksums that are known: all of them, or none."""
        before = self.description
        index = Index.of(
            self._files,
            chunk_bytes=self._chunk_bytes,
            crcs=b"" if self.pending else self._checksums.joined(),
            checksums_pending=self.pending,
        )
        encoded = index.encode()
        content = hashlib.sha256(encoded)
        if self.pending:
            # Only what else tells one content from another: ranks that read from two servers must not mix two.
            content.update(repr(self._times).encode())
        # Otherwise not of the times: a server that starts again, or one that has a copy, gives the same.
        generation = content.hexdigest()[:32]
        manifest = Manifest.of(
            encoded,
            generation=generation,
            files=len(self._files),
            bytes=index.total_bytes,
            writer=_WRITER,
            kind=self._source.kind,
            world_size=self._source.world_size,
            checksums=PENDING if self.pending else None,
        ).encode()
        self._publish_chunks(generation, None if before is None else before.generation)
        self._store.export_value(index_key(self.model, generation), encoded)
        self._store.export_value(generation_manifest_key(self.model, generation), manifest)
        self._store.export_value(manifest_key(self.model), manifest)
        self._store.add_name(MODELS_KEY, self.model)
        self.description = Export(
            self.model,
            len(self._files),
            index.total_bytes,
            generation,
            self._checksums.cached_bytes,
            PENDING if self.pending else "crc32c",
        )
        if before is not None:
            self._retire(before.generation)

    def _publish_chunks(self, generation: str, before: str | None) -> None:
        for file, mtime_ns in zip(self._files, self._times, strict=True):
            prefix = self._chunk_prefix(generation, file)
            if before is not None:
                # What is open stays open: the very content that goes out under the other generation.
                self._store.export_copies(
                    prefix=self._chunk_prefix(before, file), to=prefix, count=file.chunk_count(self._chunk_bytes)
                )
                continue
            # Refused unless it is still what was read.
            self._store.export_file(
                prefix=prefix,
                path=str(self._directory / file.path),
                size=file.size,
                mtime_ns=mtime_ns,
                chunk_bytes=self._chunk_bytes,
            )

    def _chunk_prefix(self, generation: str, file: IndexFile) -> str:
        return chunk_key(self.model, generation, file.number, 0).removesuffix("0")

    def _retire(self, generation: str) -> None:
        """Leave a replaced generation to `prune`, as if a save had replaced it."""
        self._store.set_value(superseded_key(self.model, generation), utc_now().encode())
        self._store.unlock([index_key(self.model, generation), generation_manifest_key(self.model, generation)])
        for file in self._files:
            prefix = self._chunk_prefix(generation, file)
            self._store.unlock([f"{prefix}{chunk}" for chunk in range(file.chunk_count(self._chunk_bytes))])


class _StopComputingError(Exception):
    """Raised inside `compute` when the server ends."""


class BackgroundChecksums:
    """Computes the checksums of pending exports in a thread, one model after the other; a context manager.

    `say` gets a line per model, from that thread. A model whose files changed stays pending.
    """

    def __init__(self, exports: Sequence[DirectoryExport], threads: int, say: Callable[[str], None]) -> None:
        self._exports = [export for export in exports if export.pending]
        self._threads = threads
        self._say = say
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rdmaload-checksums", daemon=True)

    def __enter__(self) -> BackgroundChecksums:
        if self._exports:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        def tick(_: Progress) -> None:
            if self._stopped.is_set():
                raise _StopComputingError

        for export in self._exports:
            try:
                export.compute(self._threads, tick)
            except _StopComputingError:
                return
            except (RdmaloadError, OSError) as err:
                self._say(f"{export.model} has no checksums, so that clients cannot verify it: {err}")
            else:
                self._say(f"{export.model} has checksums now: clients that open it from here on verify it")

"""Directories that the weight server gives out as models, without a save: what format 1 says of them.

The manifest and the index are made here and kept by the server; the chunks are ranges of the files. A checksum is
computed once per file and kept in a cache directory by what changes whenever a file does: device, inode, size and
times. The generation follows from the content, so that it stays when nothing changed and servers agree about it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rdmaload._core import WeightStore, crc32c
from rdmaload.connectors.connector import MODELS_KEY
from rdmaload.connectors.local import LocalConnector
from rdmaload.errors import IntegrityError, NotFoundError, UrlError
from rdmaload.index import DEFAULT_CHUNK_BYTES, Index, IndexFile, chunk_key, index_key
from rdmaload.manifest import Manifest, generation_manifest_key, manifest_key
from rdmaload.sources import Source, directory_model
from rdmaload.stats import Progress
from rdmaload.threads import run_in_threads
from rdmaload.urls import parse_url

__all__ = ["Export", "cache_directory", "export_directories", "model_directories"]

_CACHE_VERSION = 1
_WRITER = "rdmaload serve"
_U32_BYTES = 4


@dataclass(frozen=True)
class Export:
    """A model that is given out."""

    model: str
    files: int
    bytes: int
    generation: str
    cached_bytes: int
    """Of files whose checksums were known already."""


def cache_directory() -> Path:
    """Where checksums are kept: `$XDG_CACHE_HOME/rdmaload/checksums`, or below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdmaload" / "checksums"


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
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[Export]:
    """Give out each directory as the model of that name; `progress` is called while checksums are computed.

    Raises FormatError for a file that is no weight file although it is named so, IntegrityError when a file
    changes meanwhile, UrlError for a directory whose name cannot be a model's.
    """
    for model, directory in models:
        try:
            parse_url(f"redis://localhost/{model}")
        except UrlError as err:
            raise UrlError(f"{directory}: its name cannot be a model's: {err}", url=str(directory)) from err
        yield _export(store, model, directory, _Cache(cache), threads, chunk_bytes, progress)


def _export(
    store: WeightStore,
    model: str,
    directory: Path,
    cache: _Cache,
    threads: int,
    chunk_bytes: int,
    progress: Callable[[Progress], None] | None,
) -> Export:
    with LocalConnector(parse_url(str(directory.absolute()))) as connector:
        source = directory_model(connector, connector.root, rank=None, world_size=None)
        try:
            source.check_weights()
            times = {file.path: os.stat(connector.root / file.path).st_mtime_ns for file in source.files}
            checksums = _Checksums(source.files, chunk_bytes, cache)
            checksums.compute(threads, progress)
            source.check_unchanged()
        finally:
            source.close()
    files = [
        IndexFile(file.path, file.size, number, file.rank, file.header, file.tied)
        for number, file in enumerate(source.files)
    ]
    index = Index.of(files, chunk_bytes=chunk_bytes, crcs=checksums.joined())
    encoded = index.encode()
    # Of the content and its names, not of their times: a server that starts again gives the same.
    generation = hashlib.sha256(encoded).hexdigest()[:32]
    manifest = Manifest.of(
        encoded,
        generation=generation,
        files=len(files),
        bytes=index.total_bytes,
        writer=_WRITER,
        kind=source.kind,
        world_size=source.world_size,
    )
    for file in files:
        # Refused unless it is still what was read.
        store.export_file(
            prefix=chunk_key(model, generation, file.number, 0).removesuffix("0"),
            path=str(directory.absolute() / file.path),
            size=file.size,
            mtime_ns=times[file.path],
            chunk_bytes=chunk_bytes,
        )
    store.export_value(index_key(model, generation), encoded)
    store.export_value(generation_manifest_key(model, generation), manifest.encode())
    store.export_value(manifest_key(model), manifest.encode())
    store.add_name(MODELS_KEY, model)
    return Export(model, len(files), index.total_bytes, generation, checksums.cached_bytes)


class _Checksums:
    """The chunk checksums of the files of one model, computed in threads or found in the cache."""

    def __init__(self, files: Sequence[Source], chunk_bytes: int, cache: _Cache) -> None:
        self._files = files
        self._chunk_bytes = chunk_bytes
        self._cache = cache
        self._lock = threading.Lock()
        self._next = 0  # Guarded by _lock, as is what follows.
        self._done = 0
        self._found: list[bytes] = [b""] * len(files)
        self.cached_bytes = 0

    def compute(self, threads: int, progress: Callable[[Progress], None] | None) -> None:
        started = time.perf_counter()
        total = sum(file.size for file in self._files)

        def tick() -> None:
            if progress is not None:
                seconds = time.perf_counter() - started
                progress(Progress("export", self._done, total, self._next, len(self._files), seconds))

        run_in_threads(self._work, threads, tick=tick)
        tick()

    def joined(self) -> bytes:
        return b"".join(self._found)

    def _work(self, stop: threading.Event) -> None:
        buffer = memoryview(bytearray(self._chunk_bytes))
        while not stop.is_set():
            with self._lock:
                position = self._next
                self._next += 1
            if position >= len(self._files):
                return
            file = self._files[position]
            known = self._cache.get(file, self._chunk_bytes)
            if known is None:
                known = self._read(file, buffer, stop)
                if stop.is_set():
                    return
                self._cache.put(file, self._chunk_bytes, known)
            else:
                with self._lock:
                    self._done += file.size
                    self.cached_bytes += file.size
            self._found[position] = known

    def _read(self, file: Source, buffer: memoryview, stop: threading.Event) -> bytes:
        crcs = bytearray()
        for offset in range(0, file.size, self._chunk_bytes):
            if stop.is_set():
                break
            part = buffer[: min(self._chunk_bytes, file.size - offset)]
            if file.read_into(offset, part) != len(part):
                raise IntegrityError(f"{file.path} became shorter while its checksums were computed", key=file.path)
            crcs += crc32c(part).to_bytes(_U32_BYTES, "little")
            with self._lock:
                self._done += len(part)
        return bytes(crcs)


class _Cache:
    """Checksums by fingerprint, one small file each. What is damaged or cannot be written is computed again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _place(self, file: Source, chunk_bytes: int) -> Path | None:
        fingerprint = file.fingerprint()
        if fingerprint is None:
            return None
        name = hashlib.sha256(f"{_CACHE_VERSION} {fingerprint} {chunk_bytes}".encode()).hexdigest()
        return self._directory / name

    def get(self, file: Source, chunk_bytes: int) -> bytes | None:
        place = self._place(file, chunk_bytes)
        chunks = -(-file.size // chunk_bytes)
        try:
            content = b"" if place is None else place.read_bytes()
        except OSError:
            return None
        crcs, own = content[:-_U32_BYTES], content[-_U32_BYTES:]
        if len(crcs) != _U32_BYTES * chunks or crc32c(crcs) != int.from_bytes(own, "little"):
            return None
        return crcs

    def put(self, file: Source, chunk_bytes: int, crcs: bytes) -> None:
        place = self._place(file, chunk_bytes)
        if place is None:
            return
        temporary = place.with_name(f"{place.name}.{secrets.token_hex(4)}.tmp")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(crcs + crc32c(crcs).to_bytes(_U32_BYTES, "little"))
            temporary.replace(place)
        except OSError:
            return  # a cache is a convenience

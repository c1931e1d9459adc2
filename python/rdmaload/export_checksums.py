"""Checksums of the files that the weight server exports: computed in threads, once per file, and kept in a cache.

The cache directory has one small file per exported file, named by what changes whenever that does: device, inode, size
and times. A copy elsewhere is computed again, which costs time; a checksum of another content would cost every load.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from rdmaload._core import crc32c
from rdmaload.errors import IntegrityError
from rdmaload.meter import Meter
from rdmaload.sources import Source
from rdmaload.stats import Progress
from rdmaload.threads import run_in_threads

__all__ = ["ChecksumCache", "FileChecksums", "cache_directory"]

_CACHE_VERSION = 1
_U32_BYTES = 4


def cache_directory() -> Path:
    """Where checksums are kept: `$XDG_CACHE_HOME/rdmaload/checksums`, or below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdmaload" / "checksums"


class FileChecksums:
    """The chunk checksums of the files of one model: what the cache knows at once, the rest by `compute`."""

    def __init__(self, files: Sequence[Source], chunk_bytes: int, cache: ChecksumCache) -> None:
        self._files = files
        self._chunk_bytes = chunk_bytes
        self._cache = cache
        self._found = [cache.get(file, chunk_bytes) for file in files]  # Each slot has one writer.
        self._missing = [position for position, known in enumerate(self._found) if known is None]
        self.cached_bytes = sum(file.size for file, known in zip(files, self._found, strict=True) if known is not None)
        self._lock = threading.Lock()
        self._next = 0  # Guarded by _lock, as is what follows.
        self._done = self.cached_bytes

    @property
    def complete(self) -> bool:
        return all(known is not None for known in self._found)

    def joined(self) -> bytes:
        """All of them, file by file, as the index has them."""
        return b"".join(known or b"" for known in self._found)

    def compute(self, threads: int, progress: Callable[[Progress], None] | None = None) -> None:
        """Compute what is missing. `progress` is called ten times a second, and ends it by raising.

        Raises IntegrityError when a file changes meanwhile.
        """
        total = sum(file.size for file in self._files)
        meter = None
        if progress is not None:
            meter = Meter("export", progress, bytes_total=total, files_total=len(self._files), stage="checksum")

        def tick() -> None:
            if meter is not None:
                meter.update(self._done, sum(known is not None for known in self._found), self.cached_bytes)

        run_in_threads(self._work, threads, tick=tick, name="rdmaload-checksums")
        if meter is not None:
            meter.finish(self.cached_bytes)

    def _work(self, stop: threading.Event) -> None:
        buffer = memoryview(bytearray(self._chunk_bytes))
        while not stop.is_set():
            with self._lock:
                turn = self._next
                self._next += 1
            if turn >= len(self._missing):
                return
            position = self._missing[turn]
            file = self._files[position]
            crcs = self._read(file, buffer, stop)
            if stop.is_set():
                return
            self._found[position] = crcs
            self._cache.put(file, self._chunk_bytes, crcs)

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
        file.check_unchanged()  # what is kept must be of one content
        return bytes(crcs)


class ChecksumCache:
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
        if chunks == 0:
            return b""
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

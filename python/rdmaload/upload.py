"""Send files to a key-value store as chunks, in parallel and resumably.

Each thread owns one buffer of a chunk's size at most, so that memory is threads times chunk_bytes whatever
the model's size. A thread that comes to a file first looks it up in the journal or claims a number
for it; the one that finishes its last chunk writes the journal.

No chunk key is ever written by two attempts, or a late one could damage what is published: a number
counts only if the save's generation is still registered after it was claimed, and whoever ends a
save removes the generation before the claims.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from rdmaload._core import crc32c
from rdmaload.connectors.connector import KeyValueConnector
from rdmaload.errors import IntegrityError
from rdmaload.index import Index, IndexFile, chunk_key
from rdmaload.journal import JournalEntry, SaveKeys
from rdmaload.sources import Source
from rdmaload.threads import run_in_threads

__all__ = ["Overtaken", "Upload"]

_U32_BYTES = 4


class Overtaken(Exception):
    """Another attempt published this save, or somebody removed it, while this one was at work."""


class _File:
    """One source file on its way: its number, its checksums, and how many chunks are missing."""

    def __init__(self, source: Source, chunk_bytes: int) -> None:
        self.source = source
        self.chunks = -(-source.size // chunk_bytes)
        self.crcs = bytearray(_U32_BYTES * self.chunks)  # Each chunk's slot has one writer.
        self.lock = threading.Lock()
        self.number: int | None = None  # Guarded by lock until the first chunk is sent.
        self.skipped = False  # Set with number.
        self.left = max(1, self.chunks)  # Guarded by the upload's lock.


class Upload:
    """The files of one rank, sent to `generation`. Use it once; counters may be read any time."""

    def __init__(
        self,
        connector: KeyValueConnector,
        keys: SaveKeys,
        generation: str,
        sources: Sequence[Source],
        *,
        chunk_bytes: int,
        rank: int | None = None,
        world_size: int = 1,
    ) -> None:
        self._connector = connector
        self._keys = keys
        self._generation = generation
        self._files = [_File(source, chunk_bytes) for source in sources]
        self._chunk_bytes = chunk_bytes
        self._buffer_bytes = min(chunk_bytes, max((source.size for source in sources), default=0))
        self._rank = rank
        # Ranks start at different numbers and advance by the world size: their claims meet only
        # when a rank was started twice.
        self._stride = world_size
        self._next_number = rank or 0  # Guarded by _lock.
        self._attempt = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._tasks = self._all_tasks()  # Guarded by _lock.
        self.bytes_done = 0
        self.skipped_bytes = 0
        self.chunks_sent = 0
        self.files_done = 0
        self.stages = {"read": 0.0, "checksum": 0.0, "send": 0.0}

    def run(
        self,
        threads: int,
        tick: Callable[[], None] | None = None,
        interrupt: Callable[[], None] | None = None,
    ) -> Index:
        """Send everything; the index of what is in the store then. See run_in_threads."""
        run_in_threads(self._work, threads, tick=tick, interrupt=interrupt, name="rdmaload-save")
        files = []
        for file in self._files:
            source = file.source
            assert file.number is not None
            files.append(IndexFile(source.path, source.size, file.number, source.rank, source.header, source.tied))
        crcs = b"".join(file.crcs for file in self._files)
        return Index.of(files, chunk_bytes=self._chunk_bytes, crcs=crcs)

    def _all_tasks(self) -> Iterator[tuple[_File, int]]:
        for file in self._files:
            for chunk in range(max(1, file.chunks)):
                yield file, chunk

    def _work(self, stop: threading.Event) -> None:
        buffer = memoryview(bytearray(self._buffer_bytes))
        spent = [0.0, 0.0, 0.0]
        try:
            while not stop.is_set():
                with self._lock:
                    task = next(self._tasks, None)
                if task is None:
                    return
                file, chunk = task
                self._begin(file)
                if file.chunks and not file.skipped:
                    self._send(file, chunk, buffer, spent)
                with self._lock:
                    file.left -= 1
                    last = file.left == 0
                if last:
                    self._finish(file)
        finally:
            with self._lock:
                for stage, seconds in zip(self.stages, spent, strict=True):
                    self.stages[stage] += seconds

    def _begin(self, file: _File) -> None:
        """Give the file its number: that of its finished predecessor, or a fresh one."""
        with file.lock:
            if file.number is not None:
                return
            entry = self._sent_before(file)
            if entry is None:
                file.number = self._claim()
                return
            file.crcs[:] = entry.crcs
            file.skipped = True
            file.number = entry.number
        with self._lock:
            # Numbers up to here were claimed by that attempt: no need to try each again.
            behind = entry.number - self._next_number
            if behind >= 0:
                self._next_number += (behind // self._stride + 1) * self._stride
            self.bytes_done += file.source.size
            self.skipped_bytes += file.source.size

    def _sent_before(self, file: _File) -> JournalEntry | None:
        source = file.source
        fingerprint = source.fingerprint()
        if fingerprint is None:
            return None
        entry = JournalEntry.decode(self._connector.get(self._journal_key(source)))
        if (
            entry is None
            or entry.path != source.path
            or entry.size != source.size
            or entry.fingerprint != fingerprint
            or entry.chunk_bytes != self._chunk_bytes
        ):
            return None
        for chunk in {0, file.chunks - 1} if file.chunks else ():
            if not self._connector.exists(self._chunk_key(entry.number, chunk)):
                return None
        return entry

    def _claim(self) -> int:
        """A file number that no other attempt of this save writes to, whoever else is at work."""
        token = secrets.token_hex(16).encode()
        while True:
            with self._lock:
                number = self._next_number
                self._next_number += self._stride
            key = self._keys.claim(self._generation, number)
            # A store that retried a lost reply finds our own token and says no.
            if self._connector.set(key, token, if_absent=True) or self._connector.get(key) == token:
                break
        if self._connector.get(self._keys.generation) != self._generation.encode():
            raise Overtaken
        return number

    def _send(self, file: _File, chunk: int, buffer: memoryview, spent: list[float]) -> None:
        offset = chunk * self._chunk_bytes
        view = buffer[: min(self._chunk_bytes, file.source.size - offset)]
        start = time.perf_counter()
        count = file.source.read_into(offset, view)
        if count != len(view):
            raise IntegrityError(
                f"{file.source.path} ends at byte {offset + count} of {file.source.size}: it was "
                "cut while it was saved. Nothing was published; save again.",
                url=self._connector.url,
            )
        read = time.perf_counter()
        crc = crc32c(view)
        checked = time.perf_counter()
        assert file.number is not None
        self._connector.set(self._chunk_key(file.number, chunk), view)
        sent = time.perf_counter()
        file.crcs[_U32_BYTES * chunk : _U32_BYTES * (chunk + 1)] = crc.to_bytes(4, "little")
        spent[0] += read - start
        spent[1] += checked - read
        spent[2] += sent - checked
        with self._lock:
            self.bytes_done += len(view)
            self.chunks_sent += 1

    def _finish(self, file: _File) -> None:
        source = file.source
        source.check_unchanged()
        source.close()
        fingerprint = source.fingerprint()
        if fingerprint is not None and not file.skipped:
            assert file.number is not None
            entry = JournalEntry(
                source.path,
                source.size,
                fingerprint,
                file.number,
                self._chunk_bytes,
                bytes(file.crcs),
            )
            self._connector.set(self._journal_key(source), entry.encode())
        with self._lock:
            self.files_done += 1

    def _journal_key(self, source: Source) -> str:
        return self._keys.journal(self._generation, self._rank, source.path)

    def _chunk_key(self, number: int, chunk: int) -> str:
        return chunk_key(self._keys.model, self._generation, number, chunk)

"""Save into an object store: plain file names, uploaded in parallel parts, and a manifest with checksums beside them.

Objects are replaced one by one, and the manifest last: who opens the model meanwhile finds the old manifest, whose
files are pinned to their versions, and gets a clear error rather than a mix. Files and parts of files that an
interrupted save of the same content has sent are not sent again: notes under `.rdmaload/saving/` say which, until the
manifest is written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from rdmaload._core import crc32c
from rdmaload.connectors.objects import ObjectConnector, Upload
from rdmaload.errors import IntegrityError, LoadTimeoutError, NotFoundError, UnavailableError
from rdmaload.file_manifest import FILE_MANIFEST, file_index_path, part_path
from rdmaload.files_save import existing_files, is_ours_to_remove, refuse_existing, save_phase
from rdmaload.index import Index, IndexFile
from rdmaload.journal import decode_part, encode_part
from rdmaload.manifest import Manifest
from rdmaload.publish import manifest_of, merge_parts
from rdmaload.sources import Source, SourceModel
from rdmaload.stats import SaveStats
from rdmaload.threads import run_in_threads

__all__ = ["DEFAULT_OBJECT_CHUNK_BYTES", "save_objects"]

_log = logging.getLogger("rdmaload")

# What is asked for at once, verified and tried again. A request to an object store costs tens of milliseconds, so
# that chunks are larger than a key-value store's.
DEFAULT_OBJECT_CHUNK_BYTES = 8 * 2**20

_U32_BYTES = 4


def save_objects(
    connector: ObjectConnector,
    model: SourceModel,
    *,
    rank: int | None,
    save_id: str | None,
    overwrite: bool,
    writer: str,
    tick: Callable[[int, int, int], None],
    publishes: Callable[[], None],
) -> SaveStats:
    """Write the files of `model`, then the manifest, then remove weight files of an older model.

    Of a sharded model each rank writes its own weight files and a part of the index; whoever sees all parts writes
    the manifest, the same one whoever that is. One of an older model is removed at the start, as it would say that
    these files are damaged. `tick` gets bytes and files done, and the bytes of them that were there already.
    """
    paths = {source.path for source in model.files}
    existing = existing_files(connector)
    if not overwrite:
        refuse_existing(connector, existing, paths, rank)
    before = connector.read_small(FILE_MANIFEST)
    part = None if rank is None else part_path(save_id or "", rank)
    if part is not None:
        connector.delete(part)  # of an attempt that this one repeats: nobody may publish from it any more
        if before is not None:
            connector.delete(FILE_MANIFEST)
            _remove_index_of(connector, before)
    chunk_bytes = connector.options.chunk_bytes or DEFAULT_OBJECT_CHUNK_BYTES
    sources = [source for source in model.files if not (rank and source.header is None and source.path in existing)]
    notes = _Notes(connector, chunk_bytes)
    uploads = _Writer(connector, notes, chunk_bytes, tick)
    for phase in range(3):
        uploads.write([source for source in sources if save_phase(source) == phase])
    model.check_unchanged()
    publishes()
    stats = SaveStats(connections=connector.options.threads, skipped_bytes=uploads.skipped_bytes)
    if part is None:
        index = uploads.index(sources)
        generation = secrets.token_hex(16)
        manifest = _manifest_of(model, index, generation, writer)
        stats.generation = _publish(connector, manifest, index)
    else:
        # Ranks number their files apart.
        index = uploads.index(sources, first=rank or 0, step=model.world_size)
        manifest = _manifest_of(model, index, "0" * 32, writer)
        connector.put(part, encode_part(manifest, index.encode()))
        stats.generation = _publish_parts(connector, save_id or "", model.world_size)
    stats.published = stats.generation is not None
    notes.remove()
    if before is not None and part is None:
        _remove_index_of(connector, before)
    for path in sorted(existing - paths):
        if is_ours_to_remove(path, rank, model.world_size):
            connector.delete(path)
    return stats


def _manifest_of(model: SourceModel, index: Index, generation: str, writer: str) -> Manifest:
    return Manifest.of(
        index.encode(),
        generation=generation,
        files=len(index.files),
        bytes=index.total_bytes,
        writer=writer,
        kind=model.kind,
        world_size=model.world_size,
        layout=model.layout,
        identity=model.identity,
    )


def _publish(connector: ObjectConnector, manifest: Manifest, index: Index) -> str:
    connector.put(file_index_path(manifest.generation), index.encode())
    connector.put(FILE_MANIFEST, manifest.encode())
    return manifest.generation


def _publish_parts(connector: ObjectConnector, save_id: str, world_size: int) -> str | None:
    """Write the manifest of a sharded save if every rank has written its part; its generation.

    Ranks that end together all do it, and write the same bytes: the generation is a digest of the parts. They stay
    until `remove` or `prune`, for a rank that is repeated.
    """
    paths = [part_path(save_id, rank) for rank in range(world_size)]
    values = []
    for path in paths:
        value = connector.read_small(path)
        if value is None:
            return None
        values.append(value)
    generation = hashlib.sha256(b"".join(values)).hexdigest()[:32]
    parts = [decode_part(value, url=connector.url, key=path) for value, path in zip(values, paths, strict=True)]
    index, _ = merge_parts(parts, connector.url)
    like, newest = parts[0][0], max(manifest.created for manifest, _ in parts)
    manifest = replace(manifest_of(index, index.encode(), generation, like), created=newest)
    return _publish(connector, manifest, index)


def _remove_index_of(connector: ObjectConnector, manifest: bytes) -> None:
    try:
        generation = Manifest.decode(manifest).generation
    except ValueError as err:  # damaged, or of a newer release: it is replaced now
        _log.info("%s: the manifest that was replaced could not be read: %s", connector.url, err)
        return
    connector.delete(file_index_path(generation))


class _Notes:
    """Which files an interrupted save of the same content has finished, and which uploads it has begun."""

    def __init__(self, connector: ObjectConnector, chunk_bytes: int) -> None:
        self._connector = connector
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        self._written: set[str] = set()  # Guarded by _lock.

    def find(self, source: Source, etags: dict[str, str | None]) -> tuple[str, bytes] | None:
        """ETag and checksums of a file that needs not be sent again."""
        if source.fingerprint() is None:
            return None
        path = self._path(source)
        value = self._connector.read_small(path)
        if value is None:
            return None
        with self._lock:
            self._written.add(path)
        try:
            note = json.loads(value)
            etag, crcs = str(note["etag"]), bytes.fromhex(note["crcs"])
            same = note["content"] == self._content(source)
        except (ValueError, KeyError, TypeError):
            return None
        chunks = -(-source.size // self._chunk_bytes)
        if not same or etags.get(source.path) != etag or len(crcs) != _U32_BYTES * chunks:
            return None
        return etag, crcs

    def find_upload(self, source: Source, part_bytes: int) -> Upload | None:
        """The upload of a file that was cut off, to go on with."""
        if source.fingerprint() is None:
            return None
        path = self._path(source)
        value = self._connector.read_small(path)
        try:
            note = json.loads(value or b"")
            if note["content"] != self._content(source) or note["part_bytes"] != part_bytes:
                return None
            token = str(note["upload"])
        except (ValueError, KeyError, TypeError):
            return None
        with self._lock:
            self._written.add(path)
        return self._connector.resume_upload(source.path, token)

    def write_upload(self, source: Source, part_bytes: int, upload: Upload) -> None:
        """Note an upload, so that a later attempt can go on with it."""
        if source.fingerprint() is not None and upload.resume_token:
            self._put(source, {"upload": upload.resume_token, "part_bytes": part_bytes})

    def write(self, source: Source, etag: str, crcs: bytes) -> None:
        if source.fingerprint() is not None:
            self._put(source, {"etag": etag, "crcs": crcs.hex()})

    def keeps(self, source: Source, upload: Upload) -> bool:
        """Whether a later attempt will go on with this upload."""
        return source.fingerprint() is not None and bool(upload.resume_token)

    def _put(self, source: Source, said: dict[str, object]) -> None:
        path = self._path(source)
        self._connector.put(path, json.dumps({"content": self._content(source), **said}).encode())
        with self._lock:
            self._written.add(path)

    def remove(self) -> None:
        for path in sorted(self._written):
            self._connector.delete(path)

    def _content(self, source: Source) -> str:
        return f"{source.path} {source.size} {source.fingerprint()} {self._chunk_bytes}"

    @staticmethod
    def _path(source: Source) -> str:
        return f".rdmaload/saving/{hashlib.sha256(source.path.encode()).hexdigest()[:32]}"


class _File:
    """A source on its way: its upload, checksums, and how many parts are missing."""

    def __init__(self, source: Source, chunk_bytes: int, part_bytes: int) -> None:
        self.source = source
        self.part_bytes = part_bytes
        self.parts = max(1, -(-source.size // part_bytes))
        self.crcs = bytearray(_U32_BYTES * -(-source.size // chunk_bytes))  # Each part's slots have one writer.
        self.lock = threading.Lock()
        self.begun = False  # Guarded by lock, as are upload and skipped until the first part is sent.
        self.upload: Upload | None = None
        self.skipped = False
        self.etag = ""
        self.left = self.parts  # Guarded by lock.


class _Writer:
    """Sends lists of files; threads take the next part of any file."""

    def __init__(
        self, connector: ObjectConnector, notes: _Notes, chunk_bytes: int, tick: Callable[[int, int, int], None]
    ) -> None:
        self._connector = connector
        self._notes = notes
        self._chunk_bytes = chunk_bytes
        self._tick = tick
        self._etags: dict[str, str | None] | None = None
        self._lock = threading.Lock()
        self._done: dict[str, _File] = {}  # Guarded by _lock, as are the next three.
        self._bytes_done = 0
        self._files_done = 0
        self.skipped_bytes = 0

    def index(self, sources: Sequence[Source], *, first: int = 0, step: int = 1) -> Index:
        """What is in the store now; files are numbered from `first` by `step`."""
        files = []
        crcs = []
        for number, source in enumerate(sorted(sources, key=lambda source: source.path)):
            done = self._done[source.path]
            files.append(
                IndexFile(
                    source.path,
                    source.size,
                    first + number * step,
                    source.rank,
                    source.header,
                    source.tied,
                    etag=done.etag or None,
                )
            )
            crcs.append(bytes(done.crcs))
        return Index.of(files, chunk_bytes=self._chunk_bytes, crcs=b"".join(crcs))

    def write(self, sources: Sequence[Source]) -> None:
        if not sources:
            return
        if self._etags is None:
            self._etags = _etags_of(self._connector)
        files = [
            _File(source, self._chunk_bytes, self._connector.part_bytes(source.size, self._chunk_bytes))
            for source in sources
        ]
        tasks = self._tasks(files)

        def work(stop: threading.Event) -> None:
            while not stop.is_set():
                with self._lock:
                    task = next(tasks, None)
                if task is None:
                    return
                self._send(*task)

        count = min(self._connector.options.threads, sum(file.parts for file in files))
        try:
            run_in_threads(
                work,
                count,
                tick=lambda: self._tick(self._bytes_done, self._files_done, self.skipped_bytes),
                name="rdmaload-save",
            )
        except BaseException as failure:
            # Only what another attempt can go on with stays: `prune` removes it when none comes.
            passes = isinstance(failure, (UnavailableError, LoadTimeoutError, KeyboardInterrupt))
            for file in files:
                if file.upload is not None and not (passes and self._notes.keeps(file.source, file.upload)):
                    file.upload.abort()
            raise

    @staticmethod
    def _tasks(files: Sequence[_File]) -> Iterator[tuple[_File, int]]:
        for file in files:
            for part in range(file.parts):
                yield file, part

    def _send(self, file: _File, part: int) -> None:
        self._begin(file)
        source = file.source
        data = bytearray(0 if file.skipped else min(file.part_bytes, source.size - part * file.part_bytes))
        if not file.skipped:
            try:
                self._read(file, part * file.part_bytes, data)
                if file.upload is not None and not file.upload.send(part + 1, data):
                    with self._lock:
                        self.skipped_bytes += len(data)
            except BaseException:
                if file.upload is not None:
                    file.upload.interrupt()
                raise
        with file.lock:
            file.left -= 1
            last = file.left == 0
        with self._lock:
            self._bytes_done += len(data)
        if last:
            self._finish(file, data)

    def _begin(self, file: _File) -> None:
        source = file.source
        with file.lock:
            if file.begun:
                return
            file.begun = True
            found = self._notes.find(source, self._etags or {})
            if found is not None:
                file.etag, crcs = found
                file.crcs[:] = crcs
                file.skipped = True
                with self._lock:
                    self._bytes_done += source.size
                    self.skipped_bytes += source.size
            elif file.parts > 1:
                file.upload = self._notes.find_upload(source, file.part_bytes)
                if file.upload is None:
                    file.upload = self._connector.begin_upload(source.path)
                    self._notes.write_upload(source, file.part_bytes, file.upload)

    def _read(self, file: _File, offset: int, data: bytearray) -> None:
        source, view = file.source, memoryview(data)
        count = source.read_into(offset, view)
        if count != len(view):
            raise IntegrityError(
                f"{source.path} ends at byte {offset + count} of {source.size}: it was cut while it was saved; "
                "save again.",
                url=self._connector.url,
            )
        for at in range(0, len(view), self._chunk_bytes):
            slot = _U32_BYTES * ((offset + at) // self._chunk_bytes)
            crc = crc32c(view[at : at + self._chunk_bytes])
            file.crcs[slot : slot + _U32_BYTES] = crc.to_bytes(_U32_BYTES, "little")

    def _finish(self, file: _File, data: bytearray) -> None:
        source = file.source
        source.check_unchanged()
        if not file.skipped:
            # One part: the whole file in one request.
            file.etag = file.upload.finish() if file.upload is not None else self._connector.put(source.path, data)
            file.upload = None
            self._notes.write(source, file.etag, bytes(file.crcs))
        source.close()
        with self._lock:
            self._done[source.path] = file
            self._files_done += 1


def _etags_of(connector: ObjectConnector) -> dict[str, str | None]:
    try:
        return {info.path: info.etag for info in connector.list_files()}
    except NotFoundError:
        return {}

"""What a save reads: every kind of source, seen as files that can be read by range.

A directory, another model in any store, and a state dict (see state_dict.py) all become a
`SourceModel`: a list of `Source` files and what the manifest says of them. A source owns its file
descriptor or connector until `close()`; `read_into` may be called from any thread.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from rdmaload._core import TensorIndex, crc32c
from rdmaload.connectors.connector import Connector, FileConnector, KeyValueConnector
from rdmaload.connectors.local import LocalConnector
from rdmaload.errors import (
    FormatError,
    IntegrityError,
    LayoutMismatchError,
    NotFoundError,
    RdmaloadError,
    StaleGenerationError,
)
from rdmaload.file_manifest import resolve_files
from rdmaload.generations import resolve_any
from rdmaload.index import Index, IndexFile, chunk_key, index_key, index_of_files
from rdmaload.manifest import Manifest, manifest_key
from rdmaload.urls import parse_url
from rdmaload.weights import WEIGHT_INDEX_SUFFIX, has_weight_suffix

__all__ = [
    "BytesSource",
    "Source",
    "SourceModel",
    "directory_model",
    "plain_files",
    "rank_of_path",
    "read_index",
    "read_manifest",
    "stored_model",
]

_NOTHING: Mapping[str, str] = MappingProxyType({})
# The names that engines give to the files of one rank of a sharded model.
_RANK_FILE = re.compile(r"model-rank-(\d{1,9})-part-\d+\.safetensors")


class Source(ABC):
    """One file to save: `path`, `size` in bytes, the raw safetensors `header` (None for other
    files), the `rank` that it belongs to and its `tied` names {alias: name}."""

    def __init__(
        self,
        path: str,
        size: int,
        *,
        header: bytes | None = None,
        rank: int | None = None,
        tied: Mapping[str, str] = _NOTHING,
    ) -> None:
        self.path = path
        self.size = size
        self.header = header
        self.rank = rank
        self.tied = tied

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset`; the count is short only at the end of the file."""

    def fingerprint(self) -> str | None:
        """What names this content, so that an interrupted save finds it again; None when nothing
        does, and the file is then always sent anew."""
        return None

    def check_unchanged(self) -> None:  # noqa: B027 - most sources cannot change
        """Raise IntegrityError when the content is no longer what it was when the save began."""

    def close(self) -> None:  # noqa: B027 - most sources hold nothing
        """Give the file descriptor back; a later read opens it again."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, {self.size} bytes)"


class BytesSource(Source):
    """A small file that exists only in memory."""

    def __init__(self, path: str, data: bytes, *, rank: int | None = None) -> None:
        super().__init__(path, len(data), rank=rank)
        self._data = memoryview(data)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        part = self._data[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)


@dataclass
class SourceModel:
    """The files of one model to save and what its manifest will say of them."""

    files: list[Source]
    kind: str = "checkpoint"
    world_size: int = 1
    layout: Mapping[str, int] = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)
    # The size of the chunks that the source is stored in: copying in the same size reads each once.
    chunk_bytes: int | None = None
    # Names the exact content, where the source can; None for what cannot be recognised again.
    content_id: str | None = None
    on_close: Callable[[], None] | None = None

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    def check_weights(self) -> None:
        """Raise FormatError for a weight file that does not fit its header (a truncated one, say)
        and for a tensor that two files of one rank have: no reader could load that model."""
        indexes: dict[int | None, TensorIndex] = {}
        owners: dict[int | None, list[str]] = {}  # the path of each tensor
        for position, file in enumerate(self.files):
            if file.header is None:
                continue
            index = indexes.setdefault(file.rank, TensorIndex())
            before = len(index)
            index.add_file(position, file.path, file.size, file.header)
            owners.setdefault(file.rank, []).extend([file.path] * (len(index) - before))
        for rank, index in indexes.items():
            seen: dict[str, str] = {}
            for tensor, path in zip(index.tensors(), owners[rank], strict=True):
                other = seen.setdefault(tensor[0], path)
                if other is not path:
                    raise FormatError(
                        f"tensor {tensor[0]} is in {other} and in {path}: nothing was saved. Leave one of the "
                        "files out of the source.",
                        key=path,
                    )

    def check_unchanged(self) -> None:
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        for file in self.files:
            file.close()
        if self.on_close is not None:
            self.on_close()


def rank_of_path(path: str) -> int | None:
    """The rank in a name such as `model-rank-3-part-0.safetensors`, else None."""
    match = _RANK_FILE.fullmatch(path)
    return int(match[1]) if match else None


# ---- a local directory -------------------------------------------------------------------------


class _DirectoryFile(Source):
    """A file of a local directory, read by pread from one descriptor that all threads share."""

    def __init__(self, location: str, file: IndexFile, rank: int | None, fingerprint: str) -> None:
        super().__init__(file.path, file.size, header=file.header, rank=rank, tied=file.tied)
        self._location = location
        self._fingerprint = fingerprint
        self._descriptor = -1  # Guarded by _lock; closed only when no read is under way.
        self._lock = threading.Lock()

    def read_into(self, offset: int, buffer: memoryview) -> int:
        descriptor = self._open()
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def _open(self) -> int:
        with self._lock:
            if self._descriptor < 0:
                try:
                    self._descriptor = os.open(self._location, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError as err:
                    raise self._changed("is gone") from err
                if _fingerprint(os.fstat(self._descriptor)) != self._fingerprint:
                    raise self._changed("changed")
            return self._descriptor

    def fingerprint(self) -> str | None:
        return self._fingerprint

    def check_unchanged(self) -> None:
        # The name and the open file: a replaced file keeps its old content under our descriptor.
        try:
            now = _fingerprint(os.stat(self._location))
        except FileNotFoundError as err:
            raise self._changed("is gone") from err
        if now != self._fingerprint:
            raise self._changed("changed")

    def _changed(self, what: str) -> IntegrityError:
        return IntegrityError(
            f"{self._location} {what} while it was being saved; nothing was published. "
            "Save again when the directory is complete.",
            url=self._location,
        )

    def close(self) -> None:
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1


def _fingerprint(status: os.stat_result) -> str:
    """What changes whenever a file is written, replaced or moved into place."""
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def directory_model(connector: LocalConnector, root: Path, *, rank: int | None, world_size: int | None) -> SourceModel:
    """The files below `root`. With a rank, files that are named after another rank are left out,
    so that the ranks of one sharded model may share a directory."""
    fingerprints = {info.path: _fingerprint(os.stat(root / info.path)) for info in connector.list_files()}
    index = index_of_files(connector)
    files: list[Source] = []
    for file in index.files:
        named = rank_of_path(file.path)
        if rank is not None and named is not None and named != rank:
            continue
        fingerprint = fingerprints.get(file.path)
        if fingerprint is None:
            raise IntegrityError(
                f"{root} changed while its files were listed ({file.path} is new); save again.",
                url=str(root),
            )
        owner = rank if rank is not None and file.header is not None else file.rank
        files.append(_DirectoryFile(str(root / file.path), file, owner, fingerprint))
    if not files:
        raise NotFoundError(f"{root} holds no files to save.", url=str(root))
    digest = hashlib.sha256(_host_id())
    for source in files:
        digest.update(f"{source.path}\0{source.fingerprint()}\0".encode())
    kind, size = _kind_of(files, str(root)) if rank is None else ("sharded", world_size or 1)
    return SourceModel(files, kind, size, content_id=digest.hexdigest())


def plain_files(root: Path, *, but: Collection[str] = ()) -> list[Source]:
    """The files below `root` that hold no weights in any format, without those whose paths are in `but`."""
    with LocalConnector(parse_url(root.absolute())) as connector:
        paths = [info.path for info in connector.list_files()]
    return [
        _DirectoryFile(str(root / path), IndexFile(path, status.st_size), None, _fingerprint(status))
        for path in sorted(paths)
        if path not in but and not has_weight_suffix(path) and not path.endswith(WEIGHT_INDEX_SUFFIX)
        for status in [os.stat(root / path)]
    ]


def _kind_of(files: list[Source], url: str) -> tuple[str, int]:
    """Kind and world size by the names of the weight files: all of them are shards, or none is."""
    ranks = {file.rank for file in files if file.rank is not None}
    if not ranks:
        return "checkpoint", 1
    missing = sorted(set(range(len(ranks))) - ranks)
    if missing:
        raise LayoutMismatchError(
            f"{url} holds shards of ranks {sorted(ranks)[:8]} but none of rank {missing[0]}: "
            "save each rank with rank= and world_size=, or complete the directory.",
            url=url,
        )
    return "sharded", len(ranks)


def _host_id() -> bytes:
    """Names this machine: device and inode numbers mean nothing on another one."""
    try:
        return Path("/etc/machine-id").read_bytes().strip() or os.uname().nodename.encode()
    except OSError:
        return os.uname().nodename.encode()


# ---- a model in another store ------------------------------------------------------------------


def stored_model(connector: Connector) -> SourceModel:
    """A model in any store. From a key-value store the generation is pinned and every chunk is
    verified against the source's index, as from a file store with a manifest; other files are copied
    as they are."""
    if isinstance(connector, KeyValueConnector):
        return _key_value_model(connector)
    if isinstance(connector, FileConnector):
        manifest, index = resolve_files(connector)
        if manifest is not None:
            model = _PinnedFiles(connector, manifest.generation, index)
            return SourceModel(
                [_ChunkedFile(model, file) for file in index.files],
                kind=manifest.kind,
                world_size=manifest.world_size,
                layout=manifest.layout,
                identity=manifest.identity,
            )
        files: list[Source] = [_StoredFile(connector, file, file.etag) for file in index.files]
        kind, world_size = _kind_of(files, connector.url)
        return SourceModel(files, kind, world_size)
    raise TypeError(f"{connector!r} is neither a key-value nor a file connector")


class _StoredFile(Source):
    """A file of any FileConnector."""

    def __init__(self, connector: FileConnector, file: IndexFile, etag: str | None) -> None:
        super().__init__(file.path, file.size, header=file.header, rank=file.rank, tied=file.tied)
        self._connector = connector
        self._etag = etag

    def read_into(self, offset: int, buffer: memoryview) -> int:
        return self._connector.read_into(self.path, offset, buffer)

    def fingerprint(self) -> str | None:
        return self._etag or None


class _Scratch(threading.local):
    """The source chunk that a thread read last, for copies into chunks of another size."""

    key: str | None = None
    buffer: bytearray = bytearray()


class _ChunkedFile(Source):
    """A file of a model with an index, read by chunks, each verified against it."""

    def __init__(self, model: _PinnedModel | _PinnedFiles, file: IndexFile) -> None:
        super().__init__(file.path, file.size, header=file.header, rank=file.rank, tied=file.tied)
        self._model = model
        self._file = file

    def read_into(self, offset: int, buffer: memoryview) -> int:
        chunk_bytes = self._model.chunk_bytes
        total = max(0, min(len(buffer), self.size - offset))
        done = 0
        while done < total:
            chunk, skip = divmod(offset + done, chunk_bytes)
            length = min(chunk_bytes, self.size - chunk * chunk_bytes)
            part = min(length - skip, total - done)
            if part == length:
                self._model.read(self._file, chunk, buffer[done : done + part])
            else:
                held = self._held(chunk, length)
                buffer[done : done + part] = held[skip : skip + part]
            done += part
        return total

    def _held(self, chunk: int, length: int) -> memoryview:
        if isinstance(self._model, _PinnedFiles):
            return self._model.held(self._file, chunk)
        scratch = self._model.scratch
        key = self._model.key(self._file, chunk)
        if len(scratch.buffer) < length:
            scratch.buffer = bytearray(self._model.chunk_bytes)
            scratch.key = None
        view = memoryview(scratch.buffer)[:length]
        if scratch.key != key:
            scratch.key = None
            self._model.read(self._file, chunk, view)
            scratch.key = key
        return view

    def fingerprint(self) -> str | None:
        return f"{self._model.generation}:{self._file.number}"


class _PinnedModel:
    """One generation of a key-value model."""

    def __init__(self, connector: KeyValueConnector, generation: str, index: Index, attempts: int) -> None:
        if index.chunk_bytes is None:
            raise FormatError("the index names no chunk size", url=connector.url)
        self.connector = connector
        self.generation = generation
        self.chunk_bytes = index.chunk_bytes
        self.scratch = _Scratch()
        self._crcs = memoryview(index.crcs)
        self._attempts = attempts

    def key(self, file: IndexFile, chunk: int) -> str:
        return chunk_key(self.connector.model, self.generation, file.number, chunk)

    def read(self, file: IndexFile, chunk: int, buffer: memoryview) -> None:
        """Fill `buffer` with a whole chunk; bytes that arrive wrong are asked for again."""
        key = self.key(file, chunk)
        at = 4 * (file.first_chunk + chunk)
        # None while the server that exports the source computes its checksums: nothing to compare with.
        expected = int.from_bytes(self._crcs[at : at + 4], "little") if self._crcs else None
        for _ in range(max(1, self._attempts)):
            try:
                count = self.connector.get_into(key, buffer)
            except NotFoundError as err:
                raise self._missing(key) from err
            if count == len(buffer) and expected in (None, crc32c(buffer)):
                return
        raise IntegrityError(
            f"{key} on {self.connector.url} does not match its checksum after "
            f"{max(1, self._attempts)} reads; nothing was published. Save the source anew.",
            url=self.connector.url,
            key=key,
        )

    def _missing(self, key: str) -> RdmaloadError:
        url = self.connector.url
        now = read_manifest(self.connector)
        if now is None or now.generation != self.generation:
            return StaleGenerationError(
                f"{key} on {url} is gone: the model was replaced or removed while it was copied; copy again.",
                url=url,
                key=key,
            )
        return NotFoundError(
            f"{key} on {url} is gone although the model is still published: the store evicted it "
            "(see its maxmemory policy). Save the source model again.",
            url=url,
            key=key,
        )


class _PinnedFiles:
    """One generation of a model whose files lie in a store beside their manifest; the connector is pinned to it."""

    def __init__(self, connector: FileConnector, generation: str, index: Index) -> None:
        if index.chunk_bytes is None:
            raise FormatError("the index names no chunk size", url=connector.url)
        self.generation = generation
        self.chunk_bytes = index.chunk_bytes
        self._connector = connector
        self._index = index
        # A chunk is as long as several of a key-value store, each of which another thread asks for: they share it,
        # and the next few are on their way meanwhile. The threads end with this object.
        self._ahead = connector.options.threads
        self._pool = ThreadPoolExecutor(self._ahead, thread_name_prefix="rdmaload-copy")
        self._lock = threading.Lock()
        self._held: OrderedDict[str, Future[memoryview]] = OrderedDict()  # Guarded by _lock. Used last at the end.

    def held(self, file: IndexFile, chunk: int) -> memoryview:
        """A whole chunk, verified, in memory that is not written again."""
        with self._lock:
            for number in range(chunk, min(chunk + self._ahead, file.chunk_count(self.chunk_bytes))):
                key = self.key(file, number)
                if key not in self._held:
                    self._held[key] = self._pool.submit(self._read_new, file, number)
                self._held.move_to_end(key)
            wanted = self._held[self.key(file, chunk)]
            while len(self._held) > 3 * self._ahead:
                self._held.popitem(last=False)
        return wanted.result()

    def _read_new(self, file: IndexFile, chunk: int) -> memoryview:
        view = memoryview(bytearray(min(self.chunk_bytes, file.size - chunk * self.chunk_bytes)))
        self.read(file, chunk, view)
        return view

    def key(self, file: IndexFile, chunk: int) -> str:
        return f"{file.path} chunk {chunk}"

    def read(self, file: IndexFile, chunk: int, buffer: memoryview) -> None:
        """Fill `buffer` with a whole chunk; bytes that arrive wrong are asked for again."""
        expected = self._index.crc(file, chunk)
        attempts = max(1, self._connector.options.max_integrity_attempts)
        for _ in range(attempts):
            count = self._connector.read_into(file.path, chunk * self.chunk_bytes, buffer)
            if count == len(buffer) and crc32c(buffer) == expected:
                return
        raise IntegrityError(
            f"{self.key(file, chunk)} at {self._connector.url} does not match its checksum after {attempts} reads; "
            "nothing was published. Save the source anew.",
            url=self._connector.url,
            key=file.path,
        )


def read_manifest(connector: KeyValueConnector) -> Manifest | None:
    """The published manifest of the connector's model, or None."""
    key = manifest_key(connector.model)
    value = connector.get(key)
    return None if value is None else Manifest.decode(value, url=connector.url, key=key)


def read_index(connector: KeyValueConnector, manifest: Manifest) -> Index:
    """The index that `manifest` names, checked against it."""
    key = index_key(connector.model, manifest.generation)
    value = connector.get(key)
    if value is None:
        raise NotFoundError(
            f"{key} on {connector.url} is gone: the generation was pruned or evicted.",
            url=connector.url,
            key=key,
        )
    manifest.check_index(value, url=connector.url, key=key)
    return Index.decode(value)


def _key_value_model(connector: KeyValueConnector) -> SourceModel:
    manifest, index = resolve_any(connector)
    if manifest is None:
        from rdmaload.sglang_source import sglang_model

        return sglang_model(connector, index)
    model = _PinnedModel(connector, manifest.generation, index, connector.options.max_integrity_attempts)
    return SourceModel(
        [_ChunkedFile(model, file) for file in index.files],
        kind=manifest.kind,
        world_size=manifest.world_size,
        layout=manifest.layout,
        identity=manifest.identity,
        chunk_bytes=index.chunk_bytes,
    )

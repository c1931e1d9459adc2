"""The index of a model: files, checksums of chunks, and the headers of weight files.

One value in a key-value store holds it, so that opening a model costs two round trips, however many
files it has. The bytes (little-endian) are

    index      = magic version meta_bytes meta crcs headers
    magic      = "RDMALOAD"                  8 bytes
    version    = u32, 1
    meta_bytes = u32
    meta       = JSON, UTF-8: {"chunk_bytes":N,"files":[file,...]}
                 and "checksums":"pending" where they are not known yet
    file       = {"header_bytes":N,"number":N,"path":S,"rank":N|null,"size":N,"tied":{alias:name}}
                 "tied" is absent when empty; "etag":S beside files in an object store
    crcs       = u32 per chunk, file by file, ceil(size / chunk_bytes) of them per file; none while they are pending
    headers    = the JSON header of each file with header_bytes > 0, without its 8-byte length

The value carries no checksum of itself: the manifest holds its length and CRC32C. `decode` trusts
nothing all the same. Checksums stay one `bytes` object and headers stay unparsed, so that an index
of a million chunks decodes in milliseconds and costs no object per chunk.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn

from rdmaload.errors import FormatError, NotSupportedError
from rdmaload.threads import map_in_threads
from rdmaload.weights import MAX_WEIGHT_INDEX_BYTES, weight_files_of

if TYPE_CHECKING:
    from rdmaload.connectors.connector import FileConnector

__all__ = [
    "DEFAULT_CHUNK_BYTES",
    "PENDING",
    "Index",
    "IndexFile",
    "check_path",
    "chunk_key",
    "index_key",
    "index_of_files",
]

# A server's allocator charges a value of exactly 1 MiB for 1.26 of them; just under it, for what it
# is.
DEFAULT_CHUNK_BYTES = 2**20 - 4096

PENDING = "pending"
"""What index and manifest say of checksums that are not known yet."""

MAX_INDEX_BYTES = 512 * 2**20  # the largest value that a Redis server takes
MAX_META_BYTES = 256 * 2**20  # a million files with paths of 200 bytes
MAX_FILES = 1_000_000
MAX_SIZE_BYTES = 2**53 - 1  # what every JSON reader holds exactly
MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors itself
MAX_PATH_BYTES = 4096
MAX_RANK = 2**31 - 1

_MAGIC = b"RDMALOAD"
_VERSION = 1
_PREFIX = struct.Struct("<8sII")
_HEADER_LENGTH = struct.Struct("<Q")
# Read at once with the length in front: most headers are shorter, and a request costs more than this many bytes.
_FIRST_READ_BYTES = 64 << 10
_SHARD_NAME = re.compile(r"model-rank-(0|[1-9][0-9]{0,8})-part-[0-9]+\.safetensors", re.ASCII)

_ETAG = re.compile(r"[!-~]{1,1024}", re.ASCII)
_FILE_FIELDS = frozenset({"path", "size", "number", "rank", "header_bytes"})


def index_key(model: str, generation: str) -> str:
    """The key of a generation's index."""
    return f"{model}/chunks/{generation}/index"


def chunk_key(model: str, generation: str, number: int, chunk: int) -> str:
    """The key of one chunk: `number` is the file's, `chunk` counts from 0 within the file."""
    return f"{model}/chunks/{generation}/{number}/{chunk}"


@dataclass(frozen=True)
class IndexFile:
    """One file of a model.

    >>> IndexFile("config.json", size=2000).chunk_count(1024)
    2
    """

    path: str
    """Relative, with `/`, normalised."""
    size: int
    number: int = 0
    """The number under which a key-value store holds its chunks; unique in an index."""
    rank: int | None = None
    """The rank that a shard belongs to; None for what every rank shares."""
    header: bytes | None = None
    """The safetensors JSON header without its length; None for a file that holds no weights."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Names that are stored once under another name: alias to name."""
    first_chunk: int = 0
    """Where this file's checksums start in `Index.crcs`, counted in chunks."""
    etag: str | None = None
    """Changes when the content does, in a store of plain files that has such a thing."""

    key: str | None = None
    """The value that is the whole file, in a key-value store that keeps it so; not stored."""
    tensor: str | None = None
    """What the only tensor of such a value is called, whatever its header says; not stored."""

    def chunk_count(self, chunk_bytes: int | None) -> int:
        """How many chunks the file has; 0 when it is empty or stored whole (`chunk_bytes=None`)."""
        return -(-self.size // chunk_bytes) if chunk_bytes else 0


@dataclass(frozen=True)
class Index:
    """The files of one generation of a model, with their checksums and headers.

    >>> index = Index.of([IndexFile("a.bin", size=5, number=0)], chunk_bytes=4, crcs=bytes(8))
    >>> Index.decode(index.encode()) == index
    True
    """

    files: tuple[IndexFile, ...]
    chunk_bytes: int | None = None
    """Bytes of every chunk but a file's last; None when files are stored whole."""
    crcs: bytes = b""
    """CRC32C per chunk, u32 little-endian, file by file; empty when there are none."""
    checksums_pending: bool = False
    """Whoever gives the chunks out is still computing their checksums."""

    @classmethod
    def of(
        cls, files: Sequence[IndexFile], *, chunk_bytes: int | None, crcs: bytes = b"", checksums_pending: bool = False
    ) -> Index:
        """An index of `files` in this order, with every `first_chunk` set.

        Raises FormatError when a path, size or number breaks a rule of the format, or `crcs` has
        another length (none is right while checksums are pending).
        """
        numbered = []
        chunks = 0
        for file in files:
            numbered.append(replace(file, first_chunk=chunks))
            chunks += file.chunk_count(chunk_bytes)
        index = cls(tuple(numbered), chunk_bytes, crcs, checksums_pending)
        _check_files(index.files)
        if len(crcs) != (4 * chunks if chunk_bytes and not checksums_pending else 0):
            _refuse(f"{len(crcs)} bytes of checksums for {chunks} chunks")
        return index

    @property
    def total_bytes(self) -> int:
        """The sum of the files' sizes."""
        return sum(file.size for file in self.files)

    @property
    def total_chunks(self) -> int:
        """How many chunks the files have together."""
        return sum(file.chunk_count(self.chunk_bytes) for file in self.files)

    def weight_files(self, rank: int | None = None) -> tuple[IndexFile, ...]:
        """The files with tensors: all of them, or what `rank` has and what ranks share."""
        return tuple(
            file
            for file in self.files
            if file.header is not None and (rank is None or file.rank is None or file.rank == rank)
        )

    def crc(self, file: IndexFile, chunk: int) -> int:
        """The CRC32C of one chunk of `file`."""
        if self.checksums_pending or not 0 <= chunk < file.chunk_count(self.chunk_bytes):
            raise IndexError(f"{file.path} has no {'checksum of' if self.checksums_pending else 'chunk'} {chunk}")
        start = 4 * (file.first_chunk + chunk)
        return int.from_bytes(self.crcs[start : start + 4], "little")

    def encode(self) -> bytes:
        """The value to store. Raises FormatError when a rule or a limit of the format is broken."""
        if self.chunk_bytes is None:
            _refuse("an index of whole files has no stored form")
        _check_int(self.chunk_bytes, "chunk_bytes", 1, MAX_INDEX_BYTES)
        _check_files(self.files)
        chunks = 0
        files = []
        headers = []
        for file in self.files:
            if file.first_chunk != chunks:
                _refuse(f"the checksums of {file.path!r} start at {file.first_chunk}, not {chunks}")
            chunks += file.chunk_count(self.chunk_bytes)
            entry: dict[str, object] = {
                "path": file.path,
                "size": file.size,
                "number": file.number,
                "rank": file.rank,
                "header_bytes": 0 if file.header is None else len(file.header),
            }
            if file.tied:
                entry["tied"] = dict(file.tied)
            if file.etag is not None:
                entry["etag"] = file.etag
            files.append(entry)
            if file.header is not None:
                headers.append(file.header)
        if len(self.crcs) != (0 if self.checksums_pending else 4 * chunks):
            _refuse(f"{len(self.crcs)} bytes of checksums for {chunks} chunks")
        members: dict[str, object] = {"chunk_bytes": self.chunk_bytes, "files": files}
        if self.checksums_pending:
            members["checksums"] = PENDING
        text = json.dumps(members, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        try:
            meta = text.encode()
        except UnicodeEncodeError as err:
            raise FormatError(f"index: a tied name is not Unicode text: {err}") from err
        if len(meta) > MAX_META_BYTES:
            _refuse(f"the list of files takes {len(meta)} bytes, above the limit of {MAX_META_BYTES}")
        value = b"".join([_PREFIX.pack(_MAGIC, _VERSION, len(meta)), meta, self.crcs, *headers])
        if len(value) > MAX_INDEX_BYTES:
            _refuse(f"{len(value)} bytes, above the limit of {MAX_INDEX_BYTES}")
        return value

    @classmethod
    def decode(cls, value: bytes | bytearray | memoryview) -> Index:
        """The index that `encode` wrote.

        Raises FormatError for anything else, NotSupportedError for a version that this release does
        not read.
        """
        size = len(value) if isinstance(value, (bytes, bytearray)) else value.nbytes
        if size > MAX_INDEX_BYTES:
            _refuse(f"{size} bytes, above the limit of {MAX_INDEX_BYTES}")
        data = bytes(value)
        if size < _PREFIX.size:
            _refuse(f"{size} bytes are too short")
        magic, version, meta_bytes = _PREFIX.unpack_from(data)
        if magic != _MAGIC:
            _refuse(f"starts with {magic!r}, not {_MAGIC!r}")
        if version != _VERSION:
            raise NotSupportedError(
                f"index: version {version}, and this release reads version {_VERSION}: "
                "upgrade rdmaload, or save the model again"
            )
        if meta_bytes > MAX_META_BYTES or meta_bytes > size - _PREFIX.size:
            _refuse(f"a list of files of {meta_bytes} bytes in a value of {size}")
        at = _PREFIX.size + meta_bytes
        chunk_bytes, entries, pending = _parse_meta(data[_PREFIX.size : at])
        chunks = 0
        if not pending:
            for entry in entries:
                chunks += -(-entry.size // chunk_bytes)
        left = size - at
        if 4 * chunks > left:
            _refuse(f"{left} bytes are too few for the checksums of {chunks} chunks")
        crcs = data[at : at + 4 * chunks]
        at += 4 * chunks
        if sum(entry.header_bytes for entry in entries) != size - at:
            _refuse(f"{size - at} bytes of headers do not add up with the list of files")
        files = []
        chunks = 0
        for entry in entries:
            header = data[at : at + entry.header_bytes] if entry.header_bytes else None
            at += entry.header_bytes
            files.append(
                IndexFile(entry.path, entry.size, entry.number, entry.rank, header, entry.tied, chunks, entry.etag)
            )
            chunks += -(-entry.size // chunk_bytes)
        _check_files(files)
        return cls(tuple(files), chunk_bytes, crcs, pending)


def index_of_files(connector: FileConnector) -> Index:
    """The index of a store that keeps plain files: one listing, then each weight file's header.

    Shards (`model-rank-{r}-part-{i}.safetensors`) get their rank when every weight file is named
    so. Files are in the order of their paths. Raises FormatError when a header is cut off or too
    long, or a file is missing.
    """
    listed = sorted(connector.list_files(), key=lambda info: info.path)
    sizes = {info.path: info.size for info in listed}

    def read(path: str, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        got = connector.read_into(path, offset, memoryview(buffer))
        if got != length:
            raise FormatError(
                f"{path} at {connector.url} ends at byte {offset + got} while bytes to "
                f"{offset + length} were announced: it is cut off, or was replaced meanwhile",
                url=connector.url,
                key=path,
            )
        return bytes(buffer)

    def read_header(path: str) -> bytes:
        size = sizes[path]
        first = read(path, 0, min(size, _FIRST_READ_BYTES))
        length = _HEADER_LENGTH.unpack_from(first)[0] if size >= 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise FormatError(
                f"{path} at {connector.url} is no safetensors file: a header of {length} "
                f"bytes in a file of {size} (at most {MAX_HEADER_BYTES}); get or save it again",
                url=connector.url,
                key=path,
            )
        header = first[8 : 8 + length]
        return header if len(header) == length else header + read(path, len(first), length - len(header))

    def read_index(path: str) -> bytes:
        return read(path, 0, min(sizes[path], MAX_WEIGHT_INDEX_BYTES + 1))

    weights = weight_files_of(sizes, read_index, url=connector.url)
    read_headers = map_in_threads(read_header, weights, connector.options.threads, name="rdmaload-header")
    headers = dict(zip(weights, read_headers, strict=True))
    shards = {path: _SHARD_NAME.fullmatch(path) for path in weights}
    sharded = bool(shards) and all(shards.values())
    files = []
    for number, info in enumerate(listed):
        shard = shards.get(info.path) if sharded else None
        rank = int(shard.group(1)) if shard is not None else None
        files.append(IndexFile(info.path, info.size, number, rank, headers.get(info.path), etag=info.etag))
    return Index.of(files, chunk_bytes=None)


def check_path(path: str) -> None:
    """Raise FormatError unless `path` is relative, normalised and without a way out."""
    problem = _path_problem(path)
    if problem is not None:
        _refuse(f"path {path[:200]!r} {problem}")


def _path_problem(path: str) -> str | None:
    if not path:
        return "is empty"
    if "\0" in path:
        return "holds a NUL byte"
    if path.startswith("/"):
        return "is absolute"
    try:
        length = len(path.encode())
    except UnicodeEncodeError:
        return "is not Unicode text"
    if length > MAX_PATH_BYTES:
        return f"is longer than {MAX_PATH_BYTES} bytes"
    # Joined with slashes, a bad segment is one of these substrings: no list per path.
    padded = f"/{path}/"
    if "//" in padded or "/./" in padded or "/../" in padded:
        return 'has an empty, "." or ".." segment'
    return None


@dataclass(frozen=True)
class _Entry:
    """A file as the metadata describes it, before its header is cut out of the value."""

    path: str
    size: int
    number: int
    rank: int | None
    header_bytes: int
    tied: Mapping[str, str]
    etag: str | None


def _parse_meta(meta: bytes) -> tuple[int, list[_Entry], bool]:
    try:
        parsed = json.loads(
            meta.decode(),
            object_pairs_hook=_unique,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except (ValueError, RecursionError) as err:
        if isinstance(err, FormatError):
            raise
        raise FormatError(f"index: the list of files is not JSON: {err}") from err
    if not isinstance(parsed, dict) or parsed.keys() - {"checksums"} != {"chunk_bytes", "files"}:
        _refuse('the metadata is not an object of "chunk_bytes" and "files"')
    pending = "checksums" in parsed
    if pending and parsed["checksums"] != PENDING:
        _refuse(f'"checksums" is {str(parsed["checksums"])[:40]!r}, not {PENDING!r}')
    chunk_bytes = _check_int(parsed["chunk_bytes"], "chunk_bytes", 1, MAX_INDEX_BYTES)
    listed = parsed["files"]
    if not isinstance(listed, list) or len(listed) > MAX_FILES:
        _refuse(f'"files" is not a list of at most {MAX_FILES}')
    return chunk_bytes, [_parse_entry(entry) for entry in listed], pending


def _parse_entry(entry: object) -> _Entry:
    if not isinstance(entry, dict) or entry.keys() - {"tied", "etag"} != _FILE_FIELDS:
        _refuse("a file has fields that this version does not know, or lacks one")
    path, rank, tied = entry["path"], entry["rank"], entry.get("tied", {})
    if not isinstance(path, str):
        _refuse("a path is not text")
    if not isinstance(tied, dict) or ("tied" in entry and not tied):
        _refuse(f"the tied names of {path[:200]!r} are not an object with members")
    size = _check_int(entry["size"], "size", 0, MAX_SIZE_BYTES)
    header_bytes = _check_int(entry["header_bytes"], "header_bytes", 0, MAX_HEADER_BYTES)
    number = _check_int(entry["number"], "number", 0, MAX_SIZE_BYTES)
    if rank is not None:
        rank = _check_int(rank, "rank", 0, MAX_RANK)
    etag = entry.get("etag")
    # It becomes a header of requests.
    if "etag" in entry and not (isinstance(etag, str) and _ETAG.fullmatch(etag)):
        _refuse(f"the ETag of {path[:200]!r} does not look like one")
    return _Entry(path, size, number, rank, header_bytes, tied, etag)


def _check_files(files: Sequence[IndexFile]) -> None:
    if len(files) > MAX_FILES:
        _refuse(f"{len(files)} files, above the limit of {MAX_FILES}")
    total = 0
    for file in files:
        check_path(file.path)
        _check_int(file.size, "size", 0, MAX_SIZE_BYTES)
        _check_int(file.number, "number", 0, MAX_SIZE_BYTES)
        if file.rank is not None:
            _check_int(file.rank, "rank", 0, MAX_RANK)
        total += file.size
        if file.header is not None:
            length = len(file.header)
            if not 2 <= length <= MAX_HEADER_BYTES or length > file.size - 8:
                _refuse(f"{file.path!r}: a header of {length} bytes in a file of {file.size}")
        elif file.tied:
            _refuse(f"{file.path!r} has tied names but no header")
        for alias, name in file.tied.items():
            if not isinstance(name, str) or not isinstance(alias, str) or alias == name:
                _refuse(f"{file.path!r}: tied name {alias!r} does not stand for another name")
    if total > MAX_SIZE_BYTES:
        _refuse(f"files of {total} bytes together, above the limit of {MAX_SIZE_BYTES}")
    if len({file.number for file in files}) != len(files):
        _refuse("two files have one number")
    # NUL sorts before everything and is in no path, so what lies under "a/" follows "a" directly.
    ordered = sorted(file.path.replace("/", "\0") for file in files)
    for before, after in itertools.pairwise(ordered):
        if after == before:
            _refuse(f"path {before!r} is listed twice".replace("\\x00", "/"))
        if after.startswith(before) and after[len(before)] == "\0":
            _refuse(f"path {before!r} is a file and a directory".replace("\\x00", "/"))


def _check_int(value: object, name: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        _refuse(f"{name} is {str(value)[:40]}, not a whole number from {low} to {high}")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        _refuse("an object has one member twice")
    return members


def _no_number(text: str) -> NoReturn:
    _refuse(f"{text[:40]} is not a whole number")


def _refuse(problem: str) -> NoReturn:
    raise FormatError(f"index: {problem}")

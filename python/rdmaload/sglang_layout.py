"""The layout that SGLang writes into a key-value store: which values are a model, and what they hold.

    {model}/keys/rank_{r}/{name}     a safetensors file of one tensor, named "tensor_bytes"
    {model}/files/{base name}        a text file
    {model}/saving/sglang/rank_{r}   ours, which SGLang never looks at: "saving" or "complete", the id of a save, and,
                                     once complete, of how many ranks the model is

Nothing in it says what belongs to the model, holds a checksum or names a generation: the model is what a listing
finds. What can be noticed is looked at twice, before and after the values are read: their sizes, their headers, and
the note that our own saves leave. A value replaced by another one of the same size and header is not noticed.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from rdmaload.connectors.connector import KeyValueConnector
from rdmaload.errors import FormatError, IntegrityError, NotFoundError, UnavailableError
from rdmaload.index import DEFAULT_CHUNK_BYTES, MAX_FILES, Index, IndexFile, check_path

__all__ = [
    "RANK_KEY",
    "READ_BYTES",
    "SAVING",
    "TENSOR_NAME",
    "check_unchanged",
    "complete_mark",
    "file_key",
    "find_index",
    "find_tensor",
    "layout_keys",
    "mark_key",
    "tensor_key",
]

_log = logging.getLogger("rdmaload")

TENSOR_NAME = "tensor_bytes"
"""What every stored tensor is called in the header of its value."""

READ_BYTES = DEFAULT_CHUNK_BYTES
"""Values are read by ranges of so many bytes: a server answers these five times as fast as one large GET, for which
it fills a fresh buffer (400 MB value, redis-server 7: 4.5 GB/s by 1 MiB, 2.1 by 64 KiB, 0.8 whole)."""

SAVING = b"saving "
_COMPLETE = b"complete "

RANK_KEY = re.compile(r"keys/rank_(0|[1-9][0-9]{0,8})/(.+)", re.ASCII | re.DOTALL)
_FILE_KEY = re.compile(r"files/([^/]+)", re.DOTALL)
_OF_RANKS = re.compile(rb" of ([1-9][0-9]{0,8})\Z", re.ASCII)  # the end of a mark
_MARK_KEY = re.compile(r"saving/sglang/rank_(0|[1-9][0-9]{0,8})", re.ASCII)

_NAMED_RANKS = 8  # in the text of an error
_PEEK_KEYS = 500  # per pipeline: its replies, at most a quarter of a MiB, are held by the server until they are sent
_PEEK_BYTES = 512  # a header of one tensor takes 60 to 200
_MAX_HEADER_BYTES = 64 << 10


def tensor_key(model: str, rank: int, name: str) -> str:
    """The key of one tensor of one rank."""
    return f"{model}/keys/rank_{rank}/{name}"


def file_key(model: str, name: str) -> str:
    """The key of a file; `name` is its base name."""
    return f"{model}/files/{name}"


def mark_key(model: str, rank: int) -> str:
    """Where our saves note that they have begun to write a rank, and that they have finished."""
    return f"{model}/saving/sglang/rank_{rank}"


def complete_mark(save_id: bytes, world_size: int) -> bytes:
    """What `mark_key` holds when a rank is complete. That one rank stands for so many is written with it, as nothing
    else in the layout would say that others are missing."""
    return _COMPLETE + save_id + b" of %d" % world_size


def layout_keys(connector: KeyValueConnector) -> list[str]:
    """Every key of the model, files first and our own notes last; none unless a rank has a tensor or a note.

    Without those, files/... may belong to a model of that name.
    """
    prefix = f"{connector.model}/"
    keys = list(connector.list(prefix))
    files, tensors, marks = (
        [key for key in keys if pattern.fullmatch(key, len(prefix))] for pattern in (_FILE_KEY, RANK_KEY, _MARK_KEY)
    )
    return [*files, *tensors, *marks] if tensors or marks else []


def find_tensor(connector: KeyValueConnector) -> str | None:
    """The key of any one tensor, or None. Costs one listing."""
    prefix = f"{connector.model}/"
    return next((key for key in connector.list(f"{prefix}keys/rank_") if RANK_KEY.fullmatch(key, len(prefix))), None)


def find_index(connector: KeyValueConnector) -> Index | None:
    """The model as an index of whole values, tensors by rank and name, then files; None when there is no such model.

    Costs one listing of the store's keys and one pipelined look at the beginning of each value. Raises FormatError for
    values that are no such tensors and for missing ranks, UnavailableError while a save of ours is under way or has
    not brought all its ranks.
    """
    ranks, names, marked = _listed(connector)
    url, model = connector.url, connector.model
    marks = _marks(connector, sorted(ranks.keys() | marked))
    for rank, mark in marks.items():
        if mark is not None and not mark.startswith(_COMPLETE):
            raise UnavailableError(
                f"{url}: rank {rank} is being saved, or its save died halfway. Wait, or save it again; if SGLang has "
                f"saved it since, delete the key {mark_key(model, rank)}",
                url=url,
                key=mark_key(model, rank),
            )
    if not ranks:
        return None
    _check_world_size(connector, marks, ranks.keys())
    missing = set(range(len(ranks))) - ranks.keys()
    if missing:
        raise FormatError(
            f"{url}: SGLang's layout has ranks {', '.join(map(str, sorted(ranks)[:8]))} but none of rank "
            f"{min(missing)}: a save is under way or died. Save every rank again",
            url=url,
            key=tensor_key(model, min(missing), ""),
        )
    _log.warning(
        "%s is in SGLang's layout, which has neither checksums nor an atomic publish: what is read cannot be verified",
        url,
    )
    tensors = [(rank, name, tensor_key(model, rank, name)) for rank in sorted(ranks) for name in sorted(ranks[rank])]
    files: list[IndexFile] = []
    heads = _peek(connector, [key for _, _, key in tensors])
    for (rank, name, key), (size, head) in zip(tensors, heads, strict=True):
        mark = marks[rank]
        etag = None if mark is None else mark.decode(errors="replace")
        path = f"keys/rank_{rank}/{name}.safetensors"
        header = _header(connector, key, size, head)
        files.append(IndexFile(path, size, len(files), rank, header, etag=etag, key=key, tensor=name))
    keys = [file_key(model, name) for name in sorted(names)]
    for name, key, (size, _) in zip(sorted(names), keys, _peek(connector, keys), strict=True):
        if size == 0 and not connector.exists(key):
            raise NotFoundError(
                f"{key} at {url} was removed while the model was opened: open it again", url=url, key=key
            )
        files.append(IndexFile(name, size, len(files), key=key))
    return Index.of(files, chunk_bytes=None)


def check_unchanged(connector: KeyValueConnector, files: Iterable[IndexFile]) -> None:
    """Raise IntegrityError when a value's size, header or save is another one than when the model was opened."""
    files = [file for file in files if file.key is not None]
    marks = _marks(connector, sorted({file.rank for file in files if file.rank is not None}))
    heads = _peek(connector, [file.key or "" for file in files])
    for file, (size, head) in zip(files, heads, strict=True):
        same = size == file.size
        if file.header is not None:
            start = len(file.header).to_bytes(8, "little") + file.header[: _PEEK_BYTES - 8]
            same = same and head.startswith(start)
        if file.rank is not None:
            mark = marks[file.rank]
            same = same and file.etag == (None if mark is None else mark.decode(errors="replace"))
        if not same:
            raise IntegrityError(
                f"{connector.url}: {file.key} was changed or removed while the model was read: SGLang's layout "
                "replaces a model value by value. Open it again",
                url=connector.url,
                key=file.key,
            )


def _listed(connector: KeyValueConnector) -> tuple[dict[int, list[str]], list[str], set[int]]:
    """Names of tensors by rank, names of files, ranks with a note; keys of any other form are not ours to judge."""
    prefix = f"{connector.model}/"
    ranks: dict[int, list[str]] = {}
    files: list[str] = []
    marked: set[int] = set()
    misplaced = None
    count = 0
    for key in connector.list(prefix):
        tensor = RANK_KEY.fullmatch(key, len(prefix))
        file = _FILE_KEY.fullmatch(key, len(prefix))
        if tensor:
            ranks.setdefault(int(tensor[1]), []).append(tensor[2])
        elif file:
            files.append(file[1])
        elif mark := _MARK_KEY.fullmatch(key, len(prefix)):
            marked.add(int(mark[1]))
        else:
            misplaced = misplaced or (key if key.startswith("/keys/rank_", len(prefix)) else None)
            continue
        count += 1
        if count > MAX_FILES:
            raise FormatError(f"{connector.url}: more than {MAX_FILES} values", url=connector.url)
    for name in itertools.chain(*ranks.values(), files):
        try:
            check_path(name)
        except FormatError as error:
            raise FormatError(f"{connector.url}: {error}", url=connector.url, key=name[:200]) from None
    if misplaced is not None and not ranks:
        raise NotFoundError(
            f"there is no model at {connector.url}, but {misplaced[:200]}: it was saved to a url that ends with a "
            "slash, which SGLang keeps. Save it again without",
            url=connector.url,
            key=misplaced,
        )
    return ranks, files, marked


def _check_world_size(
    connector: KeyValueConnector, marks: Mapping[int, bytes | None], present: Collection[int]
) -> None:
    """Raise UnavailableError unless all the ranks that our saves wrote down are there.

    More are SGLang's own, which writes over ours and knows no marks.
    """
    url, model = connector.url, connector.model
    sizes: dict[int, int] = {}  # of the ranks whose saves wrote one down
    for rank, mark in marks.items():
        found = _OF_RANKS.search(mark or b"")
        if found:
            sizes[rank] = int(found[1])
    if not sizes:
        return
    world_size = max(sizes.values())
    key = mark_key(model, min(sizes))
    way_out = (
        f'with layout="sglang", rank= and world_size=; if SGLang has saved the model since, delete the keys '
        f"{model}/saving/sglang/*"
    )
    if min(sizes.values()) != world_size:
        listed = ", ".join(f"{rank} of {size}" for rank, size in sorted(sizes.items())[:_NAMED_RANKS])
        raise UnavailableError(
            f"{url}: its ranks are of saves with different world sizes (rank {listed}): one is under way or died. "
            f"Save every rank {way_out}",
            url=url,
            key=key,
        )
    count = world_size - sum(rank < world_size for rank in present)
    if count:
        missing = (rank for rank in range(world_size) if rank not in present)
        names = ", ".join(map(str, itertools.islice(missing, _NAMED_RANKS)))
        if count > _NAMED_RANKS:
            names += f" and {count - _NAMED_RANKS} more"
        raise UnavailableError(
            f"{url} was saved for {world_size} ranks, and of rank {names} there is nothing yet: a save is under way or "
            f"died. Wait, or save what is missing {way_out}",
            url=url,
            key=key,
        )


def _marks(connector: KeyValueConnector, ranks: Sequence[int]) -> dict[int, bytes | None]:
    heads = _peek(connector, [mark_key(connector.model, rank) for rank in ranks])
    return {rank: head or None for rank, (_, head) in zip(ranks, heads, strict=True)}


def _peek(connector: KeyValueConnector, keys: Sequence[str]) -> Iterator[tuple[int, bytes]]:
    """Size in bytes and first bytes of each value."""
    for start in range(0, len(keys), _PEEK_KEYS):
        yield from connector.peek(keys[start : start + _PEEK_KEYS], _PEEK_BYTES)


def _header(connector: KeyValueConnector, key: str, size: int, head: bytes) -> bytes:
    length = int.from_bytes(head[:8], "little") if len(head) >= 8 else 0
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise FormatError(
            f"{key} at {connector.url} is not a tensor as SGLang writes it: a header of {length} bytes in a value of "
            f"{size} (at most {_MAX_HEADER_BYTES}). Save the model again",
            url=connector.url,
            key=key,
        )
    header = head[8 : 8 + length]
    if len(header) < length:
        header += connector.get_range(key, len(head), length - len(header))
    if len(header) != length:
        raise FormatError(f"{key} at {connector.url} was cut off while it was read", url=connector.url, key=key)
    return header

"""save(..., layout="sglang"): a model as the values that SGLang's own Redis connector loads.

The layout cannot publish atomically, so a save that replaces a model takes the old one away first: a reader then finds
keys missing, which both SGLang and we report, and never a mixture. Order: a note that a save has begun (we refuse to
open the model), the old tensors go, the new ones come, then files, then the note says complete. What SGLang would not
load is refused before anything is written.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rdmaload._core import TensorIndex
from rdmaload.connectors.connector import MODELS_KEY, KeyValueConnector
from rdmaload.errors import AlreadyExistsError, FormatError, IntegrityError, NotSupportedError, UnavailableError
from rdmaload.journal import delete_keys
from rdmaload.manifest import manifest_key
from rdmaload.sglang_layout import (
    RANK_KEY,
    SAVING,
    TENSOR_NAME,
    complete_mark,
    file_key,
    layout_keys,
    mark_key,
    tensor_key,
)
from rdmaload.sources import Source, SourceModel
from rdmaload.stats import SaveStats
from rdmaload.threads import run_in_threads
from rdmaload.weights import WEIGHT_INDEX_SUFFIX, has_weight_suffix

__all__ = ["SglangSave"]

_log = logging.getLogger("rdmaload")

# What safetensors writes for torch and does not read back: SGLang would fail with a KeyError.
_UNREADABLE = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"})
_MAX_TEXT_BYTES = 256 << 20  # of one file: the largest tokenizers take a tenth of it
_PATTERN = re.compile(r"[*?\[\]\\]")


@dataclass(frozen=True)
class _Value:
    """One value to send: `head`, then `nbytes` of `source` from `offset`."""

    key: str
    head: bytes
    source: Source
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        return len(self.head) + self.nbytes


class SglangSave:
    """One save of one rank, or of all ranks that the source has (`rank` None).

    `keep_aliases`: tied names are tensors of their own, as SGLang keeps those of strided twins.
    """

    def __init__(
        self,
        connector: KeyValueConnector,
        model: SourceModel,
        rank: int | None,
        *,
        overwrite: bool,
        keep_aliases: bool,
        tick: Callable[[int, int], None],
        stages: dict[str, float],
        expect: Callable[[int, int], None],
    ) -> None:
        self._connector = connector
        self._model = model
        self._rank = rank
        self._world_size = model.world_size if model.kind == "sharded" else 1
        self._ranks = list(range(self._world_size)) if rank is None else [rank]
        self._overwrite = overwrite
        self._keep_aliases = keep_aliases
        self._tick = tick
        self._stages = stages
        self._expect = expect
        options = connector.options
        self._room_bytes = min(options.window_bytes, options.max_host_bytes or options.window_bytes)
        self._room = threading.Condition()
        self._held_bytes = 0  # Guarded by _room, as are the next two.
        self._bytes_done = 0
        self._values_done = 0

    def interrupt(self) -> None:
        """Make every command that is under way fail soon; from any thread."""
        self._connector.close()
        if self._model.on_close is not None:
            self._model.on_close()

    def run(self) -> SaveStats:
        connector, name = self._connector, self._connector.model
        if _PATTERN.search(name):
            _log.warning(
                "%s: SGLang takes * ? [ ] \\ in a model's name for a pattern, and may not find it", connector.url
            )
        tensors = list(self._tensors())
        texts = list(self._texts()) if self._rank in (None, 0) else []
        self._expect(len(tensors) + len(texts), sum(value.size for value in [*tensors, *texts]))
        self._check_sizes([*tensors, *texts])
        for warning in connector.publish_warning(sum(value.size for value in [*tensors, *texts])):
            _log.warning("%s", warning)
        old_tensors, old_files = self._existing()
        save_id = secrets.token_hex(16).encode()
        self._begin(save_id)
        delete_keys(connector, iter(old_tensors))
        started = time.perf_counter()
        self._send(tensors)
        self._send(texts)
        self._stages["send"] = time.perf_counter() - started
        self._model.check_unchanged()
        if texts:
            delete_keys(connector, iter(sorted(old_files - {value.key for value in texts})))
        self._finish(save_id)
        return SaveStats(
            bytes=sum(value.size for value in [*tensors, *texts]),
            files=len(tensors) + len(texts),
            connections=connector.connections,
            published=True,
        )

    def _tensors(self) -> Iterator[_Value]:
        for file in self._model.files:
            if file.header is None:
                continue
            index = TensorIndex()
            index.add_file(0, file.path, file.size, file.header)
            aliases: dict[str, list[str]] = {}
            for alias, stored in file.tied.items():
                aliases.setdefault(stored, []).append(alias)
            offset = 8 + len(file.header)
            for stored, dtype, shape, _, nbytes in index.tensors():  # in the order of their data, without gaps
                names = sorted([stored, *aliases.get(stored, ())])
                if dtype in _UNREADABLE:
                    raise NotSupportedError(
                        f"tensor {stored} has dtype {dtype}, which SGLang's reader cannot load: nothing was written. "
                        "Save without layout='sglang'",
                        url=self._connector.url,
                    )
                if not nbytes:
                    _log.warning("%s is empty: SGLang does not expect it, and it is left out", stored)
                for name in (names if self._keep_aliases else names[:1]) if nbytes else ():
                    for rank in self._ranks if file.rank is None else [file.rank]:
                        key = tensor_key(self._connector.model, rank, name)
                        yield _Value(key, _head(dtype, shape, nbytes), file, offset, nbytes)
                offset += nbytes

    def _texts(self) -> Iterator[_Value]:
        """Files as SGLang keeps them: by base name, and only what is text."""
        paths: dict[str, str] = {}
        for file in self._model.files:
            name = file.path.rpartition("/")[2]
            if file.header is not None or name.startswith(".") or name.endswith(WEIGHT_INDEX_SUFFIX):
                continue  # an index names files that are not there in this layout
            if has_weight_suffix(name) or file.size > _MAX_TEXT_BYTES or not _is_text(file):
                _log.warning("%s is not text, which is all that SGLang's layout holds: it is left out", file.path)
                continue
            other = paths.setdefault(name, file.path)
            if other != file.path:
                raise NotSupportedError(
                    f"{other} and {file.path} have one base name, by which SGLang's layout keeps files: nothing was "
                    "written. Leave one of them out of the source",
                    url=self._connector.url,
                )
            yield _Value(file_key(self._connector.model, name), b"", file, 0, file.size)

    def _check_sizes(self, values: Sequence[_Value]) -> None:
        limit = self._connector.value_limit()
        for value in values:
            if value.size > limit:
                raise NotSupportedError(
                    f"{value.key} would take {value.size} bytes: SGLang's layout keeps a tensor in one value, and "
                    f"{self._connector.url} takes at most {limit} (proto-max-bulk-len). Nothing was written. Save "
                    "without layout='sglang', which has no such limit, or over more ranks",
                    url=self._connector.url,
                    key=value.key,
                )
        if not any(value.head for value in values):
            raise FormatError("there are no tensors to save: SGLang's layout is nothing without them")

    def _existing(self) -> tuple[list[str], set[str]]:
        """Keys of tensors that this save replaces, and of files."""
        connector, model = self._connector, self._connector.model
        if connector.exists(manifest_key(model)):
            raise AlreadyExistsError(
                f"{connector.url} holds a model in format 1, which readers would go on to take for this one: remove it "
                "first (`rdmaload rm`), or save under another name. Nothing was written",
                url=connector.url,
                key=manifest_key(model),
            )
        tensors: list[str] = []
        files: set[str] = set()
        for key in layout_keys(connector):
            match = RANK_KEY.fullmatch(key, len(model) + 1)
            if match is None:
                files.update([key] if key.startswith(file_key(model, "")) else ())
            elif int(match[1]) in self._ranks or (0 in self._ranks and int(match[1]) >= self._world_size):
                tensors.append(key)
        if tensors and not self._overwrite:
            raise AlreadyExistsError(
                f"{connector.url} has a model in SGLang's layout ({tensors[0]}), and overwrite=False was given",
                url=connector.url,
                key=tensors[0],
            )
        return tensors, files

    def _begin(self, save_id: bytes) -> None:
        connector = self._connector
        marks = {rank: mark_key(connector.model, rank) for rank in self._ranks}
        before = {rank: connector.get(mark) for rank, mark in marks.items()}
        for mark in marks.values():
            connector.set(mark, SAVING + save_id)
        try:
            # A source that is this very model sees the note that has just been written.
            self._model.check_unchanged()
        except IntegrityError as error:
            for rank, mark in marks.items():
                value = before[rank]
                if value is None:
                    connector.delete(mark)
                else:
                    connector.set(mark, value)
            raise IntegrityError(
                f"{error}. Nothing was written; source and destination may be the same model",
                url=connector.url,
                key=error.key,
            ) from error

    def _send(self, values: Sequence[_Value]) -> None:
        pending = iter(values)

        def work(stop: threading.Event) -> None:
            while not stop.is_set():
                with self._room:
                    value = next(pending, None)
                    if value is None:
                        return
                    # A value larger than the room is sent when there is no other.
                    while self._held_bytes and self._held_bytes + value.size > self._room_bytes:
                        self._room.wait(0.1)
                        if stop.is_set():
                            return
                    self._held_bytes += value.size
                try:
                    self._connector.set(value.key, _content(value, self._connector.url))
                finally:
                    with self._room:
                        self._held_bytes -= value.size
                        self._room.notify_all()
                with self._room:
                    self._bytes_done += value.size
                    self._values_done += 1

        if values:
            run_in_threads(
                work,
                min(self._connector.connections, len(values)),
                tick=lambda: self._tick(self._bytes_done, self._values_done),
                interrupt=self.interrupt,
                name="rdmaload-save",
            )

    def _finish(self, save_id: bytes) -> None:
        connector, model = self._connector, self._connector.model
        for rank in self._ranks:
            key = mark_key(model, rank)
            if connector.get(key) != SAVING + save_id:
                connector.set(key, b"mixed")
                raise UnavailableError(
                    f"{connector.url}: something else saved or removed rank {rank} at the same time, and values of "
                    "both may be mixed: nobody opens it now. Save it again, alone",
                    url=connector.url,
                    key=key,
                )
        for rank in self._ranks:
            connector.set(mark_key(model, rank), complete_mark(save_id, self._world_size))
        if 0 in self._ranks:  # what a model of more ranks has left
            marks = [key for key in connector.list(mark_key(model, 0)[:-1])]
            kept = {mark_key(model, rank) for rank in range(self._world_size)}
            delete_keys(connector, (key for key in marks if key not in kept))
        connector.members_add(MODELS_KEY, model)


def _head(dtype: str, shape: Sequence[int], nbytes: int) -> bytes:
    """What stands before the data in a value: the same bytes that safetensors writes."""
    entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, nbytes]}
    text = json.dumps({TENSOR_NAME: entry}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _content(value: _Value, url: str) -> bytearray:
    content = bytearray(value.size)
    view = memoryview(content)
    view[: len(value.head)] = value.head
    if value.nbytes:
        count = value.source.read_into(value.offset, view[len(value.head) :])
        if count != value.nbytes:
            raise IntegrityError(
                f"{value.source.path} ends at byte {value.offset + count}, bytes to {value.offset + value.nbytes} were "
                "announced: it was cut while it was saved. Save again",
                url=url,
                key=value.key,
            )
    return content


def _is_text(file: Source) -> bool:
    content = bytearray(file.size)
    count = file.read_into(0, memoryview(content)) if content else 0
    try:
        content[:count].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return count == file.size

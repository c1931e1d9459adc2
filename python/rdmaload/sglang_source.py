"""A model in SGLang's layout as a source to save from: its values put together to the safetensors files of each rank.

Each rank becomes files with the names that engines give to shards, so that the copy is a model like any other. The
headers are made here; the data comes from the values, by ranges. Nothing can be verified, but a value that changes
its size or header while it is copied ends the save.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from dataclasses import dataclass

from rdmaload._core import TensorIndex
from rdmaload.connectors.connector import KeyValueConnector
from rdmaload.errors import IntegrityError
from rdmaload.index import Index, IndexFile
from rdmaload.sglang_layout import TENSOR_NAME, check_unchanged
from rdmaload.sources import Source, SourceModel
from rdmaload.weights import WEIGHT_INDEX_SUFFIX

__all__ = ["sglang_model"]

_FILE_BYTES = 5_000_000_000  # as for state dicts


def sglang_model(connector: KeyValueConnector, index: Index) -> SourceModel:
    """The model that `find_index` found. Raises FormatError for a value that is no such tensor."""
    ranks: dict[int, list[_Value]] = {}
    files: list[Source] = []
    for file in index.files:
        if file.rank is not None:
            ranks.setdefault(file.rank, []).append(_value_of(file))
        elif not file.path.endswith(WEIGHT_INDEX_SUFFIX):  # it names files of the checkpoint that SGLang had read
            files.append(_TextFile(connector, file))
    shards: list[Source] = []
    for rank, values in sorted(ranks.items()):
        for part, group in enumerate(_split(values)):
            shards.append(_RankFile(connector, f"model-rank-{rank}-part-{part}.safetensors", rank, group))
    return SourceModel([*shards, *files], kind="sharded", world_size=len(ranks))


@dataclass(frozen=True)
class _Value:
    file: IndexFile
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def data_at(self) -> int:
        return self.file.size - self.nbytes


def _value_of(file: IndexFile) -> _Value:
    assert file.header is not None
    assert file.tensor is not None
    parsed = TensorIndex()
    parsed.add_single(0, file.key or file.path, file.size, file.header, TENSOR_NAME, file.tensor)
    (name, dtype, shape, _, nbytes) = next(parsed.tensors())
    return _Value(file, name, dtype, shape, nbytes)


def _split(values: Sequence[_Value]) -> list[list[_Value]]:
    groups: list[list[_Value]] = [[]]
    held = 0
    for value in values:
        if groups[-1] and held + value.nbytes > _FILE_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(value)
        held += value.nbytes
    return groups


def _width(value: _Value) -> int:
    """Bytes per element, rounded down: wide elements first keep every tensor of a file aligned."""
    count = 1
    for extent in value.shape:
        count *= extent
    return value.nbytes // count if count else 0


class _StoredSource(Source):
    """A file whose bytes lie in values."""

    def _range(self, connector: KeyValueConnector, file: IndexFile, offset: int, buffer: memoryview) -> None:
        data = connector.get_range(file.key or "", offset, len(buffer))
        if len(data) != len(buffer):
            raise IntegrityError(
                f"{file.key} at {connector.url} was changed or removed while it was copied: copy the model again",
                url=connector.url,
                key=file.key,
            )
        buffer[:] = data


class _RankFile(_StoredSource):
    """A safetensors file over many values."""

    def __init__(self, connector: KeyValueConnector, path: str, rank: int, values: Sequence[_Value]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._values: list[_Value] = []
        starts: list[int] = []
        end = 0
        for value in sorted(values, key=lambda value: (-_width(value), value.name)):
            data_offsets = [end, end + value.nbytes]
            header[value.name] = {"dtype": value.dtype, "shape": list(value.shape), "data_offsets": data_offsets}
            if value.nbytes:
                self._values.append(value)
                starts.append(end)
            end += value.nbytes
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        super().__init__(path, 8 + len(text) + end, header=text, rank=rank)
        self._connector = connector
        self._files = [value.file for value in values]
        self._head = memoryview(len(text).to_bytes(8, "little") + text)
        self._starts = [len(self._head) + start for start in starts]

    def read_into(self, offset: int, buffer: memoryview) -> int:
        end = min(offset + len(buffer), self.size)
        at = offset
        while at < end:
            target = buffer[at - offset : end - offset]
            if at < len(self._head):
                part = self._head[at:end]
                target[: len(part)] = part
                at += len(part)
                continue
            which = bisect.bisect_right(self._starts, at) - 1
            value = self._values[which]
            inside = at - self._starts[which]
            count = min(len(target), value.nbytes - inside)
            self._range(self._connector, value.file, value.data_at + inside, target[:count])
            at += count
        return max(0, end - offset)

    def check_unchanged(self) -> None:
        check_unchanged(self._connector, self._files)


class _TextFile(_StoredSource):
    """A file that is one value."""

    def __init__(self, connector: KeyValueConnector, file: IndexFile) -> None:
        super().__init__(file.path, file.size)
        self._connector = connector
        self._file = file

    def read_into(self, offset: int, buffer: memoryview) -> int:
        count = max(0, min(len(buffer), self.size - offset))
        if count:
            self._range(self._connector, self._file, offset, buffer[:count])
        return count

    def check_unchanged(self) -> None:
        check_unchanged(self._connector, [self._file])

"""Which tensors a load delivers: the tensors of one rank's files, and the choice by patterns among them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from rdmaload import _core
from rdmaload.errors import FormatError
from rdmaload.index import IndexFile
from rdmaload.reader import Batch, StoreReader
from rdmaload.sglang_layout import TENSOR_NAME
from rdmaload.tensors import DLPACK_TYPES, TensorSpec, collector_paused, export_tensor, taker

if TYPE_CHECKING:
    import torch

__all__ = ["Names", "Patterns", "RankTensors", "as_patterns", "is_selected", "placed_tensors", "plans_of", "state_of"]

Patterns = str | Sequence[str] | None

_WILD = re.compile(r"[*?[]")
# A window is read in this many parts, so that reading goes on while the first is consumed.
_WINDOW_PARTS = 4


def as_patterns(patterns: Patterns) -> list[str] | None:
    if patterns is None:
        return None
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _divided(patterns: list[str] | None) -> tuple[frozenset[str], list[str] | None]:
    """Patterns that only match themselves, and the others: thousands of names need no search for each tensor."""
    if patterns is None:
        return frozenset(), None
    return (
        frozenset(pattern for pattern in patterns if not _WILD.search(pattern)),
        [pattern for pattern in patterns if _WILD.search(pattern)],
    )


def is_selected(name: str, include: list[str] | None, exclude: list[str] | None) -> bool:
    if include is not None and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
        return False
    return exclude is None or not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)


class Names:
    """The names that each stored tensor is delivered under: `tied` where it has some, else its own.

    No list for each tensor: the collector of Python's objects would walk all 20,000 of them.
    """

    def __init__(self, tensors: RankTensors, tied: Mapping[int, list[str]]) -> None:
        self._tensors = tensors
        self._tied = tied

    def get(self, position: int) -> Sequence[str] | None:
        """None: its own name."""
        return self._tied.get(position)

    def __getitem__(self, position: int) -> Sequence[str]:
        return self._tied.get(position) or (self._tensors.specs[position].name,)


class RankTensors:
    """The tensors of the files that one rank reads: the native index, and the same for Python.

    What Python needs of each is made when it is first asked for: of 20,000 tensors it takes as long as reading a tenth
    of a GB, which a load that wants all of them does meanwhile.
    """

    def __init__(self, files: Sequence[tuple[int, IndexFile]], url: str) -> None:
        self.native = _core.TensorIndex()
        self.tied: dict[str, str] = {}  # alias: stored name
        self._paths = {position: file.path for position, file in files}
        for position, file in files:
            assert file.header is not None
            try:
                if file.tensor is None:
                    self.native.add_file(position, file.path, file.size, file.header)
                else:
                    where = file.key or file.path
                    self.native.add_single(position, where, file.size, file.header, TENSOR_NAME, file.tensor)
            except FormatError as error:
                raise FormatError(f"{url}: {error}", url=url, key=file.key or file.path) from None
            self.tied.update(file.tied)
        if (duplicate := self.native.duplicate()) is not None:
            name, first, again = duplicate
            raise FormatError(
                f"{url}: tensor {name} is in {self._paths[first]} and in {self._paths[again]}; a "
                "*.safetensors.index.json would say which file counts",
                url=url,
                key=self._paths[again],
            )
        for alias, name in self.tied.items():
            if name not in self.position or alias in self.position:
                raise FormatError(f"{url}: tied name {alias} does not stand for a stored tensor ({name})", url=url)

    @cached_property
    def specs(self) -> list[TensorSpec]:
        """By position."""
        paths = self._paths
        return [
            TensorSpec(name, dtype, shape, paths[file], nbytes)
            for name, dtype, shape, file, nbytes in self.native.tensors()
        ]

    @cached_property
    def position(self) -> dict[str, int]:
        """By name."""
        return {spec.name: position for position, spec in enumerate(self.specs)}

    def select(self, include: Patterns, exclude: Patterns) -> tuple[Sequence[int], Names]:
        """Positions to read in file order, and the names that each is delivered under."""
        if include is None and exclude is None and not self.tied:
            return range(len(self.native)), Names(self, {})
        wanted, include = _divided(as_patterns(include))
        unwanted, exclude = _divided(as_patterns(exclude))

        def chosen(name: str) -> bool:
            return name not in unwanted and is_selected(name, None if name in wanted else include, exclude)

        positions = [i for i, spec in enumerate(self.specs) if chosen(spec.name)]
        tied: dict[int, list[str]] = {}
        for alias, name in self.tied.items():
            if chosen(alias):
                position = self.position[name]
                own = [name] if chosen(name) else []
                tied.setdefault(position, own).append(alias)
        positions += [position for position, names in tied.items() if self.specs[position].name not in names]
        return sorted(positions), Names(self, tied)

    def read_of(self, selection: Sequence[int]) -> dict[str, tuple[int, int]]:
        """The files that a selection reads: the bytes that it wants of each, and those of all tensors there."""
        wanted: dict[str, int] = {}
        for position in selection:
            spec = self.specs[position]
            wanted[spec.file] = wanted.get(spec.file, 0) + spec.nbytes
        total = dict.fromkeys(wanted, 0)
        for spec in self.specs:
            if spec.file in total:
                total[spec.file] += spec.nbytes
        return {file: (nbytes, total[file]) for file, nbytes in wanted.items()}


def plans_of(
    reader: StoreReader,
    weights: RankTensors,
    selection: Sequence[int],
    window_bytes: int | None,
    *,
    into_tensors: bool = False,
    alone: bool = True,
) -> Iterator[_core.LoadPlan]:
    """Plans that read the selection in order, in parts of which several fit into the window; None = one plan."""
    if window_bytes is None:
        yield reader.plan(weights.native, selection, into_tensors=into_tensors, alone=alone)
        return
    part_bytes = max(1, window_bytes // _WINDOW_PARTS)
    part: list[int] = []
    total = 0
    for position in selection:
        nbytes = weights.specs[position].nbytes
        if part and total + nbytes > part_bytes:
            yield reader.plan(weights.native, part, into_tensors=into_tensors, alone=alone)
            part, total = [], 0
        part.append(position)
        total += nbytes
    if part:
        yield reader.plan(weights.native, part, into_tensors=into_tensors, alone=alone)


def placed_tensors(
    batch: Batch, weights: RankTensors, names: Names | Mapping[int, Sequence[str]]
) -> Iterator[tuple[int, str, torch.Tensor]]:
    if batch.tensors:
        for (position, _, _), tensor in zip(batch.plan.placements(), batch.tensors, strict=True):
            for name in names[position]:
                yield position, name, tensor
        return
    arenas = batch.arenas
    take = taker()
    for position, region, offset, own_name, capsule in batch.plan.exports(weights.native, arenas, DLPACK_TYPES):
        if capsule is not None:
            tensor = take(capsule)
        else:
            tensor = export_tensor(weights.specs[position], arenas[region], offset)
        for name in names.get(position) or (own_name,):
            yield position, name, tensor


def state_of(batch: Batch, weights: RankTensors, names: Names) -> dict[str, torch.Tensor]:
    """All tensors of a batch into arenas, by name: what `placed_tensors` yields, in one loop."""
    state: dict[str, torch.Tensor] = {}
    arenas = batch.arenas
    take = taker()
    tied_names = names.get
    with collector_paused():
        for position, region, offset, name, capsule in batch.plan.exports(weights.native, arenas, DLPACK_TYPES):
            if capsule is not None:
                tensor = take(capsule)
            else:
                tensor = export_tensor(weights.specs[position], arenas[region], offset)
            tied = tied_names(position)
            if tied is None:
                state[name] = tensor
            else:
                state.update(dict.fromkeys(tied, tensor))
    return state

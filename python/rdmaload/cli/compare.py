"""Compares loaded tensors with safetensors files, byte by byte.

The files are mapped and cut by their own headers, so that nothing of what loaded the tensors is
trusted with the other side of the comparison but the listing of the directory.
"""

from __future__ import annotations

import fnmatch
import json
import mmap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rdmaload.errors import IntegrityError
from rdmaload.stats import Progress

if TYPE_CHECKING:
    import torch

    from rdmaload.index import IndexFile
    from rdmaload.tensors import TensorSpec

__all__ = ["compare_with_files"]

Patterns = Sequence[str] | None

_HEADER_LENGTH_BYTES = 8
_BLOCK_BYTES = 64 << 20  # per step of the comparison: often enough for a progress bar


@dataclass(frozen=True)
class _Stored:
    """A tensor as its file's header describes it."""

    file: IndexFile
    dtype: str
    shape: tuple[int, ...]
    begin: int  # in the file
    end: int


def compare_with_files(
    tensors: Mapping[str, torch.Tensor],
    specs: Mapping[str, TensorSpec],
    directory: str,
    *,
    rank: int | None,
    include: Patterns,
    exclude: Patterns,
    progress: Callable[[Progress], None] | None,
) -> int:
    """Compare names, dtypes, shapes and bytes; the number of bytes that are equal.

    `specs` says under which dtypes and shapes the tensors were stored. A name that the files lack
    is fine when it stands for the same tensor as one that they have. Raises IntegrityError, which
    names the first difference.
    """
    import rdmaload

    with rdmaload.open(Path(directory)) as reference:
        # Checks the headers, which are only cut here.
        names = reference.rank_tensors(rank)
        files = [file for file in reference.files if file.header is not None and file.rank in (None, rank or 0)]
    stored = {
        name: place
        for file in files
        for name, place in _places(file)
        if name in names and _selected(name, include, exclude)
    }
    _check_names(tensors, stored, directory)
    total = sum(place.end - place.begin for place in stored.values())
    started = time.perf_counter()
    done = 0
    for number, file in enumerate(files):
        mine = {name: place for name, place in stored.items() if place.file is file}
        for step in _compare_file(tensors, specs, Path(directory) / file.path, mine):
            done += step
            if progress is not None:
                seconds = time.perf_counter() - started
                progress(Progress("verify", done, total, number, len(files), seconds))
    return done


def _places(file: IndexFile) -> Iterator[tuple[str, _Stored]]:
    assert file.header is not None
    data = _HEADER_LENGTH_BYTES + len(file.header)
    for name, entry in json.loads(file.header).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield (
                name,
                _Stored(file, entry["dtype"], tuple(entry["shape"]), data + begin, data + end),
            )


def _selected(name: str, include: Patterns, exclude: Patterns) -> bool:
    if include and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
        return False
    return not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude or ())


def _check_names(tensors: Mapping[str, torch.Tensor], stored: Mapping[str, _Stored], directory: str) -> None:
    missing = sorted(stored.keys() - tensors.keys())
    if missing:
        raise IntegrityError(
            f"{directory} has {missing[0]} and {len(missing) - 1} more tensors that the model lacks"
            if len(missing) > 1
            else f"{directory} has {missing[0]}, which the model lacks",
            key=missing[0],
        )
    known = {id(tensors[name]) for name in stored}
    for name in sorted(tensors.keys() - stored.keys()):
        if id(tensors[name]) not in known:
            raise IntegrityError(f"the model has {name}, which {directory} lacks", key=name)


def _compare_file(
    tensors: Mapping[str, torch.Tensor],
    specs: Mapping[str, TensorSpec],
    path: Path,
    stored: Mapping[str, _Stored],
) -> Iterator[int]:
    """Bytes that were found equal, step by step."""
    for name, place in stored.items():
        spec = specs[name]
        if (spec.dtype, tuple(spec.shape)) != (place.dtype, place.shape):
            raise IntegrityError(
                f"{name} is {spec.dtype} {list(spec.shape)}, and {place.dtype} {list(place.shape)} in {path}",
                key=name,
            )
    if not any(place.end > place.begin for place in stored.values()):
        return
    # A private mapping: torch takes no memory that it may not write to.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        for name, place in stored.items():
            yield from _compare_tensor(name, tensors[name], mapped, place, path)


def _compare_tensor(name: str, tensor: torch.Tensor, mapped: mmap.mmap, place: _Stored, path: Path) -> Iterator[int]:
    import torch

    length = place.end - place.begin
    if tensor.nbytes != length:
        raise IntegrityError(f"{name} has {tensor.nbytes} bytes, and {length} in {path}", key=name)
    if length == 0:
        return
    loaded = tensor.reshape(-1).view(torch.uint8)
    for start in range(0, length, _BLOCK_BYTES):
        count = min(_BLOCK_BYTES, length - start)
        block = loaded[start : start + count]
        expected = torch.frombuffer(mapped, dtype=torch.uint8, count=count, offset=place.begin + start)
        if not torch.equal(block, expected):
            first = start + int(torch.nonzero(block != expected)[0])
            raise IntegrityError(
                f"{name} differs from {path} at byte {first} of the tensor (byte {place.begin + first} of the file)",
                key=name,
            )
        del expected  # a mapping cannot be closed while something looks at it
        yield count

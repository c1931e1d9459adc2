"""Tensors as they arrive in the memory of a GPU, and their conversion there within a bound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import groupby
from typing import TYPE_CHECKING

from rdmaload.devices import DeviceRoad, copy_in_slices
from rdmaload.reader import StoreReader, Tick
from rdmaload.selection import Names, RankTensors, placed_tensors, plans_of
from rdmaload.stats import LoadStats
from rdmaload.tensors import torch_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["stream_to_gpu"]


def stream_to_gpu(
    reader: StoreReader,
    weights: RankTensors,
    selection: Sequence[int],
    names: Names | Mapping[int, Sequence[str]],
    *,
    road: DeviceRoad,
    dtype: torch.dtype | None,
    window: int | None,
    host_window: int,
    stats: LoadStats,
    tick: Tick | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors in the order of `selection`; without a window all is read at once.

    What `dtype` converts is beside its result while it is converted, so it is read within the room that the road leaves
    for that; a tensor that is larger comes through host memory.
    """
    if dtype is not None:
        window = road.extra_bytes if window is None else min(window, road.extra_bytes)

    def is_large(position: int) -> bool:
        spec = weights.specs[position]
        stored, _ = torch_dtype(spec)
        return (
            dtype is not None
            and window is not None
            and stored.is_floating_point
            and stored != dtype
            and spec.nbytes > window
        )

    parts = [(large, list(group)) for large, group in groupby(selection, key=is_large)]
    done = 0
    for number, (large, part) in enumerate(parts):
        later = _files_of(weights, parts[number + 1 :])
        earlier = _files_of(weights, parts[:number]) - _files_of(weights, parts[number:])
        part_tick = None if tick is None else _after(tick, done, earlier, later)
        if large:
            assert dtype is not None
            road.note_host_way(stats)
            yield from _through_host(reader, weights, part, names, road, dtype, host_window, stats, part_tick)
        else:
            yield from _directly(reader, weights, part, names, road, dtype, window, stats, part_tick)
        done += sum(weights.specs[position].nbytes for position in part)


def _files_of(weights: RankTensors, parts: Sequence[tuple[bool, Sequence[int]]]) -> set[str]:
    return {weights.specs[position].file for _, part in parts for position in part}


def _after(tick: Tick, before: int, finished: AbstractSet[str], unfinished: AbstractSet[str]) -> Tick:
    return lambda done, files: tick(before + done, finished | (files - unfinished))


def _directly(
    reader: StoreReader,
    weights: RankTensors,
    part: Sequence[int],
    names: Names | Mapping[int, Sequence[str]],
    road: DeviceRoad,
    dtype: torch.dtype | None,
    window: int | None,
    stats: LoadStats,
    tick: Tick | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    specs = weights.specs
    batches = reader.stream(
        plans_of(reader, weights, part, window, into_tensors=True),
        window_bytes=max(1, sum(specs[position].nbytes for position in part)) if window is None else window,
        stats=stats,
        tick=tick,
        road=road,
        empty=lambda plan: [road.empty(specs[position]) for position, _, _ in plan.placements()],
    )
    try:
        for batch in batches:
            for (position, _, _), tensor in zip(batch.plan.placements(), batch.tensors, strict=True):
                if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
                    tensor = road.converted(tensor, dtype, stats)
                stats.bytes += specs[position].nbytes
                for name in names[position]:
                    yield name, tensor
    finally:
        batches.close()  # type: ignore[attr-defined]  # a generator: stops reading at once


def _through_host(
    reader: StoreReader,
    weights: RankTensors,
    part: Sequence[int],
    names: Names | Mapping[int, Sequence[str]],
    road: DeviceRoad,
    dtype: torch.dtype,
    window: int,
    stats: LoadStats,
    tick: Tick | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    batches = reader.stream(
        plans_of(reader, weights, part, window), window_bytes=window, stats=stats, tick=tick, reuse=True
    )
    first = {position: names[position][:1] for position in part}
    try:
        for batch in batches:
            for position, _, tensor in placed_tensors(batch, weights, first):
                made = road.empty_as(tensor.shape, dtype)
                copy_in_slices(made, tensor, road.extra_bytes)
                stats.bytes += tensor.nbytes
                stats.copied_bytes += tensor.nbytes
                del tensor
                for name in names[position]:
                    yield name, made
    finally:
        batches.close()  # type: ignore[attr-defined]  # a generator: stops reading at once

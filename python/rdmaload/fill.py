"""Fills existing tensors: those that can be received in place, then the others through a bounded buffer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rdmaload import _core
from rdmaload.devices import DeviceRoad, allocator
from rdmaload.reader import StoreReader, Tick
from rdmaload.report import Report
from rdmaload.selection import RankTensors, placed_tensors, plans_of
from rdmaload.stats import LoadStats
from rdmaload.targets import Targets
from rdmaload.tensors import import_target

if TYPE_CHECKING:
    import torch

__all__ = ["Filling", "RoadTo"]

RoadTo = Callable[[int, LoadStats, int], DeviceRoad | None]
"""The road to a GPU, by ordinal, for so many bytes."""

_Names = dict[int, list[str]]  # targets by stored tensor


class Filling:
    """One load into `targets`; `names` are those that each selected stored tensor is delivered under."""

    def __init__(
        self, weights: RankTensors, names: Mapping[int, Sequence[str]], targets: Targets, *, cast: bool
    ) -> None:
        self.loaded: list[str] = []
        """Targets that are complete."""
        self._weights = weights
        self._targets = targets
        self._first: _Names = {}  # by stored tensor: its first target, and those tied to that
        # By place: the ordinal of a GPU; None is the host, or a device that torch moves things to.
        self._in_place: dict[int | None, _Names] = {}
        self._staged: dict[int | None, _Names] = {}
        for position, given in names.items():
            for name in given:
                if name in targets:
                    self._assign(position, name, targets.direct(name, cast=cast))

    def _assign(self, position: int, name: str, direct: bool) -> None:
        first = self._first.get(position)
        if first is not None and self._targets.is_same_memory(name, first[0]):
            first.append(name)
            return
        is_free = self._targets.claim(name)
        place = allocator().ordinal_of(self._targets[name])
        if direct and first is None and is_free:
            self._first[position] = self._in_place.setdefault(place, {})[position] = [name]
        else:
            self._staged.setdefault(place, {}).setdefault(position, []).append(name)

    def run(self, reader: StoreReader, stats: LoadStats, report: Report, window_bytes: int, road_to: RoadTo) -> None:
        """Read everything. Raises the first error; `loaded` says what is complete all the same."""
        roads = self._roads(stats, road_to)
        in_place = sorted(self._in_place.items(), key=_host_first) or [(None, {})]
        plans = [reader.plan(self._weights.native, list(names), into_tensors=True) for _, names in in_place]
        staged_bytes = sum(self._nbytes(names) for names in self._staged.values())
        tick = report.expect(sum(plan.read_bytes for plan in plans) + staged_bytes)
        done = 0
        for plan, (place, names) in zip(plans, in_place, strict=True):
            self._run_in_place(reader, plan, stats, _shifted(tick, done), names, roads.get(place))
            done += plan.read_bytes
        for place, names in sorted(self._staged.items(), key=_host_first):
            road = roads.get(place)
            limit = window_bytes if road is None else road.extra_bytes
            # What is larger than the bound on a device goes through host memory, and from there in slices.
            large = {position: names[position] for position in names if road and self._size(position) > limit}
            small = {position: names[position] for position in names if position not in large}
            self._run_staged(reader, stats, _shifted(tick, done), small, limit, road)
            done += self._nbytes(small)
            self._run_staged(reader, stats, _shifted(tick, done), large, window_bytes, None, slice_bytes=limit)
            done += self._nbytes(large)

    def _size(self, position: int) -> int:
        return self._weights.specs[position].nbytes

    def _nbytes(self, names: _Names) -> int:
        return sum(self._size(position) for position in names)

    def _roads(self, stats: LoadStats, road_to: RoadTo) -> dict[int | None, DeviceRoad]:
        """One per GPU. Where there is none, its targets are filled by torch from host memory."""
        roads: dict[int | None, DeviceRoad] = {}
        for place in sorted({*self._in_place, *self._staged} - {None}, key=_number):
            assert place is not None
            in_place, staged = self._in_place.get(place, {}), self._staged.get(place, {})
            road = road_to(place, stats, self._nbytes(in_place) + self._nbytes(staged))
            if road is not None:
                roads[place] = road
                continue
            moved = self._staged.setdefault(place, {})
            for position, names in self._in_place.pop(place, {}).items():
                moved.setdefault(position, [])[:0] = names
        return roads

    def _run_in_place(
        self,
        reader: StoreReader,
        plan: _core.LoadPlan,
        stats: LoadStats,
        tick: Tick | None,
        chosen: _Names,
        road: DeviceRoad | None,
    ) -> None:
        targets = [self._targets[names[0]] for names in chosen.values()]
        if road is None:
            batch = reader.start(
                plan, [import_target(names[0], self._targets[names[0]], self._size(p)) for p, names in chosen.items()]
            )
        else:
            batch = reader.start(plan, road.destinations(targets), road=road, tensors=targets)
        try:
            reader.finish(batch, stats, tick)
            if road is not None:
                road.hand_out(targets)
        finally:
            unfinished = set(batch.operation.unfinished_regions())
            for region, tied in enumerate(chosen.values()):
                self.loaded += tied if region not in unfinished else []
        stats.bytes += plan.wanted_bytes

    def _run_staged(
        self,
        reader: StoreReader,
        stats: LoadStats,
        tick: Tick | None,
        chosen: _Names,
        window_bytes: int,
        road: DeviceRoad | None,
        slice_bytes: int | None = None,
    ) -> None:
        import torch

        plans = plans_of(reader, self._weights, sorted(chosen), window_bytes, into_tensors=road is not None)
        specs = self._weights.specs
        batches = reader.stream(
            plans,
            window_bytes=window_bytes,
            stats=stats,
            tick=tick,
            reuse=True,
            road=road,
            empty=None if road is None else lambda plan: [road.empty(specs[p]) for p, _, _ in plan.placements()],
        )
        for batch in batches:
            for position, name, tensor in placed_tensors(batch, self._weights, chosen):
                with torch.no_grad():
                    _copy(self._targets[name], tensor, slice_bytes)
                self.loaded.append(name)
                stats.bytes += self._size(position)
                stats.copied_bytes += self._size(position) if road is None else 0


def _copy(target: torch.Tensor, source: torch.Tensor, slice_bytes: int | None) -> None:
    """Copy; where the bytes come from the host and need room on a device, no more than so many at once."""
    if slice_bytes is None or source.nbytes <= slice_bytes or source.numel() <= 1:
        target.copy_(source)
        return
    dim = next(dim for dim, size in enumerate(source.shape) if size > 1)
    step = max(1, source.shape[dim] * slice_bytes // source.nbytes)
    for start in range(0, source.shape[dim], step):
        count = min(step, source.shape[dim] - start)
        _copy(target.narrow(dim, start, count), source.narrow(dim, start, count), slice_bytes)


def _number(place: int | None) -> int:
    return -1 if place is None else place


def _host_first(entry: tuple[int | None, _Names]) -> int:
    return _number(entry[0])


def _shifted(tick: Tick | None, before: int) -> Tick | None:
    return None if tick is None else lambda done: tick(before + done)

"""Fills existing tensors: those that can be received in place, then the others through a bounded buffer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from rdmaload import _core, devices
from rdmaload.devices import DeviceRoad
from rdmaload.digests import WholeFiles
from rdmaload.reader import Batch, StoreReader, Tick
from rdmaload.report import Report
from rdmaload.selection import RankTensors, placed_tensors, plans_of
from rdmaload.stats import LoadStats
from rdmaload.targets import Targets
from rdmaload.tensors import import_target

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
        self._whole: WholeFiles | None = None
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
        place = devices.allocator().ordinal_of(self._targets[name])
        if direct and first is None and is_free:
            self._first[position] = self._in_place.setdefault(place, {})[position] = [name]
        else:
            self._staged.setdefault(place, {}).setdefault(position, []).append(name)

    def run(self, reader: StoreReader, stats: LoadStats, report: Report, window_bytes: int, road_to: RoadTo) -> None:
        """Read everything. Raises the first error; `loaded` says what is complete all the same."""
        self._whole = reader.whole_files()
        roads = self._roads(stats, road_to)
        in_place = sorted(self._in_place.items(), key=_host_first) or [(None, {})]
        alone = len(in_place) + len(self._staged) == 1
        plans = [
            reader.plan(self._weights.native, list(names), into_tensors=True, alone=alone) for _, names in in_place
        ]
        staged_bytes = sum(self._nbytes(names) for names in self._staged.values())
        direct_bytes = sum(plan.wanted_bytes for plan in plans)
        tick = report.expect(direct_bytes + staged_bytes, len(self._files(self._first) | self._files_staged()))
        done = _Progress(tick)
        ticks = [done.part(self._files(names)) for _, names in in_place]
        # Every device's window is read ahead while another's tensors are copied: in turns, a batch each.
        parts = deque(
            self._run_staged(reader, stats, done, names, window_bytes, roads.get(place))
            for place, names in sorted(self._staged.items(), key=_host_first)
        )
        self._run_in_place(reader, stats, ticks, list(zip(plans, in_place, strict=True)), roads)
        try:
            while parts:
                part = parts.popleft()
                if next(part, None) is not None:
                    parts.append(part)
        finally:
            for part in parts:
                part.close()

    def _size(self, position: int) -> int:
        return self._weights.specs[position].nbytes

    def _nbytes(self, names: _Names) -> int:
        return sum(self._size(position) for position in names)

    def _files(self, names: _Names) -> set[str]:
        return {self._weights.specs[position].file for position in names}

    def _files_staged(self) -> set[str]:
        return {file for names in self._staged.values() for file in self._files(names)}

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
        stats: LoadStats,
        ticks: Sequence[Tick | None],
        chosen: Sequence[tuple[_core.LoadPlan, tuple[int | None, _Names]]],
        roads: Mapping[int | None, DeviceRoad],
    ) -> None:
        """All devices, and the host, at once. When one fails the others are cancelled, and nothing writes any more."""
        before, begin = stats.stages.get("read", 0.0), time.perf_counter()
        batches: list[Batch] = []
        failure: BaseException | None = None
        try:
            for plan, (place, names) in chosen:
                targets = [self._targets[tied[0]] for tied in names.values()]
                road = roads.get(place)
                if road is None:
                    memory = [
                        import_target(tied[0], self._targets[tied[0]], self._size(p)) for p, tied in names.items()
                    ]
                    batches.append(reader.start(plan, memory, whole=self._whole))
                else:
                    batches.append(
                        reader.start(plan, road.destinations(targets), road=road, tensors=targets, whole=self._whole)
                    )
        except BaseException as error:
            failure = error
        for batch, (plan, (_, names)), batch_tick in zip(batches, chosen, ticks, strict=False):
            if failure is not None:
                batch.operation.cancel()
            try:
                reader.finish(batch, stats, batch_tick)
                if batch.road is not None:
                    batch.road.hand_out(batch.tensors)
                stats.bytes += plan.wanted_bytes
            except BaseException as error:  # of what was cancelled, the first error is the one that counts
                failure = failure or error
            unfinished = set(batch.operation.unfinished_regions())
            for region, tied in enumerate(names.values()):
                self.loaded += tied if region not in unfinished else []
        stats.stages["read"] = before + time.perf_counter() - begin  # they ran beside each other
        if failure is not None:
            raise failure

    def _run_staged(
        self,
        reader: StoreReader,
        stats: LoadStats,
        done: _Progress,
        chosen: _Names,
        window_bytes: int,
        road: DeviceRoad | None,
    ) -> Generator[bool, None, None]:
        """Fill what is not received in place; yields after every batch."""
        if road is None:
            return self._run_window(reader, stats, done.part(self._files(chosen)), chosen, window_bytes, None)
        limit = max(1, road.extra_bytes)
        # What is larger than the bound on a device goes through host memory, and from there in slices.
        large = {position: names for position, names in chosen.items() if self._size(position) > limit}
        small = {position: names for position, names in chosen.items() if position not in large}
        if large:
            road.note_host_way(stats)
        return _one_by_one(
            self._run_window(reader, stats, done.part(self._files(small)), small, limit, road),
            self._run_window(
                reader, stats, done.part(self._files(large)), large, window_bytes, None, slice_bytes=limit
            ),
        )

    def _run_window(
        self,
        reader: StoreReader,
        stats: LoadStats,
        tick: Tick | None,
        chosen: _Names,
        window_bytes: int,
        road: DeviceRoad | None,
        slice_bytes: int | None = None,
    ) -> Generator[bool, None, None]:
        import torch

        plans = plans_of(
            reader, self._weights, sorted(chosen), window_bytes, into_tensors=road is not None, alone=False
        )
        specs = self._weights.specs
        batches = reader.stream(
            plans,
            window_bytes=window_bytes,
            stats=stats,
            tick=tick,
            reuse=True,
            road=road,
            empty=None if road is None else lambda plan: [road.empty(specs[p]) for p, _, _ in plan.placements()],
            whole=self._whole,
        )
        try:
            for batch in batches:
                for position, name, tensor in placed_tensors(batch, self._weights, chosen):
                    with torch.no_grad():
                        if slice_bytes is None:
                            self._targets[name].copy_(tensor)
                        else:
                            devices.copy_in_slices(self._targets[name], tensor, slice_bytes)
                    self.loaded.append(name)
                    stats.bytes += self._size(position)
                    stats.copied_bytes += self._size(position) if road is None else 0
                    del tensor
                del batch  # its memory is free before more is asked for
                yield True
        finally:
            batches.close()  # type: ignore[attr-defined]  # a generator: stops reading at once


class _Progress:
    """Bytes and files of several parts that run beside each other, as one count."""

    def __init__(self, tick: Tick | None) -> None:
        self._tick = tick
        self._bytes: list[int] = []
        self._files: list[set[str]] = []
        self._finished: list[AbstractSet[str]] = []

    def part(self, files: set[str]) -> Tick | None:
        """The tick of one more part, which has to do with `files`; make all parts before the first one ticks."""
        whole = self._tick
        if whole is None:
            return None
        number = len(self._files)
        self._bytes.append(0)
        self._files.append(files)
        self._finished.append(set())

        def tick(done: int, finished: AbstractSet[str]) -> None:
            self._bytes[number], self._finished[number] = done, finished
            whole(sum(self._bytes), self._done())

        return tick

    def _done(self) -> set[str]:
        """Files with which every part is through."""
        left = {file for files, done in zip(self._files, self._finished, strict=True) for file in files - done}
        return {file for files in self._files for file in files} - left


def _one_by_one(*parts: Generator[bool, None, None]) -> Generator[bool, None, None]:
    for part in parts:
        yield from part


def _number(place: int | None) -> int:
    return -1 if place is None else place


def _host_first(entry: tuple[int | None, _Names]) -> int:
    return _number(entry[0])

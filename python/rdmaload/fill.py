"""Fills existing tensors: those that can be received in place, then the others through a bounded buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rdmaload.reader import StoreReader, Tick
from rdmaload.report import Report
from rdmaload.selection import RankTensors, placed_tensors, plans_of
from rdmaload.stats import LoadStats
from rdmaload.targets import Targets
from rdmaload.tensors import import_target

__all__ = ["Filling"]


class Filling:
    """One load into `targets`; `names` are those that each selected stored tensor is delivered under."""

    def __init__(
        self, weights: RankTensors, names: Mapping[int, Sequence[str]], targets: Targets, *, cast: bool
    ) -> None:
        self.loaded: list[str] = []
        """Targets that are complete."""
        self._weights = weights
        self._targets = targets
        self._in_place: dict[int, list[str]] = {}  # by stored tensor: its first target, and those tied to that
        self._staged: dict[int, list[str]] = {}
        for position, given in names.items():
            for name in given:
                if name in targets:
                    self._assign(position, name, targets.direct(name, cast=cast))

    def _assign(self, position: int, name: str, direct: bool) -> None:
        first = self._in_place.get(position)
        if first is not None and self._targets.is_same_memory(name, first[0]):
            first.append(name)
            return
        is_free = self._targets.claim(name)
        if direct and first is None and is_free:
            self._in_place[position] = [name]
        else:
            self._staged.setdefault(position, []).append(name)

    def run(self, reader: StoreReader, stats: LoadStats, report: Report, window_bytes: int) -> None:
        """Read everything. Raises the first error; `loaded` says what is complete all the same."""
        specs = self._weights.specs
        plan = reader.plan(self._weights.native, list(self._in_place), into_tensors=True)
        destinations = [
            import_target(names[0], self._targets[names[0]], specs[position].nbytes)
            for position, names in self._in_place.items()
        ]
        tick = report.expect(plan.read_bytes + sum(specs[position].nbytes for position in self._staged))
        batch = reader.start(plan, destinations)
        try:
            reader.finish(batch, stats, tick)
        finally:
            unfinished = set(batch.operation.unfinished_regions())
            for region, tied in enumerate(self._in_place.values()):
                self.loaded += tied if region not in unfinished else []
        stats.bytes += plan.wanted_bytes
        self._run_staged(
            reader, stats, None if tick is None else lambda done: tick(plan.read_bytes + done), window_bytes
        )

    def _run_staged(self, reader: StoreReader, stats: LoadStats, tick: Tick | None, window_bytes: int) -> None:
        import torch

        plans = plans_of(reader, self._weights, sorted(self._staged), window_bytes)
        for batch in reader.stream(plans, window_bytes=window_bytes, stats=stats, tick=tick, reuse=True):
            for position, name, tensor in placed_tensors(batch, self._weights, self._staged):
                with torch.no_grad():
                    self._targets[name].copy_(tensor)
                self.loaded.append(name)
                stats.bytes += self._weights.specs[position].nbytes
                stats.copied_bytes += self._weights.specs[position].nbytes

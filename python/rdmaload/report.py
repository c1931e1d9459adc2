"""Times one operation, fills its stats, tells its progress callback, and counts it for this process's metrics."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rdmaload import metrics
from rdmaload.meter import Meter, ProgressCallback
from rdmaload.reader import Tick
from rdmaload.stats import LoadStats

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from typing_extensions import Self

__all__ = ["ProgressCallback", "Report"]


class Report:
    """One operation, as a context: it ends well when the context is left without an error."""

    def __init__(self, operation: str, stats: LoadStats, progress: ProgressCallback | None) -> None:
        self.stats = stats
        self._operation = operation
        self._meter = None if progress is None else Meter(operation, progress, stage="read")
        self._before = metrics.said_before(stats)
        stats.bytes = 0
        self._begin = time.perf_counter()

    def __enter__(self) -> Self:
        metrics.began(self._operation)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stats.seconds = time.perf_counter() - self._begin
        metrics.ended(self._operation, self.stats, error, self._before)
        if error is None and self._meter is not None:
            self._meter.finish()

    def expect(self, nbytes: int, files: int) -> Tick | None:
        """From now on so many bytes of so many files are to be done; the tick that reports them, if anybody listens."""
        if self._meter is None:
            return None
        self._meter.bytes_total, self._meter.files_total = nbytes, files
        return self._tick

    def _tick(self, done: int, finished: AbstractSet[str]) -> None:
        assert self._meter is not None
        self._meter.update(done, len(finished))

    def stage(self, name: str, begin: float) -> None:
        self.stats.stages[name] = self.stats.stages.get(name, 0.0) + time.perf_counter() - begin

"""Times one operation, fills its stats and tells its progress callback."""

from __future__ import annotations

import time
from collections.abc import Callable

from rdmaload.reader import Tick
from rdmaload.stats import LoadStats, Progress

__all__ = ["ProgressCallback", "Report"]

ProgressCallback = Callable[[Progress], None]


class Report:
    """Times one operation, fills its stats and calls its progress callback."""

    def __init__(self, operation: str, stats: LoadStats, progress: ProgressCallback | None, files: int) -> None:
        self.stats = stats
        self._operation = operation
        self._progress = progress
        self._files = files
        self._total = 0
        self._begin = time.perf_counter()

    def expect(self, nbytes: int) -> Tick | None:
        """From now on `nbytes` are to be read; the tick that reports them, if anybody listens."""
        self._total = nbytes
        return self.tick if self._progress is not None else None

    def tick(self, done: int) -> None:
        if self._progress is None:
            return
        finished = self._files if done >= self._total else 0
        seconds = time.perf_counter() - self._begin
        self._progress(Progress(self._operation, done, self._total, finished, self._files, seconds))

    def stage(self, name: str, begin: float) -> None:
        self.stats.stages[name] = self.stats.stages.get(name, 0.0) + time.perf_counter() - begin

    def end(self) -> None:
        self.stats.seconds = time.perf_counter() - self._begin

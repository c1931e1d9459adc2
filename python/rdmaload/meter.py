"""Makes the `Progress` of one operation out of counts as they come: never backwards, the end only at the end."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from rdmaload.stats import Progress

__all__ = ["Meter", "ProgressCallback"]

ProgressCallback = Callable[[Progress], None]

_MEMORY_SECONDS = 3.0  # what is so long past counts a third in the rate: steady to look at, and soon true again


class Meter:
    """Calls `callback`, one call at a time; its counts may come from several threads."""

    def __init__(
        self,
        operation: str,
        callback: ProgressCallback,
        *,
        bytes_total: int = 0,
        files_total: int = 0,
        stage: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.bytes_total = bytes_total
        self.files_total = files_total
        self._operation = operation
        self._callback = callback
        self._clock = clock
        self._lock = threading.Lock()
        # Guarded by _lock, as is what follows.
        self._stage = stage
        self._bytes = self._files = self._skipped = 0
        self._begin = self._last = clock()
        self._moved = self._spent = 0.0  # bytes and seconds, each counted less the longer ago it was

    def update(self, bytes_done: int, files_done: int, skipped_bytes: int = 0) -> None:
        """Report these counts, or what was reported before where that was more: something may have started anew.

        What says that all is done is not passed on: `finish` does that, when it is certain.
        """
        with self._lock:
            if bytes_done < self.bytes_total:
                self._count(bytes_done, files_done, skipped_bytes)
                self._tell()

    def enter(self, stage: str) -> None:
        """Report that the operation is at `stage` now."""
        with self._lock:
            self._stage = stage
            self._tell()

    def finish(self, skipped_bytes: int = 0) -> None:
        """Report that everything is done."""
        with self._lock:
            self._count(self.bytes_total, self.files_total, skipped_bytes)
            self._tell()

    def _count(self, bytes_done: int, files_done: int, skipped_bytes: int) -> None:
        now = self._clock()
        skipped = max(self._skipped, skipped_bytes)
        moved = max(0, bytes_done - self._bytes - (skipped - self._skipped))
        fading = math.exp(-(now - self._last) / _MEMORY_SECONDS)
        self._moved = self._moved * fading + moved
        self._spent = self._spent * fading + (now - self._last)
        self._last, self._skipped = now, skipped
        self._bytes = max(self._bytes, bytes_done)
        self._files = max(self._files, min(files_done, self.files_total))

    def _tell(self) -> None:
        self._callback(
            Progress(
                self._operation,
                self._bytes,
                self.bytes_total,
                self._files,
                self.files_total,
                self._clock() - self._begin,
                self._moved / self._spent if self._spent > 0 else 0.0,
                self._stage,
                self._skipped,
            )
        )

"""What a process holds: memory, descriptors, threads, objects of ours, connections that only the peer has closed.

before = Footprint.of_process()
...
assert Footprint.settled(before).beyond(before) == []
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Footprint", "anonymous_bytes", "growth_bytes"]

# How long what has been closed may take to be gone: joining a thread takes the kernel milliseconds.
SETTLE_SECONDS = 5.0
CLOSE_WAIT = "08"  # the state as /proc/net/tcp spells it

_libc = ctypes.CDLL(None)


def anonymous_bytes() -> int:
    """Resident memory that no file backs, after the garbage is collected and free heap is given back."""
    gc.collect()
    _libc.malloc_trim(0)
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


def growth_bytes(samples: Sequence[int]) -> float:
    """From the median of the first third of the samples to that of the last third."""
    third = len(samples) // 3
    if third == 0:
        raise ValueError(f"{len(samples)} samples have no thirds")
    return statistics.median(samples[-third:]) - statistics.median(samples[:third])


@dataclass(frozen=True)
class Footprint:
    """Everything but memory, which is compared by `growth_bytes`: it never is exactly the same."""

    descriptors: int
    threads: int
    close_wait: int
    objects: Counter[str]
    """Live instances of rdmaload's classes, extension included."""

    @classmethod
    def of_process(cls) -> Footprint:
        gc.collect()
        targets = []
        for entry in Path("/proc/self/fd").iterdir():
            try:
                targets.append(os.readlink(entry))
            except OSError:  # the descriptor of the listing itself
                continue
        targets = [target for target in targets if not re.fullmatch(r"/proc/\d+/fd", target)]
        sockets = {target[len("socket:[") : -1] for target in targets if target.startswith("socket:[")}
        close_wait = 0
        for table in ("tcp", "tcp6"):
            path = Path("/proc/self/net") / table
            for line in path.read_text().splitlines()[1:] if path.exists() else []:
                words = line.split()
                close_wait += words[3] == CLOSE_WAIT and words[9] in sockets
        objects = Counter(
            f"{type(item).__module__}.{type(item).__qualname__}"
            for item in gc.get_objects()
            if str(type(item).__module__).split(".")[0] == "rdmaload"
        )
        return cls(len(targets), len(list(Path("/proc/self/task").iterdir())), close_wait, objects)

    @classmethod
    def settled(cls, before: Footprint) -> Footprint:
        """As it is once it is no more than `before`, or after five seconds in which it stayed more."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while (now := cls.of_process()).beyond(before) and time.monotonic() < deadline:
            time.sleep(0.01)
        return now

    def beyond(self, before: Footprint) -> list[str]:
        """What there is more of than before, in words; empty when nothing is."""
        found = [
            f"{name}: {getattr(before, name)} before, {getattr(self, name)} now"
            for name in ("descriptors", "threads", "close_wait")
            if getattr(self, name) > getattr(before, name)
        ]
        more = self.objects - before.objects
        return found + [f"{name}: {count} more" for name, count in sorted(more.items())]

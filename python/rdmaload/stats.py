"""What a load or a save did, as data: filled while it runs, printed by the CLI, written to JSON.

One thread fills an object; read it after the call that it was given to has returned. GB are
decimal, times seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["JsonValue", "LoadStats", "Progress", "SaveStats"]

JsonValue = str | int | float | bool | None | Mapping[str, float]


def _rate(done_bytes: int, seconds: float) -> float:
    return done_bytes / seconds / 1e9 if seconds > 0 else 0.0


@dataclass
class LoadStats:
    """What one load moved and how: `stats=LoadStats()` is filled by the call.

    >>> LoadStats(bytes=2_000_000_000, seconds=0.5).gb_per_s
    4.0
    """

    bytes: int = 0
    """Bytes of tensors that were delivered."""
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds by stage, such as "open", "plan", "read"."""
    path: str = ""
    """The way that the bytes took, such as "resp-tcp" or "file-buffered"."""
    fallback_reason: str | None = None
    """Why a faster path was not taken; None when nothing was given up."""
    connections: int = 0
    retries: int = 0
    verified_bytes: int = 0
    """Bytes whose checksum was computed and matched."""
    unverified_bytes: int = 0
    """Bytes delivered for which the store has no checksum, or whose check was turned off."""
    copied_bytes: int = 0
    """Bytes that a CPU moved after they had reached user memory."""
    read_bytes: int = 0
    """Bytes asked of the store; more than `bytes` when chunks hold tensors that nobody selected."""
    generation: str | None = None
    cached_bytes: int = 0
    """The part of `read_bytes` that came from `cache_dir` and not from the store."""
    device_verified_bytes: int = 0
    """The part of `read_bytes` whose checksum was computed once more from GPU memory (`verify_device`)."""

    @property
    def gb_per_s(self) -> float:
        """Delivered decimal gigabytes per second."""
        return _rate(self.bytes, self.seconds)

    def to_json(self) -> dict[str, JsonValue]:
        """The fields by name, ready for `json.dumps`, in the order in which they are documented."""
        return {
            "bytes": self.bytes,
            "seconds": self.seconds,
            "gb_per_s": self.gb_per_s,
            "stages": dict(self.stages),
            "path": self.path,
            "fallback_reason": self.fallback_reason,
            "connections": self.connections,
            "retries": self.retries,
            "verified_bytes": self.verified_bytes,
            "unverified_bytes": self.unverified_bytes,
            "copied_bytes": self.copied_bytes,
            "read_bytes": self.read_bytes,
            "generation": self.generation,
            "cached_bytes": self.cached_bytes,
            "device_verified_bytes": self.device_verified_bytes,
        }


@dataclass
class SaveStats:
    """What one save sent and whether it published.

    >>> SaveStats(bytes=10**9, seconds=2.0).to_json()["gb_per_s"]
    0.5
    """

    bytes: int = 0
    """Bytes of files that this save has in the store, sent now or by the attempt it resumed."""
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    path: str = ""
    connections: int = 0
    retries: int = 0
    """Requests to the destination that were sent again, where its connector can tell."""
    files: int = 0
    chunks: int = 0
    skipped_bytes: int = 0
    """The part of `bytes` that an interrupted attempt had already sent."""
    generation: str | None = None
    save_id: str | None = None
    published: bool = False
    """Whether this process published the model; False for a rank that left it to another."""

    @property
    def gb_per_s(self) -> float:
        """Decimal gigabytes per second that were really sent: `skipped_bytes` do not count."""
        return _rate(self.bytes - self.skipped_bytes, self.seconds)

    def to_json(self) -> dict[str, JsonValue]:
        """The fields by name, ready for `json.dumps`, in the order in which they are documented."""
        return {
            "bytes": self.bytes,
            "seconds": self.seconds,
            "gb_per_s": self.gb_per_s,
            "stages": dict(self.stages),
            "path": self.path,
            "connections": self.connections,
            "retries": self.retries,
            "files": self.files,
            "chunks": self.chunks,
            "skipped_bytes": self.skipped_bytes,
            "generation": self.generation,
            "save_id": self.save_id,
            "published": self.published,
        }


@dataclass(frozen=True)
class Progress:
    """How far an operation is; `progress` callbacks get one about ten times a second, from any thread.

    From call to call no count gets smaller, and the totals stay. `bytes_done` is `bytes_total` in the last call only:
    when all has arrived and is verified, of a save when it is published. An operation that fails or is given up never
    gets there. Of an iteration, the last call comes when the iterator has ended.

    >>> half = Progress("load", 10**9, 4 * 10**9, files_done=1, files_total=4, seconds=0.5, rate=1e9)
    >>> half.gb_per_s, half.seconds_left
    (2.0, 3.0)
    """

    operation: str
    """"load", "save", "pull", "verify", "export", "bench", or "compare"."""
    bytes_done: int
    """Of a load: bytes of tensors, as in `LoadStats.bytes`; else bytes of files."""
    bytes_total: int
    files_done: int
    """Files of which everything that is wanted is done; of a save in SGLang's layout, values."""
    files_total: int
    """Files that the operation has to do with: of a load, those that the selected tensors are in."""
    seconds: float
    """Since the start."""
    rate: float = 0.0
    """Bytes per second over the last seconds: more recent ones count more."""
    stage: str = ""
    """What it is at: "read"; of a save "send", then "publish"; "checksum" of an export."""
    skipped_bytes: int = 0
    """The part of `bytes_done` that an interrupted save had already sent; no rate counts it."""

    @property
    def gb_per_s(self) -> float:
        """Decimal gigabytes per second since the start."""
        return _rate(self.bytes_done - self.skipped_bytes, self.seconds)

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None while nothing moves."""
        left = self.bytes_total - self.bytes_done
        return 0.0 if left <= 0 else left / self.rate if self.rate > 0 else None

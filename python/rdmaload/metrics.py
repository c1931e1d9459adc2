"""Counters over everything that this process has loaded and saved, for Prometheus.

    print(rdmaload.metrics.exposition())     # the text that Prometheus reads
    rdmaload.metrics.publish()               # or as metrics of prometheus_client, which serves them

Where an engine works with prometheus_client, `publish` is called by the first operation: the counters then stand beside
the engine's own. They are those of one process; docs/metrics.md says how the processes of an engine come together.
Thread-safe. Nothing here can make a load fail.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rdmaload.errors import NotSupportedError, PartialLoadError
from rdmaload.stats import LoadStats, SaveStats

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = [
    "CONTENT_TYPE",
    "Family",
    "began",
    "ended",
    "exposition",
    "failed_to_open",
    "publish",
    "render",
    "said_before",
]

_log = logging.getLogger("rdmaload")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Each reason is a time series that Prometheus keeps, and reasons quote what differs from load to load.
_MOST_REASONS = 20
_REASON_CHARACTERS = 120
_OTHER_REASON = "others"

_MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own switch: processes share files in that directory

_Key = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """One metric: its name, "counter" or "gauge", what it means, and the names of its labels."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()


_OUTCOME = Family(
    "rdmaload_operations_total",
    "counter",
    "Operations that ended: load, save, pull, verify; outcome is ok, failed or stopped (an iteration given up).",
    ("operation", "path", "outcome"),
)
_BYTES = Family("rdmaload_bytes_total", "counter", "Bytes delivered, or saved.", ("operation", "path"))
_SECONDS = Family("rdmaload_seconds_total", "counter", "Seconds that operations took.", ("operation", "path"))
_STAGES = Family(
    "rdmaload_stage_seconds_total",
    "counter",
    "Seconds by stage; those of threads beside each other are summed.",
    ("operation", "stage"),
)
_RETRIES = Family("rdmaload_retries_total", "counter", "Reads and requests that were sent again.", ("operation",))
_FAILURES = Family("rdmaload_failures_total", "counter", "Operations that failed.", ("operation", "error"))
_FALLBACKS = Family(
    "rdmaload_fallbacks_total", "counter", "Operations that a faster path was not open to.", ("operation", "reason")
)
_RUNNING = Family("rdmaload_operations_running", "gauge", "Operations under way.", ("operation",))
_OF_LOADS = {
    field: Family(f"rdmaload_{field}_total", "counter", text, ("operation",))
    for field, text in (
        ("read_bytes", "Bytes asked of the store."),
        ("verified_bytes", "Bytes whose checksum matched."),
        ("unverified_bytes", "Bytes that no checksum was compared for."),
        ("copied_bytes", "Bytes that a CPU moved after they had reached user memory."),
        ("cached_bytes", "Bytes that came from cache_dir."),
    )
}
_SKIPPED = Family(
    "rdmaload_skipped_bytes_total", "counter", "Bytes that an interrupted save had already sent.", ("operation",)
)
_FAMILIES = (
    _OUTCOME,
    _BYTES,
    _SECONDS,
    _STAGES,
    *_OF_LOADS.values(),
    _SKIPPED,
    _RETRIES,
    _FAILURES,
    _FALLBACKS,
    _RUNNING,
)


class _Published:
    """The counters as metrics of prometheus_client, in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Gauge

        self.registry = registry
        self._metrics: dict[str, Any] = {}  # Any: its types differ from release to release
        for family in _FAMILIES:
            if family.kind == "counter":
                made: Any = Counter(family.name, family.help, family.labels, registry=registry)
            else:  # of all processes that live
                made = Gauge(family.name, family.help, family.labels, registry=registry, multiprocess_mode="livesum")
            self._metrics[family.name] = made

    def add(self, name: str, labels: tuple[str, ...], amount: float) -> None:
        self._metrics[name].labels(*labels).inc(amount)


class _Counts:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        # Guarded by lock, as is what follows.
        self.values: dict[_Key, float] = {}
        self.published: list[_Published] = []
        self.settled = False  # whether to publish unasked is decided

    def add(self, amounts: Iterable[tuple[Family, tuple[str, ...], float]]) -> None:
        with self.lock:
            for family, labels, amount in amounts:
                if family is _FALLBACKS:
                    labels = (labels[0], self._bounded(labels[1]))
                key = family.name, labels
                self.values[key] = self.values.get(key, 0.0) + amount
                for one in self.published:
                    one.add(*key, amount)

    def _bounded(self, reason: str) -> str:
        known = {labels[1] for name, labels in self.values if name == _FALLBACKS.name}
        reason = reason[:_REASON_CHARACTERS]
        return reason if reason in known or len(known) < _MOST_REASONS else _OTHER_REASON

    def publish(self, registry: CollectorRegistry) -> None:
        with self.lock:
            self.settled = True
            if any(one.registry is registry for one in self.published):
                return
            made = _Published(registry)
            for key, value in self.values.items():
                made.add(*key, value)
            self.published.append(made)


_counts = _Counts()


def _forget() -> None:
    """A forked child counts for itself; the lock may be held by a thread that it does not have."""
    _counts.lock = threading.Lock()
    _counts.values = {}


os.register_at_fork(after_in_child=_forget)


def publish(registry: CollectorRegistry | None = None) -> None:
    """Show the counters in a registry of prometheus_client, by default its own; all that was counted so far, too.

    Again for the same registry does nothing. Raises NotSupportedError where prometheus_client is not installed.
    """
    try:
        from prometheus_client import REGISTRY
    except ImportError as error:
        raise NotSupportedError(
            "metrics.publish() needs prometheus_client: pip install prometheus-client, or serve metrics.exposition()"
        ) from error
    _counts.publish(REGISTRY if registry is None else registry)


def exposition() -> str:
    """All counters in Prometheus' text format; its content type is `CONTENT_TYPE`."""
    with _counts.lock:
        values = dict(_counts.values)
    return render(
        (family, (sample for sample in values.items() if sample[0][0] == family.name)) for family in _FAMILIES
    )


def render(families: Iterable[tuple[Family, Iterable[tuple[_Key, float]]]]) -> str:
    """Metrics as text: of each its values by labels. What has no value is left out."""

    def lines() -> Iterator[str]:
        for family, samples in families:
            for number, ((name, values), value) in enumerate(sorted(samples)):
                if number == 0:
                    yield f"# HELP {name} {family.help}"
                    yield f"# TYPE {name} {family.kind}"
                labels = ",".join(
                    f'{label}="{_escaped(text)}"' for label, text in zip(family.labels, values, strict=True)
                )
                yield f"{name}{{{labels}}} {_number(value)}" if labels else f"{name} {_number(value)}"

    return "".join(f"{line}\n" for line in lines())


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def began(operation: str) -> None:
    """Count an operation as under way; each ends with `ended`."""
    try:
        _publish_beside_others()
        _counts.add([(_RUNNING, (operation,), 1)])
    except Exception as error:  # whatever a registry says: a load is worth more than its counters
        _log.warning("metrics are not counted: %s", str(error))


def ended(
    operation: str, stats: LoadStats | SaveStats, error: BaseException | None, before: Mapping[str, float] | None = None
) -> None:
    """Count what an operation did, and how it ended. `before`: what `stats` said already when it began."""
    try:
        _counts.add([(_RUNNING, (operation,), -1), *_amounts(operation, stats, error, before or {})])
    except Exception as failure:  # as above
        _log.warning("metrics are not counted: %s", str(failure))  # its traceback holds the load's tensors


def _amounts(
    operation: str, stats: LoadStats | SaveStats, error: BaseException | None, before: Mapping[str, float]
) -> Iterator[tuple[Family, tuple[str, ...], float]]:
    stopped = isinstance(error, GeneratorExit | KeyboardInterrupt)
    yield _OUTCOME, (operation, stats.path, "ok" if error is None else "stopped" if stopped else "failed"), 1
    yield _BYTES, (operation, stats.path), stats.bytes
    yield _SECONDS, (operation, stats.path), stats.seconds
    for stage, seconds in stats.stages.items():
        yield _STAGES, (operation, stage), seconds - before.get(f"stage {stage}", 0.0)
    yield _RETRIES, (operation,), stats.retries - before.get("retries", 0)
    if isinstance(stats, SaveStats):
        yield _SKIPPED, (operation,), stats.skipped_bytes
    else:
        for field, family in _OF_LOADS.items():
            yield family, (operation,), getattr(stats, field) - before.get(field, 0)
        if stats.fallback_reason is not None:
            yield _FALLBACKS, (operation, stats.fallback_reason), 1
    if error is not None and not stopped:
        # What a PartialLoadError comes from says more.
        cause = error.__cause__ if isinstance(error, PartialLoadError) and error.__cause__ else error
        yield _FAILURES, (operation, type(cause).__name__), 1


def failed_to_open(error: BaseException) -> None:
    """Count a model that could not be opened: nothing was loaded, nor began to be."""
    try:
        _publish_beside_others()
        _counts.add([(_FAILURES, ("open", type(error).__name__), 1)])
    except Exception as failure:  # as above
        _log.warning("metrics are not counted: %s", str(failure))


def said_before(stats: LoadStats) -> dict[str, float]:
    """What stats that were filled before say already, for `ended`."""
    said = {f"stage {stage}": seconds for stage, seconds in stats.stages.items()}
    return {**said, "retries": stats.retries, **{field: getattr(stats, field) for field in _OF_LOADS}}


def _publish_beside_others() -> None:
    """Publish, once, where this process works with prometheus_client or is told to share its metrics by files."""
    if _counts.settled or not ("prometheus_client" in sys.modules or os.environ.get(_MULTIPROCESS)):
        return
    _counts.settled = True  # also where it fails: once is enough to say so
    try:
        publish()
    except NotSupportedError:  # another language's processes may share the directory
        _log.debug("%s is set, and prometheus_client is not installed", _MULTIPROCESS)

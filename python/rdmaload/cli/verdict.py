"""From what `bench` measured to words: what limits a load, and what to set. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from rdmaload.amounts import size_text
from rdmaload.cli.rates import Figure

__all__ = ["Findings", "Limit", "Verdict", "judge"]

Limit = Literal["store", "network", "distance", "memory", "checksum", "pcie", "cpu", "sample"]

_REACHES = 0.8  # of a stage's rate alone: a load that runs so fast is limited by that stage
_OUTRAN = 1.15  # times its rate: more than noise
_STEADY = 1.5  # times the slowest: beyond that the median is a matter of luck
_SAME = 0.85  # of what it contains: the outer one is as good as the limit
_GAIN = 1.1  # less than a tenth is not worth a setting, and within the noise
_ENOUGH_SAMPLE_BYTES = 50e6  # below this, connecting and planning are what is timed
_CHUNK_BYTES = (250_000, 2 << 20)  # between these a key-value store is fast, by docs/performance.md
_ROUND_TRIPS_IN_FLIGHT = 2  # what is asked for while the last answer is on its way, and room for jitter


@dataclass(frozen=True)
class Findings:
    """What was measured, and the settings that it was measured with."""

    kind: Literal["server", "files", "python"]
    sample_bytes: int
    load: Figure
    store: Mapping[int, Figure]
    """By connections (for files: threads), into memory touched before, without checksums."""
    configured: int
    """Connections, or threads, that the load used; a key of `store`."""
    fresh: Figure
    """Over as many threads as the load has."""
    small_pages: Figure
    touched: Figure
    cpus: int
    checksum: Figure | None = None
    """One core's; None when the load verified nothing."""
    stream: Figure | None = None
    """Between two sockets of this machine, where the store is on it."""
    round_trip: float | None = None
    """Seconds."""
    bytes_in_flight: int = 0
    link: float | None = None
    """Bytes per second of the network device towards the store; None when unknown or not in the way."""
    chunk_bytes: int | None = None
    """Of the values in a key-value store; None where something else keeps the model."""
    to_device: Figure | None = None
    """From page-locked memory to the GPU that loads go to; None where they stay in host memory."""
    huge_pages: str = ""
    """"always", "madvise", "never" or "" (unknown)."""
    congestion_control: str = ""


@dataclass(frozen=True)
class Verdict:
    limit: Limit
    text: str
    advice: tuple[str, ...]


def judge(found: Findings) -> Verdict:
    """The limit, in words, and what would move it."""
    limit, subject, rate = _limit(found)
    if found.sample_bytes < _ENOUGH_SAMPLE_BYTES:
        text = (
            f"{size_text(found.sample_bytes)} are too little to say what is the limit: bench a model of at least "
            f"{size_text(_ENOUGH_SAMPLE_BYTES)}"
        )
        return Verdict("sample", text, ())
    load = found.load.median
    if limit == "cpu":
        text = (
            f"{subject} share {found.cpus} CPUs, and none of them alone is the limit: a load ran at {_gb(load)} GB/s, "
            f"the one nearest above that alone at {_gb(rate)}"
        )
    elif load > _OUTRAN * rate:
        text = (
            f"{subject} is the likeliest limit, but the figures are unsteady: a load ran at {_gb(load)} GB/s, and that "
            f"alone at {_gb(rate)}"
        )
    elif load > rate:
        text = f"{subject} is the limit: a load ran at {_gb(load)} GB/s, as fast as that alone ({_gb(rate)})"
    else:
        text = f"{subject} is the limit: a load ran at {_gb(load)} of {_gb(rate)} GB/s"
    return Verdict(limit, text, tuple(_advice(found, limit, rate)))


def _gb(rate: float) -> str:
    return f"{rate / 1e9:.1f}" if rate >= 1e8 else f"{rate / 1e9:.3f}"


def _best(found: Findings) -> int:
    return max(found.store, key=lambda count: found.store[count].median)


def _scales(found: Findings) -> bool:
    """Whether more connections are faster than few."""
    return found.store[_best(found)].median >= _GAIN * found.store[min(found.store)].median


def _limit(found: Findings) -> tuple[Limit, str, float]:
    """Which it is, what to call it, and its rate alone."""
    store = found.store[found.configured].median
    rates: list[tuple[Limit, str, float]] = [
        (*_store_side(found, store), store),
        (
            ("memory", "finding and clearing fresh memory", found.fresh.median)
            if found.to_device is None
            else ("pcie", "the way to the GPU (PCIe)", found.to_device.median)
        ),
    ]
    if found.checksum is not None:
        workers = max(1, min(found.configured, found.cpus))
        rates.append(("checksum", "the checksum", found.checksum.median * workers))
    # What a load outran is not its limit: it was slower only while it was measured.
    load = found.load.median
    possible = [entry for entry in rates if entry[2] * _OUTRAN >= load]
    outrun = max((entry for entry in rates if entry not in possible), key=lambda entry: entry[2], default=None)
    nearest = min(possible, key=lambda entry: entry[2], default=None)
    if nearest is not None and load >= _REACHES * nearest[2]:
        return nearest
    # Unless nothing else is as near to the load: then it is still the likeliest one.
    if outrun is not None and (nearest is None or load / outrun[2] < nearest[2] / load):
        return outrun
    assert nearest is not None
    stages = [
        "reading" if found.checksum is None else "receiving",
        "fresh memory" if found.to_device is None else "copies to the GPU",
        *([] if found.checksum is None else ["checksums"]),
    ]
    return "cpu", f"{', '.join(stages[:-1])} and {stages[-1]}", nearest[2]


def _store_side(found: Findings, store: float) -> tuple[Limit, str]:
    if found.kind == "files":
        return "store", "reading the files"
    if found.kind == "python":
        return "store", "the connector's Python code"
    if found.round_trip and store > _SAME * found.bytes_in_flight / found.round_trip:
        return "distance", f"the round trip of {found.round_trip * 1000:.2f} ms"
    if found.link is not None and store > _SAME * found.link:
        return "network", f"the network device ({size_text(found.link)}/s)"
    if found.stream is not None and store > _SAME * found.stream.median:
        return "network", "loopback, which carries no more in one stream,"
    return "store", "the store" if _scales(found) or len(found.store) == 1 else "the store's single thread"


def _advice(found: Findings, limit: Limit, rate: float) -> Iterator[str]:
    loads = found.load.samples
    if max(loads) > _STEADY * min(loads):
        yield (
            f"loads ran at {_gb(min(loads))} to {_gb(max(loads))} GB/s: raise --repeat, or wait until the machine (or "
            "the host of this virtual one) does nothing else"
        )
    elif limit != "cpu" and found.load.median > _OUTRAN * rate:
        yield "raise --repeat: a load does not run faster than its slowest stage, so one of them was disturbed"
    elif len(loads) == 1:
        yield "raise --repeat: measured once, nothing says how steady these figures are"
    best = _best(found)
    now, then = found.store[found.configured], found.store[best]
    # Its worst must beat the best of what is set now, or it may be chance.
    if then.median > _GAIN * now.median and min(then.samples) > max(now.samples):
        name = "threads" if found.kind != "server" else "connections"
        yield (
            f"set {name}={best}: the store gave {_gb(then.median)} GB/s with it, {_gb(now.median)} with "
            f"{found.configured}"
        )
    if limit == "distance" and found.round_trip:
        target = found.link or found.fresh.median
        wanted = max(2 * found.bytes_in_flight, int(_ROUND_TRIPS_IN_FLIGHT * found.round_trip * target))
        yield (
            f"set bytes_in_flight={-(-wanted // 2**20)}MiB: {size_text(found.bytes_in_flight)} per round trip are at "
            f"most {_gb(found.bytes_in_flight / found.round_trip)} GB/s"
        )
    low, high = _CHUNK_BYTES
    if found.chunk_bytes is not None and not low <= found.chunk_bytes <= high:
        yield f"save the model again with the default chunk size: {size_text(found.chunk_bytes)} are slow to send"
    if found.stream is not None and found.congestion_control == "bbr":
        yield "let the store's machine use cubic or reno: bbr paces what stays on one machine"
    if found.huge_pages == "never":
        yield "allow huge pages (echo madvise > /sys/kernel/mm/transparent_hugepage/enabled): fresh memory costs less"
    if limit == "memory":
        yield "load_into() memory that is there already, or weight_iterator(borrow=True): neither needs fresh memory"
    if limit == "pcie":
        yield (
            "see by nvidia-smi -q that the GPU's link has its full width and generation, and by nvidia-smi topo -m "
            "that this process runs on the CPUs beside it"
        )
    if limit == "cpu" and found.cpus < 4:
        yield f"give the process more than {found.cpus} CPUs: receiving, clearing and checksums then overlap"
    if limit == "checksum":
        yield "raise connections: each has a thread that verifies; verify=off gives speed for safety"
    if found.kind == "python":
        yield "a native transport (native_transport() of the connector) reads without Python"
    if limit == "store" and found.kind == "server" and not _scales(found):
        yield "more connections do not help: several servers, or one with io-threads, would"

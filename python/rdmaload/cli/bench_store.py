"""Measures one model in its store: the same tensors over several connection counts, and as a whole load.

Everything is read, nothing is written. The rounds go through all measurements in turn, so that what else the
machine does meanwhile touches all of them alike.
"""

from __future__ import annotations

import dataclasses
import glob
import ipaddress
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rdmaload.cli import rates
from rdmaload.cli.rates import Figure
from rdmaload.cli.verdict import Findings
from rdmaload.errors import NotSupportedError
from rdmaload.meter import Meter
from rdmaload.stats import LoadStats, Progress

if TYPE_CHECKING:
    import torch

    from rdmaload.cli.peers import Contest
    from rdmaload.connectors import Connector
    from rdmaload.model import Model
    from rdmaload.urls import Url

__all__ = ["Bench", "Result"]

_ROUND_TRIPS = 20
_LEAST_BYTES = 16 << 20  # of what is measured without the store, however small the model
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")


@dataclass(frozen=True)
class Result:
    """What was found, and what the report says besides."""

    url: str
    findings: Findings
    model_bytes: int
    stats: LoadStats
    """Of the last load."""
    contest: Contest | None = None


class Bench:
    """One run of `rdmaload bench`: its parameters, and what a round needs while it goes on."""

    def __init__(
        self,
        location: Url,
        opts: Mapping[str, object],
        *,
        rank: int | None,
        nbytes: int,
        repeat: int,
        connections: Sequence[int],
        device: str,
        peers: Sequence[str],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._location = location
        self._opts = dict(opts)
        self._rank = rank
        self._nbytes = nbytes
        self._repeat = repeat
        self._connections = connections
        self._device = device
        self._peers = peers
        self._meter = None if progress is None else Meter("bench", progress)
        self._stats = LoadStats()

    def run(self) -> Result:
        from rdmaload import host_memory
        from rdmaload.connectors import KeyValueConnector, connector_for
        from rdmaload.connectors.registry import connector_class
        from rdmaload.devices import checked_device
        from rdmaload.model import Model

        place = checked_device(self._device)
        if place.type not in ("cpu", "cuda"):
            raise NotSupportedError(f"--device {self._device}: bench measures loads into host memory and CUDA devices")
        self._device = str(place)
        is_store = issubclass(connector_class(self._location.scheme), KeyValueConnector)
        with ExitStack() as stack:
            connector = stack.enter_context(connector_for(self._location, **self._opts))  # type: ignore[arg-type]
            model = stack.enter_context(Model(connector))
            names, sample_bytes = self._sample(model)
            # The tensors that are read into stay; beside them there is one load, or the fresh memory.
            host_memory.require(2 * sample_bytes, limit=connector.options.max_host_bytes, url=model.url)
            # Also brings a file into the page cache: what is measured here is warm.
            scratch = model.load(rank=self._rank, include=names, stats=self._stats)
            kind = self._kind()
            configured = connector.connections if kind == "server" else connector.options.threads
            counts = sorted({*self._connections, configured})
            readers = {count: stack.enter_context(self._reader(model, count)) for count in counts}
            local = is_store and _is_local(self._location)
            measured = self._rounds(model, readers, scratch, names, sample_bytes, local)
            if self._meter is not None:
                self._meter.finish()
            round_trip = _round_trip(connector) if kind == "server" else None
            findings = Findings(
                kind=kind,
                sample_bytes=sample_bytes,
                load=measured["load"],
                store={count: measured[f"store, {count}"] for count in counts},
                configured=configured,
                fresh=measured["fresh memory"],
                small_pages=measured["fresh memory, small pages"],
                touched=measured["touched memory"],
                cpus=len(os.sched_getaffinity(0)),
                checksum=measured.get("checksum") if self._stats.verified_bytes else None,
                stream=measured.get("stream"),
                round_trip=round_trip,
                bytes_in_flight=connector.bytes_in_flight,
                link=None if local or kind != "server" else _link_rate(self._location),
                chunk_bytes=model.chunk_bytes if is_store and kind == "server" else None,
                to_device=measured.get("to the GPU"),
                huge_pages=_selected(_THP),
                congestion_control=_text(_CONGESTION),
            )
            del scratch
            contest = self._against(model) if self._peers else None
            return Result(model.url, findings, sum(file.size for file in model.files), self._stats, contest)

    def _against(self, model: Model) -> Contest:
        from rdmaload.cli.peers import compare_peers

        return compare_peers(
            self._peers,
            self._location,
            model,
            self._opts,
            rank=self._rank,
            device=self._device,
            nbytes=self._nbytes,
            repeat=self._repeat,
        )

    def _sample(self, model: Model) -> tuple[list[str] | None, int]:
        """Patterns for the first tensors, up to the bytes that were asked for; None when these are all."""
        specs = model.rank_tensors(self._rank)
        names: list[str] = []
        total = 0
        for name, spec in specs.items():
            if names and total + spec.nbytes > self._nbytes:
                break
            names.append(glob.escape(name))
            total += spec.nbytes
        return (None if len(names) == len(specs) else names), total

    def _kind(self) -> Literal["server", "files", "python"]:
        if self._stats.path.startswith("python"):
            return "python"
        return "files" if self._stats.path.startswith("file") else "server"

    def _reader(self, model: Model, count: int) -> Model:
        """The same generation over `count` connections, without checksums."""
        import rdmaload

        ours = {"connections": count, "threads": count, "verify": "off"}
        if model.generation is not None:
            ours["generation"] = model.generation
        query = {name: value for name, value in self._location.query.items() if name not in ours}
        location = dataclasses.replace(self._location, query=query)
        return rdmaload.open(location, **{**self._opts, **ours})  # type: ignore[arg-type]

    def _rounds(
        self,
        model: Model,
        readers: Mapping[int, Model],
        scratch: Mapping[str, torch.Tensor],
        names: list[str] | None,
        sample_bytes: int,
        local: bool,
    ) -> dict[str, Figure]:
        from rdmaload._core import crc32c_implementation

        unix = self._location.scheme.endswith("+unix")
        nbytes = max(sample_bytes, _LEAST_BYTES)
        workers = max(1, min(self._stats.connections, len(os.sched_getaffinity(0))))
        notes = {"checksum": f"one core, {crc32c_implementation()}", "load": self._stats.path}
        works: dict[str, Callable[[], float]] = {
            "fresh memory": lambda: rates.fresh_rate(nbytes, workers),
            "fresh memory, small pages": lambda: rates.small_page_rate(nbytes),
            "touched memory": lambda: rates.touched_rate(nbytes),
            "checksum": lambda: rates.checksum_rate(nbytes),
        }
        if local:
            works["stream"] = lambda: rates.stream_rate(nbytes, unix=unix)
            notes["stream"] = "between two unix sockets" if unix else "TCP over loopback"
        for count, reader in readers.items():
            works[f"store, {count}"] = lambda reader=reader: self._read(reader, scratch, names)  # type: ignore[misc]
        if self._device != "cpu":
            works["to the GPU"] = lambda: rates.device_rate(nbytes, self._device)
            notes["to the GPU"] = f"from page-locked memory to {self._device}"
        works["load"] = lambda: self._load(model, names)
        samples: dict[str, list[float]] = {name: [] for name in works}
        total = len(works) * self._repeat
        if self._meter is not None:
            self._meter.bytes_total, self._meter.files_total = total * sample_bytes, total
        for number in range(self._repeat):
            for position, (name, work) in enumerate(works.items()):
                samples[name].append(work())
                if self._meter is not None:
                    done = number * len(works) + position + 1
                    self._meter.update(done * sample_bytes, done)
        return {name: Figure(name, tuple(found), notes.get(name, "")) for name, found in samples.items()}

    def _read(self, reader: Model, scratch: Mapping[str, torch.Tensor], names: list[str] | None) -> float:
        stats = reader.load_into(scratch, rank=self._rank, include=names)
        return stats.bytes / stats.stages["read"]

    def _load(self, model: Model, names: list[str] | None) -> float:
        self._stats = LoadStats()
        model.load(rank=self._rank, include=names, stats=self._stats, device=self._device)
        return self._stats.bytes / self._stats.seconds


def _round_trip(connector: Connector) -> float | None:
    """Seconds until the store has said that something is not there; the median."""
    from rdmaload.connectors import KeyValueConnector

    if not isinstance(connector, KeyValueConnector):
        return None
    times = []
    for _ in range(_ROUND_TRIPS):
        begin = time.perf_counter()
        connector.exists(f"{connector.model}/bench")
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _selected(path: Path) -> str:
    return _text(path).partition("[")[2].partition("]")[0]


def _ways(location: Url) -> Iterator[tuple[str, str]]:
    """For each address of the store the address that this machine would talk to it from. Nothing is sent."""
    try:
        found = socket.getaddrinfo(location.host or "localhost", location.port or 1, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)
            except OSError:
                continue
            yield str(address[0]), str(probe.getsockname()[0])


def _is_local(location: Url) -> bool:
    """Whether the store is on this machine, by whatever name: more than a connector knows before it connects."""
    if location.scheme.endswith("+unix"):
        return True
    if location.scheme == "memory":
        return False  # there is no socket in between
    return any(there == here or ipaddress.ip_address(there).is_loopback for there, here in _ways(location))


def _link_rate(location: Url) -> float | None:
    """Bytes per second of the network device towards the store; None when the kernel does not know."""
    import fcntl
    import struct

    siocgifaddr = 0x8915
    addresses = {here for _, here in _ways(location)}
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                answer = fcntl.ioctl(probe, siocgifaddr, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has no address
        if socket.inet_ntoa(answer[20:24]) in addresses:
            speed = _text(Path("/sys/class/net") / name / "speed")  # Mbit/s; -1 for what has no speed
            return int(speed) * 1e6 / 8 if speed.isdecimal() and int(speed) > 0 else None
    return None

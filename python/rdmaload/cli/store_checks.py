"""What a store gives: does it answer, how far is it, what is it, has it room, is the model there.

Errors of the store are raised as they are: a check after the first that fails would say nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rdmaload.amounts import count_text, seconds_text, size_text
from rdmaload.cli.checks import Check

if TYPE_CHECKING:
    from rdmaload.connectors import FileConnector, KeyValueConnector
    from rdmaload.manifest import Manifest

__all__ = ["store_checks"]

_ROUND_TRIPS = 20

# 40 Gbit/s: below this, distance rather than the network's speed would be the limit.
_ENOUGH_BYTES_PER_SECOND = 5e9


def store_checks(url: str, opts: dict[str, object]) -> Iterator[Check]:
    """The checks of the store of `url`, as far as they succeed; the url may lack a model."""
    from rdmaload.connectors import FileConnector, KeyValueConnector, connector_for
    from rdmaload.urls import parse_url

    location = parse_url(url, require_model=False)
    with connector_for(location, **opts) as connector:  # type: ignore[arg-type]
        if isinstance(connector, KeyValueConnector):
            yield from _key_value(connector)
        elif isinstance(connector, FileConnector):
            yield _files(connector)


def _key_value(connector: KeyValueConnector) -> Iterator[Check]:
    from rdmaload.cli.rdma_checks import rdma_checks
    from rdmaload.cli.server_checks import room_check, server_checks
    from rdmaload.connectors.rdma import RdmaConnector
    from rdmaload.connectors.redis import RedisConnector
    from rdmaload.sources import read_manifest

    if isinstance(connector, RdmaConnector):
        yield from rdma_checks(connector)
    # Always absent, and never another model's: no model is named so.
    probe = f"{connector.model or 'rdmaload:doctor'}/doctor"
    started = time.perf_counter()
    connector.exists(probe)
    yield Check("connection", "ok", f"{connector.url} in {seconds_text(time.perf_counter() - started)}")
    yield _round_trip(connector, probe)
    if isinstance(connector, RedisConnector):
        yield from server_checks(connector)
    if connector.model:
        manifest = read_manifest(connector)
        yield _model(manifest)
        if manifest is not None and isinstance(connector, RedisConnector):
            yield room_check(connector, manifest.bytes)


def _round_trip(connector: KeyValueConnector, probe: str) -> Check:
    times = []
    for _ in range(_ROUND_TRIPS):
        started = time.perf_counter()
        connector.exists(probe)
        times.append(time.perf_counter() - started)
    median = statistics.median(times)
    value = f"{median * 1000:.2f} ms (median of {_ROUND_TRIPS})"
    in_flight = connector.bytes_in_flight
    if in_flight / median < _ENOUGH_BYTES_PER_SECOND:
        wanted = median * _ENOUGH_BYTES_PER_SECOND / 2**20
        return Check(
            "round trip",
            "warn",
            value,
            f"bytes_in_flight={in_flight} limits a load to {size_text(in_flight / median)}/s over "
            f"that distance; {wanted:.0f}MiB would allow {size_text(_ENOUGH_BYTES_PER_SECOND)}/s",
        )
    return Check("round trip", "ok", value)


def _model(manifest: Manifest | None) -> Check:
    if manifest is None:
        return Check("model", "ok", "nothing is published under this name")
    return Check(
        "model",
        "ok",
        f"{manifest.kind}, {count_text(manifest.files, 'file')}, {size_text(manifest.bytes)}, "
        f"generation {manifest.generation} of {manifest.created}",
    )


def _files(connector: FileConnector) -> Check:
    files = connector.list_files()
    total = sum(info.size for info in files)
    weights = [info for info in files if info.path.endswith(".safetensors")]
    value = f"{count_text(len(files), 'file')}, {size_text(total)}"
    if not weights:
        return Check("model", "warn", value, "there is no *.safetensors file to load")
    return Check("model", "ok", f"{value}, {count_text(len(weights), 'safetensors file')}")

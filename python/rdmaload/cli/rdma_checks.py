"""What stands between this machine and RDMA to a store, probe by probe, and the way that the store is then reached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rdmaload.cli.checks import Check
from rdmaload.errors import RdmaloadError

if TYPE_CHECKING:
    from rdmaload.connectors.rdma import RdmaConnector

__all__ = ["rdma_checks"]


def rdma_checks(connector: RdmaConnector) -> Iterator[Check]:
    """The checks for the store of an rdma:// url: what loads will take, and why not RDMA where it is not that.

    Where falling back is not allowed, what fails is a failure; else loads work, only slower.
    """
    from rdmaload import _core

    required = connector.options.fallback == "never"
    host, port = connector.rdma_address
    missing = []
    for probe in _core.rdma_probe(host=host, port=port, device=connector.card):
        if probe["ok"] or not probe["required"]:
            # What would only be faster is no warning: most machines lack some of it for good.
            yield Check(f"rdma {probe['name']}", "ok", probe["detail"], probe["next_step"])
            continue
        missing.append(probe["name"])
        yield Check(f"rdma {probe['name']}", "fail" if required else "warn", probe["detail"], probe["next_step"])
    yield from _nearest_cards(connector)
    yield _way(connector, missing, required)


def _nearest_cards(connector: RdmaConnector) -> Iterator[Check]:
    """For each GPU the cards by their distance: loads into it go over the first from which the server is reached."""
    from rdmaload import _core

    try:
        count = _core.cuda_device_count()
    except RdmaloadError:
        return
    for ordinal in range(count):
        cards = _core.rdma_cards_by_distance(_core.cuda_pci_address(ordinal))
        if not cards:
            return
        shown = ", ".join(f"{name} ({between}, {hops} hops)" for name, between, hops in cards)
        taken = f"{connector.card} is named in the url; by distance: " if connector.card else ""
        yield Check(f"rdma cards near cuda:{ordinal}", "ok", taken + shown)


def _way(connector: RdmaConnector, missing: list[str], required: bool) -> Check:
    """Connects as a load would: only that shows whether the server speaks RDMA there."""
    if missing:
        return Check(
            "rdma connection",
            "fail" if required else "warn",
            f"not tried: {', '.join(missing)}",
            "fallback=never makes this an error" if required else "loads go over TCP",
        )
    from rdmaload import _core

    host, port = connector.rdma_address
    try:
        way = _core.rdma_way(
            host=host,
            port=port,
            device=connector.card,
            username=connector.options.username,
            password=connector.password,
            db=connector.options.db,
            protocol=connector.options.protocol,
            connect_timeout=connector.options.connect_timeout,
            name=connector.url,
        )
    except RdmaloadError as err:
        return Check(
            "rdma connection",
            "fail" if required else "warn",
            str(err),
            "does the server speak RDMA on this address and port? (`rdmaload serve --rdma-bind`, valkey --rdma-bind); "
            "tcp_port= where its TCP port is another",
        )
    return Check("rdma connection", "ok", way)

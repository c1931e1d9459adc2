"""Redis-like servers whose weights are read over RDMA: `rdma://host[:6379]/model`.

Everything but reading weights goes over TCP to the same server, as with `redis://`. What the native transport finds out
about RDMA (whether it works, over which card, or why not) is known once something was read.
"""

from __future__ import annotations

import re

from rdmaload.connectors.redis import RedisConnector
from rdmaload.errors import UrlError
from rdmaload.options import Options
from rdmaload.urls import Url

__all__ = ["RdmaConnector"]

_CARD = re.compile(r"[A-Za-z0-9_.-]{1,63}", re.ASCII)


class RdmaConnector(RedisConnector):
    """A model in a server that speaks RESP over RDMA and over TCP: ours, or a Valkey that was built with RDMA.

    `device=` in the url names the card; as a keyword of `load` that name says where tensors go.

    >>> from rdmaload.urls import parse_url
    >>> with RdmaConnector(parse_url("rdma://10.0.0.5/llama?device=mlx5_0&fallback=never")) as connector:
    ...     connector
    <RdmaConnector rdma://10.0.0.5/llama?device=mlx5_0&fallback=never open>
    """

    url_options = frozenset({"device"})

    def __init__(self, url: Url, options: Options | None = None) -> None:
        super().__init__(url, options)
        self.card = url.query.get("device", "")
        """The card to use; empty: the one that the route to the server goes through."""
        if self.card and not _CARD.fullmatch(self.card):
            raise UrlError(
                f"{self.url}: device= names an RDMA card, such as mlx5_0 (ibv_devices lists them)", url=self.url
            )

    @property
    def rdma_address(self) -> tuple[str, int]:
        """Host and port where RDMA is spoken."""
        return self._host, self.location.port or 6379

    def _tcp_port(self) -> int:
        return self.options.tcp_port or super()._tcp_port()

    def native_transport(self) -> object | None:
        self._check_open()
        from rdmaload import _core

        options = self.options
        host, port = self.rdma_address
        transport: object = _core.RdmaTransport(
            host=host,
            port=port,
            tcp_port=self._port,
            fall_back=options.fallback == "auto",
            device=self.card,
            username=options.username,
            password=self._password,
            db=options.db,
            protocol=options.protocol,
            connections=self.connections,
            bytes_in_flight=self.bytes_in_flight,
            connect_timeout=options.connect_timeout,
            inactivity_timeout=options.inactivity_timeout,
            name=self.url,
        )
        return transport

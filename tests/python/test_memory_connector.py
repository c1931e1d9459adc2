"""What is particular to the in-process store; the rest is the contract's."""

from __future__ import annotations

from rdmaload.connectors import KeyValueConnector, connector_for
from rdmaload.connectors.memory import MemoryConnector, forget_store


def test_stores_are_found_by_name_and_outlive_their_connectors(model: str) -> None:
    with connector_for(f"memory://{model}/a") as connector:
        assert isinstance(connector, MemoryConnector)
        connector.set("a/k", b"1")
        assert connector.native_transport() is None
    with (
        connector_for(f"memory://{model}/b") as same,
        connector_for(f"memory://{model}-2/a") as other,
    ):
        assert isinstance(same, KeyValueConnector)
        assert isinstance(other, KeyValueConnector)
        assert same.get("a/k") == b"1"
        assert other.get("a/k") is None
    forget_store(model)
    forget_store(f"{model}-2")
    with connector_for(f"memory://{model}/a") as connector:
        assert isinstance(connector, MemoryConnector)
        assert connector.get("a/k") is None
    forget_store(model)

"""Connectors: one class per kind of store, found by the scheme of a url.

`connector_for(url)` gives one; `register_connector(scheme, cls)` and the entry-point group
`rdmaload.connectors` add kinds. New kinds subclass KeyValueConnector or FileConnector. Client
libraries load with the connector that needs them.
"""

from rdmaload.connectors.connector import Connector, FileConnector, FileInfo, KeyValueConnector
from rdmaload.connectors.registry import connector_for, register_connector

__all__ = [
    "Connector",
    "FileConnector",
    "FileInfo",
    "KeyValueConnector",
    "connector_for",
    "register_connector",
]

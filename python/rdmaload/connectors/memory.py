"""Key-value stores in this process: `memory://store/model`; the reference for the others.

Stores are found by name and live as long as the process, so that a save and a load of the same url
meet. Values are immutable bytes: a reader never sees half of one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rdmaload.connectors.connector import KeyValueConnector
from rdmaload.options import Options
from rdmaload.urls import Url

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["MemoryConnector", "forget_store"]


class _Store:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: dict[str, bytes] = {}  # Guarded by lock.


_stores: dict[str, _Store] = {}  # Guarded by _stores_lock.
_stores_lock = threading.Lock()


def forget_store(name: str) -> None:
    """Drop a store with everything in it; open connectors keep what they see."""
    with _stores_lock:
        _stores.pop(name, None)


class MemoryConnector(KeyValueConnector):
    """A model in a dictionary of this process.

    >>> from rdmaload.urls import parse_url
    >>> with MemoryConnector(parse_url("memory://example/llama")) as connector:
    ...     connector.set("llama/manifest", b"...")
    ...     connector.get("llama/manifest")
    True
    b'...'
    """

    store_options = frozenset()

    def __init__(self, url: Url, options: Options | None = None) -> None:
        super().__init__(url, options)
        with _stores_lock:
            self._store = _stores.setdefault(url.host or "", _Store())

    def _is_near(self) -> bool:
        return True

    def get(self, key: str) -> bytes | None:
        self._check_open()
        with self._store.lock:
            return self._store.values.get(key)

    def set(self, key: str, buffer: Buffer, *, if_absent: bool = False) -> bool:
        value = bytes(self.check_value(key, buffer))
        with self._store.lock:
            if if_absent and key in self._store.values:
                return False
            self._store.values[key] = value
            return True

    def list(self, prefix: str) -> Iterator[str]:
        self._check_open()
        with self._store.lock:
            keys = [key for key in self._store.values if key.startswith(prefix)]
        return iter(keys)

    def delete(self, *keys: str) -> int:
        self._check_open()
        with self._store.lock:
            return sum(self._store.values.pop(key, None) is not None for key in keys)

"""In-memory stores that die or dawdle at a chosen operation, and a plain reader of what a save left.

`read_model` checks every checksum by itself; of the package it uses only the decoders.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from rdmaload._core import crc32c
from rdmaload.connectors.connector import KeyValueConnector
from rdmaload.connectors.memory import MemoryConnector
from rdmaload.index import Index, chunk_key, index_key
from rdmaload.manifest import Manifest, manifest_key

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Dawdle", "Die", "Killed", "ScriptedConnector", "keys_of", "read_index", "read_model"]

_Result = TypeVar("_Result")


class Killed(BaseException):
    """The process died; a BaseException, as nothing may catch it and carry on."""


class Die:
    """Dies at operation number `at`, before or after its effect; all later operations fail too."""

    def __init__(self, at: int | None = None, *, after: bool = False) -> None:
        self.at = at
        self.after = after
        self.count = 0
        self.kinds: list[str] = []
        self._lock = threading.Lock()
        self._dead = False

    def __call__(self, kind: str, key: str, effect: Callable[[], _Result]) -> _Result:
        with self._lock:  # one operation at a time: what is dead has no effect any more
            if self._dead:
                raise Killed
            self.count += 1
            self.kinds.append(kind)
            self._dead = self.count == self.at
            if self._dead and not self.after:
                raise Killed
            result = effect()
            if self._dead:
                raise Killed
            return result


class Dawdle:
    """Lets other threads run before and after operations, by a seeded choice per thread."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def __call__(self, kind: str, key: str, effect: Callable[[], _Result]) -> _Result:
        self._pause()
        result = effect()
        self._pause()
        return result

    def _pause(self) -> None:
        with self._lock:
            seconds = self._random.choice((0, 0, 0, 0.0001, 0.0005, 0.002))
        time.sleep(seconds)


class ScriptedConnector(MemoryConnector):
    """A memory store whose every operation goes through `script(kind, key, effect)`.

    Set `script` on a subclass and register that under a scheme of its own.
    """

    script: Callable[[str, str, Callable[[], object]], object]

    def _run(self, kind: str, key: str, effect: Callable[[], _Result]) -> _Result:
        return type(self).script(kind, key, effect)  # type: ignore[return-value]

    def get(self, key: str) -> bytes | None:
        return self._run("get", key, lambda: MemoryConnector.get(self, key))

    def set(self, key: str, buffer: Buffer, *, if_absent: bool = False) -> bool:
        return self._run("set", key, lambda: MemoryConnector.set(self, key, buffer, if_absent=if_absent))

    def exists(self, key: str) -> bool:
        return self._run("exists", key, lambda: MemoryConnector.get(self, key) is not None)

    def list(self, prefix: str) -> Iterator[str]:
        return self._run("list", prefix, lambda: MemoryConnector.list(self, prefix))

    def delete(self, *keys: str) -> int:
        return self._run("delete", keys[0], lambda: MemoryConnector.delete(self, *keys))

    def members_add(self, key: str, member: str) -> None:
        self._run("members_add", key, lambda: MemoryConnector.set(self, f"{key}/{member}", b"{}"))

    def members_remove(self, key: str, member: str) -> None:
        self._run("members_remove", key, lambda: MemoryConnector.delete(self, f"{key}/{member}"))


def keys_of(connector: KeyValueConnector) -> set[str]:
    """Every key of the store but the hint for listings."""
    return {key for key in connector.list("") if not key.startswith("rdmaload:models")}


def read_index(connector: KeyValueConnector) -> tuple[Manifest, Index] | None:
    """What is published, fully checked; None when nothing is."""
    value = connector.get(manifest_key(connector.model))
    if value is None:
        return None
    manifest = Manifest.decode(value)
    encoded = connector.get(index_key(connector.model, manifest.generation))
    assert encoded is not None, "published without an index"
    manifest.check_index(encoded)
    index = Index.decode(encoded)
    assert (manifest.files, manifest.bytes) == (len(index.files), index.total_bytes)
    return manifest, index


def read_model(connector: KeyValueConnector) -> dict[str, bytes] | None:
    """The published files by path, every chunk checked; None when nothing is published."""
    found = read_index(connector)
    if found is None:
        return None
    manifest, index = found
    files = {}
    for file in index.files:
        content = b""
        for chunk in range(file.chunk_count(index.chunk_bytes)):
            key = chunk_key(connector.model, manifest.generation, file.number, chunk)
            value = connector.get(key)
            assert value is not None, f"{key} is missing"
            start = 4 * (file.first_chunk + chunk)
            assert index.crcs[start : start + 4] == crc32c(value).to_bytes(4, "little"), key
            content += value
        assert len(content) == file.size
        if file.header is not None:
            assert content[8 : 8 + len(file.header)] == file.header
        files[file.path] = content
    return files

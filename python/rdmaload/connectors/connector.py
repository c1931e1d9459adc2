"""The two classes that a store's connector derives from, and what it must promise.

A connector knows one store and one model in it. It may be used by several threads at once. It holds
connections from its first use to `close()`. The loader reads weights through `native_transport()`
where there is one, else by calling `get_into` or `read_into` from worker threads; everything else
goes through the methods here.

Errors are ours (`rdmaload.errors`), with url and key, and never show a secret.
"""

from __future__ import annotations

import itertools
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlencode

from rdmaload.connectors.store_digests import FileDigest
from rdmaload.errors import FormatError, NotFoundError, NotSupportedError, UnavailableError, UrlError
from rdmaload.index import check_path
from rdmaload.options import Options
from rdmaload.urls import Url, is_secret_option, redact

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer, Self

__all__ = ["MODELS_KEY", "STORE_OPTIONS", "Connector", "FileConnector", "FileInfo", "KeyValueConnector", "is_hidden"]

MODELS_KEY = "rdmaload:models"
"""Names of models in a store: a hint for listing, never relied on."""

# What a sweep found best over loopback, where the server's thread and ours share caches and cores, and what hides a
# round trip of some milliseconds elsewhere, with several flows where a network limits each (docs/performance.md).
_NEAR = (1, 2 * 2**20)
_FAR = (4, 16 * 2**20)

# Options that mean something to some kinds of store, and nothing at all to the others.
STORE_OPTIONS = frozenset({"db", "headers", "listing", "revision", "storage_options"})

_DELETE_BATCH = 1000  # keys per call: bounds memory here and the time that a store is busy with one request


class Connector(ABC):  # noqa: B024  (its two subclasses have the abstract methods)
    """One model in one store. Use KeyValueConnector or FileConnector as the base of a new kind."""

    url_options: ClassVar[frozenset[str]] = frozenset()
    """Query names that only this connector knows; it finds their text in `self.location.query`."""

    default_options: ClassVar[Mapping[str, object]] = MappingProxyType({})
    """Options whose default suits this kind of store better than the general one; `connector_for` applies them."""

    store_options: ClassVar[frozenset[str]] = STORE_OPTIONS
    """Which of the options that few kinds of store know this one takes; the others are refused."""

    fallback_reason: str = ""
    """Why weights come by a slower way than they could; empty where they do not."""

    write_path: str = ""
    """Which way what was written took, as `SaveStats.path` has it; empty where the connector does not say."""

    def __init__(self, url: Url, options: Options | None = None) -> None:
        self.location = url
        # Again where the caller did it already: a password in the url must not be lost.
        self.options = Options.resolve(url, options, also=self.url_options)
        self.url = url.redacted
        self._check_store_options()
        self.retries = 0
        """Requests that were sent again, where the subclass can tell; weights that are read natively count apart."""
        self._retries_lock = threading.Lock()
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url} {'closed' if self._closed else 'open'}>"

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def connections(self) -> int:
        """Connections that one load holds: the option, or what suits where the store is."""
        return self.options.connections or (_NEAR if self._is_near() else _FAR)[0]

    @property
    def bytes_in_flight(self) -> int:
        """Bytes asked for and not yet received, over all connections: a server buffers its replies."""
        return self.options.bytes_in_flight or (_NEAR if self._is_near() else _FAR)[1]

    def _is_near(self) -> bool:
        """Whether the store is known to be on this machine."""
        return False

    def close(self) -> None:
        """Give connections back. Idempotent; a subclass that holds something extends it."""
        self._closed = True

    def cache_identity(self) -> str:
        """What the store and the model are called in `cache_dir`: without secrets, and without what changes no byte.

        A connector whose url says more about which bytes are meant than place, model and `url_options` extends it.
        """
        url = self.location
        place = f"{url.scheme}://{url.host or ''}{'' if url.port is None else f':{url.port}'}{url.path}"
        chosen = {name: url.query[name] for name in sorted(self.url_options & url.query.keys())}
        chosen = {name: value for name, value in chosen.items() if not is_secret_option(name)}
        chosen |= {"db": str(self.options.db)} if self.options.db else {}
        chosen |= {"endpoint_url": redact(self.options.endpoint_url)} if self.options.endpoint_url else {}
        return f"{place}/{url.model}{'?' if chosen else ''}{urlencode(chosen)}"

    def native_transport(self) -> object | None:
        """A new native transport that reads this store without Python; None when there is none."""
        return None

    def weight_iterator(self, rank: int | None = None, **arguments: object) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors of the model; arguments are those of `Model.weight_iterator`."""
        from rdmaload.model import Model

        # Model checks the names; its parameters repeated here would be a second list to keep.
        yield from Model(self).weight_iterator(rank, **arguments)  # type: ignore[arg-type]

    def pull_files(
        self,
        target: str | Path | None = None,
        *,
        allow_pattern: str | Sequence[str] | None = None,
        ignore_pattern: str | Sequence[str] | None = None,
    ) -> Path:
        """Copy files (by default all but weights) to `target`; see `Model.pull_files`."""
        from rdmaload.model import Model

        pulled: Path = Model(self).pull_files(target, allow_pattern=allow_pattern, ignore_pattern=ignore_pattern)
        return pulled

    def _check_store_options(self) -> None:
        unset = Options()
        for name in sorted(STORE_OPTIONS - self.store_options):
            if getattr(self.options, name) != getattr(unset, name):
                raise UrlError(
                    f"{self.url}: {name} would have no effect on {self.location.scheme}://; drop it, or correct the "
                    "url",
                    url=self.url,
                )

    def _count_retries(self, count: int = 1) -> None:
        with self._retries_lock:
            self.retries += count

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError(f"the connector for {self.url} is closed: open another", url=self.url)


class KeyValueConnector(Connector):
    """A store of values by key. Keys are whole (`llama/manifest`), text; values are bytes.

    A subclass provides the abstract methods and, where 512 MiB is not its limit, `max_value_bytes`:

    >>> class DictConnector(KeyValueConnector):
    ...     values: dict[str, bytes] = {}
    ...     def get(self, key):
    ...         return self.values.get(key)
    ...     def set(self, key, buffer, *, if_absent=False):
    ...         self.check_value(key, buffer)
    ...         if if_absent and key in self.values:
    ...             return False
    ...         self.values[key] = bytes(buffer)
    ...         return True
    ...     def list(self, prefix):
    ...         return iter([key for key in self.values if key.startswith(prefix)])
    ...     def delete(self, *keys):
    ...         return sum(self.values.pop(key, None) is not None for key in keys)
    """

    max_value_bytes: int = 512 * 2**20
    """The longest value that the store takes."""

    @property
    def model(self) -> str:
        """The model's name: its keys start with it and a slash."""
        return self.location.model

    @abstractmethod
    def get(self, key: str) -> bytes | None:
        """The value, or None when there is none."""

    @abstractmethod
    def set(self, key: str, buffer: Buffer, *, if_absent: bool = False) -> bool:
        """Store a value whole; True when it was stored.

        With `if_absent` an existing value stays and the answer is False; of several callers at
        once, one gets True.
        """

    @abstractmethod
    def list(self, prefix: str) -> Iterator[str]:
        """Every key that starts with `prefix`, taken literally, once each, in no order.

        Keys that come or go meanwhile may be missing; those that stay are there.
        """

    @abstractmethod
    def delete(self, *keys: str) -> int:
        """Remove keys; how many there were."""

    def exists(self, key: str) -> bool:
        """Whether the key has a value."""
        return self.get(key) is not None

    def get_into(self, key: str, buffer: memoryview) -> int:
        """Write a value to the start of `buffer`; its length in bytes.

        Raises NotFoundError when there is none, FormatError when it is longer than the buffer.
        """
        value = self.get(key)
        if value is None:
            raise NotFoundError(f"no key {key} at {self.url}", url=self.url, key=key)
        target = buffer.cast("B")
        if len(value) > len(target):
            raise FormatError(
                f"{key} at {self.url} has {len(value)} bytes where at most {len(target)} were "
                "expected: written by something else, or damaged",
                url=self.url,
                key=key,
            )
        target[: len(value)] = value
        return len(value)

    def peek(self, keys: Sequence[str], length: int) -> Sequence[tuple[int, bytes]]:
        """Size in bytes and first `length` bytes of each value; (0, b"") where there is none.

        A store that can do it without sending whole values overrides this, and `get_range`.
        """
        values = [self.get(key) or b"" for key in keys]
        return [(len(value), value[:length]) for value in values]

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """At most `length` bytes of a value from byte `offset` on: fewer at its end, none without one."""
        return (self.get(key) or b"")[offset : offset + length]

    def value_limit(self) -> int:
        """Bytes of the longest value that the store takes as it is set up now."""
        return self.max_value_bytes

    def delete_prefix(self, prefix: str) -> int:
        """Remove every key that starts with `prefix`; how many there were."""
        removed = 0
        keys = self.list(prefix)
        while batch := tuple(itertools.islice(keys, _DELETE_BATCH)):
            removed += self.delete(*batch)
        return removed

    def members_add(self, key: str, member: str) -> None:
        """Add to the set of names at `key`; by default one value per name keeps it."""
        self.set(f"{key}/{member}", json.dumps({"member": member}).encode())

    def members_remove(self, key: str, member: str) -> None:
        """Take a name out of the set at `key`; nothing happens when it is not in it."""
        self.delete(f"{key}/{member}")

    def members(self, key: str) -> AbstractSet[str]:
        """The names in the set at `key`."""
        prefix = f"{key}/"
        return {name.removeprefix(prefix) for name in self.list(prefix)}

    def publish_warning(self, needed_bytes: int = 0) -> Sequence[str]:
        """Why `needed_bytes` more may not last in this store, as sentences; usually none."""
        return []

    def check_value(self, key: str, buffer: Buffer) -> memoryview:
        """The bytes of `buffer`, not copied, for `set`.

        Raises NotSupportedError when they are more than the store holds in a value.
        """
        self._check_open()
        view = memoryview(buffer).cast("B")
        if len(view) > self.max_value_bytes:
            raise NotSupportedError(
                f"{key} needs {len(view)} bytes, and {self.url} holds at most {self.max_value_bytes} per value",
                url=self.url,
                key=key,
            )
        return view


@dataclass(frozen=True)
class FileInfo:
    """A file in a listing."""

    path: str
    """Relative to the model, with `/`."""
    size: int
    etag: str | None = None
    """Changes when the content does; None when the store has no such thing."""


def is_hidden(path: str) -> bool:
    """In a directory whose name begins with a dot, as tools keep beside a model (and we our manifest)."""
    return any(part.startswith(".") for part in path.split("/")[:-1])


class FileConnector(Connector):
    """A store of files by path; paths are relative to the model, with `/`."""

    keeps_manifest: ClassVar[bool] = False
    """Whether a manifest and an index may lie beside the files; `read_small` reads them."""
    pins_versions: bool = False
    """Whether a read of a file that was replaced after `pin` fails, so that nobody need look again."""
    read_only: ClassVar[str] = ""
    """Why nothing can be saved, and what to do instead; empty where it can."""

    def pin(self, etags: Mapping[str, str]) -> None:
        """From now on read these versions of files (ETag by path) or fail with IntegrityError.

        An open begins with none, which drops those of an earlier one.
        """

    def digests(self, paths: Sequence[str]) -> Mapping[str, FileDigest]:
        """CRCs that the store has of whole files, of the versions that are pinned; without those it has none of."""
        return {}

    def _check(self, path: str) -> None:
        """Raise for a closed connector, and FormatError for a path that leads out of the model or cannot be kept."""
        self._check_open()
        try:
            check_path(path)
        except FormatError as err:
            raise FormatError(f"a file at {self.url} cannot be part of a model: {err}", url=self.url, key=path) from err

    def read_small(self, path: str) -> bytes | None:
        """A whole small file; None when there is none."""
        raise NotSupportedError(f"{self.url} keeps no manifest", url=self.url)

    @abstractmethod
    def list_files(self) -> Sequence[FileInfo]:
        """Every file, sorted by path. Raises NotFoundError when there is no such model."""

    @abstractmethod
    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """Read from byte `offset` on; how many bytes, fewer than asked only at the end."""

    @abstractmethod
    def write(self, path: str, size: int, blocks: Iterable[memoryview]) -> None:
        """Write a file of `size` bytes; it appears whole, in place of an older one, or not at all.

        Raises ValueError when the blocks have another size together. A block is used before the
        next is asked for.
        """

    @abstractmethod
    def delete(self, path: str) -> bool:
        """Remove a file; whether there was one."""

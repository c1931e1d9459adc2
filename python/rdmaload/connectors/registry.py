"""From the scheme of a url to its connector class: registered, built in, or a plug-in's.

A plug-in declares `scheme = "package.module:Class"` in the entry-point group `rdmaload.connectors`,
or calls `register_connector`. Its module is imported when a url with its scheme is first used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import threading
from os import PathLike
from typing import cast

from rdmaload.connectors.connector import Connector
from rdmaload.errors import NotSupportedError
from rdmaload.options import Options
from rdmaload.urls import Url, parse_url

__all__ = ["ENTRY_POINT_GROUP", "connector_class", "connector_for", "known_schemes", "register_connector"]

ENTRY_POINT_GROUP = "rdmaload.connectors"

_REDIS = "rdmaload.connectors.redis:RedisConnector"
_BUILT_IN = {
    "az": "rdmaload.connectors.cloud:AzureConnector",
    "file": "rdmaload.connectors.local:LocalConnector",
    "gs": "rdmaload.connectors.cloud:GcsConnector",
    "hf": "rdmaload.connectors.hf:HfConnector",
    "http": "rdmaload.connectors.http:HttpConnector",
    "https": "rdmaload.connectors.http:HttpConnector",
    "memory": "rdmaload.connectors.memory:MemoryConnector",
    "redis": _REDIS,
    "rediss": _REDIS,
    "redis+unix": _REDIS,
    "redis+cluster": _REDIS,
    "redis+sentinel": _REDIS,
    "rdma": "rdmaload.connectors.rdma:RdmaConnector",
    "s3": "rdmaload.connectors.s3:S3Connector",
    "valkey": _REDIS,
    "valkeys": _REDIS,
    "valkey+unix": _REDIS,
    "valkey+cluster": _REDIS,
    "valkey+sentinel": _REDIS,
}

_registered: dict[str, type[Connector]] = {}  # Guarded by _lock.
_lock = threading.Lock()


def register_connector(scheme: str, cls: type[Connector]) -> None:
    """Use `cls` for urls of `scheme` from now on in this process.

    It goes before what is built in or declared, and is called as `cls(url, options)`.
    """
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme, re.ASCII):
        raise ValueError(f"{scheme!r} is no scheme: lower-case letters, digits, + . -")
    if not (isinstance(cls, type) and issubclass(cls, Connector)):
        raise TypeError(f"{cls!r} is no subclass of KeyValueConnector or FileConnector")
    with _lock:
        _registered[scheme] = cls


def connector_class(scheme: str) -> type[Connector]:
    """The class for a scheme. Raises NotSupportedError, which lists the schemes that there are."""
    with _lock:
        cls = _registered.get(scheme)
    if cls is not None:
        return cls
    if scheme in _BUILT_IN:
        module, _, name = _BUILT_IN[scheme].partition(":")
        return cast("type[Connector]", getattr(importlib.import_module(module), name))
    # Reads the metadata of every installed distribution: milliseconds, which only a plug-in's urls pay.
    plugins = {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    if scheme in plugins:
        try:
            found = plugins[scheme].load()
        except (ImportError, AttributeError) as err:
            raise NotSupportedError(
                f"the plug-in {plugins[scheme].value} for {scheme}:// cannot be imported: {err}"
            ) from err
    elif (generic := _fsspec_class(scheme)) is not None:
        return generic
    else:
        known = sorted({*_registered, *_BUILT_IN, *plugins})
        raise NotSupportedError(
            f"no connector for {scheme}:// urls; there are {', '.join(known)}. A plug-in adds "
            f"one by the entry-point group {ENTRY_POINT_GROUP} or register_connector(), and pip install "
            "'rdmaload[fsspec]' brings those of fsspec"
        )
    if not (isinstance(found, type) and issubclass(found, Connector)):
        raise NotSupportedError(f"the plug-in for {scheme}:// urls gives {found!r}, which is no Connector")
    return found


def _fsspec_class(scheme: str) -> type[Connector] | None:
    """The class for what fsspec knows, or is asked for by name (`fsspec+sftp://`)."""
    asked = scheme.startswith("fsspec+")
    try:
        from fsspec.registry import get_filesystem_class, known_implementations
    except ImportError as err:
        if asked:
            raise NotSupportedError(f"{scheme}:// needs fsspec: pip install 'rdmaload[fsspec]'") from err
        return None
    protocol = scheme.removeprefix("fsspec+")
    try:
        get_filesystem_class(protocol)
    except ValueError:
        return None
    except ImportError as err:
        wanted = known_implementations.get(protocol, {}).get("err") or str(err)
        raise NotSupportedError(f"{scheme}:// goes through fsspec, which lacks something: {wanted}") from err
    from rdmaload.connectors.fsspec import FsspecConnector

    return FsspecConnector


def known_schemes() -> frozenset[str]:
    """Every scheme that `connector_class` has a class for; plug-ins are not imported for it."""
    with _lock:
        registered = set(_registered)
    plugins = {point.name for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    return frozenset(registered | set(_BUILT_IN) | plugins)


def connector_for(url: str | PathLike[str] | Url, options: Options | None = None, **keywords: object) -> Connector:
    """A connector for `url`. Nothing is connected yet. Close it, or use it in a `with`.

    >>> with connector_for("memory://example/llama") as connector:
    ...     connector
    <MemoryConnector memory://example/llama open>
    """
    parsed = parse_url(url)
    cls = connector_class(parsed.scheme)
    resolved = Options.resolve(parsed, options, also=cls.url_options, defaults=cls.default_options, **keywords)
    return cls(parsed, resolved)

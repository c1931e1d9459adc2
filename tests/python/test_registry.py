"""From a scheme to a class: registered, built in, declared by a plug-in, or unknown."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rdmaload.connectors import connector_for, register_connector, registry
from rdmaload.connectors.local import LocalConnector
from rdmaload.connectors.memory import MemoryConnector
from rdmaload.connectors.rdma import RdmaConnector
from rdmaload.connectors.redis import RedisConnector
from rdmaload.errors import NotSupportedError, UrlError
from rdmaload.options import Options


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", {})
    return


class Plugin(MemoryConnector):
    url_options = frozenset({"region"})


def declare(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = importlib.metadata.EntryPoint(name, value, registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [point])


@pytest.mark.parametrize(
    ("url", "cls"),
    [
        ("redis://127.0.0.1/m", RedisConnector),
        ("valkey://127.0.0.1/m", RedisConnector),
        ("rediss://127.0.0.1/m", RedisConnector),
        ("valkeys://127.0.0.1/m", RedisConnector),
        ("redis+unix:///s.sock?model=m", RedisConnector),
        ("rdma://127.0.0.1/m", RdmaConnector),
        ("valkey+unix:///s.sock?model=m", RedisConnector),
        ("memory://s/m", MemoryConnector),
        ("./m", LocalConnector),
        ("file:///m", LocalConnector),
        (Path("/m"), LocalConnector),
    ],
)
def test_what_is_built_in(url: str | Path, cls: type) -> None:
    with connector_for(url) as connector:
        assert type(connector) is cls


@pytest.mark.parametrize(
    ("url", "missing"),
    [
        ("redis+cluster://h/m", "Cluster"),
        ("redis+sentinel://h/m", "Sentinel"),
    ],
)
def test_a_transport_that_is_missing_is_named(url: str, missing: str) -> None:
    with pytest.raises(NotSupportedError, match=f"needs the .*{missing}"):
        connector_for(url)


def test_an_unknown_scheme_lists_the_known() -> None:
    with pytest.raises(NotSupportedError, match="no connector for gopher:// urls; there are az, file, gs, hf, http"):
        connector_for("gopher://host/m")


def test_a_registered_class_goes_first_and_gets_its_own_options() -> None:
    register_connector("plug", Plugin)
    register_connector("memory", Plugin)
    with connector_for("plug://s/m?region=eu&connections=3", threads=4) as connector:
        assert type(connector) is Plugin
        assert connector.location.query["region"] == "eu"
        assert (connector.options.connections, connector.options.threads) == (3, 4)
    with connector_for("memory://s/m") as connector:
        assert type(connector) is Plugin
    with pytest.raises(UrlError, match="unknown option zone"):
        connector_for("plug://s/m?zone=eu")


def test_a_declared_class_is_imported_on_use(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, "plug", f"{__name__}:Plugin")
    with connector_for("plug://s/m", Options(connections=3)) as connector:
        assert type(connector).__name__ == "Plugin"
        assert connector.options.connections == 3


def test_a_plug_in_that_is_broken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, "plug", "no_such_module_here:Plugin")
    with pytest.raises(NotSupportedError, match="no_such_module_here:Plugin for plug:// cannot be imported"):
        connector_for("plug://s/m")
    declare(monkeypatch, "plug", "collections:OrderedDict")
    with pytest.raises(NotSupportedError, match="which is no Connector"):
        connector_for("plug://s/m")


def test_only_connectors_under_proper_schemes_are_registered() -> None:
    with pytest.raises(TypeError):
        register_connector("plug", dict)  # type: ignore[arg-type]
    for scheme in ("", "Plug", "1plug", "plug://"):
        with pytest.raises(ValueError, match="is no scheme"):
            register_connector(scheme, Plugin)


def test_a_password_of_the_url_reaches_a_connector_that_is_built_by_hand() -> None:
    from rdmaload.urls import parse_url

    with Plugin(parse_url("plug://u:p@s/m"), Options(connections=3)) as connector:
        assert (connector.options.username, connector.options.password) == ("u", "p")
        assert "p@" not in repr(connector)


def test_redis_is_imported_with_its_first_url() -> None:
    code = (
        "import sys, types\n"
        "sys.modules['rdmaload._core'] = stand_in = types.ModuleType('rdmaload._core')\n"
        "stand_in.crc32c = None\n"
        "from rdmaload.connectors import connector_for\n"
        "assert 'redis' not in sys.modules\n"
        "connector_for('redis://127.0.0.1/m').close()\n"
        "assert 'redis' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


STORE_OPTIONS: dict[str, object] = {
    "db": 1,
    "headers": "X-Token: hush",
    "listing": "files.txt",
    "revision": "v1",
    "storage_options": {"token": "hush"},
}


@pytest.mark.parametrize(
    ("url", "taken"),
    [
        ("redis://127.0.0.1:1/m", {"db"}),
        ("rdma://127.0.0.1:1/m", {"db"}),
        ("memory://options/m", set()),
        ("/nonexistent", set()),
        ("s3://bucket/m", set()),
        ("gs://bucket/m", {"storage_options"}),
        ("az://bucket/m", {"storage_options"}),
        ("fsspec+memory://models/m", {"storage_options"}),
        ("http://127.0.0.1:1/m", {"headers", "listing"}),
        ("hf://org/model", {"headers", "revision"}),
    ],
)
def test_options_that_mean_nothing_to_a_store_are_refused_by_name(url: str, taken: set[str]) -> None:
    for name, value in STORE_OPTIONS.items():
        if name in taken:
            connector_for(url, **{name: value}).close()
            continue
        with pytest.raises(UrlError, match=f"{name} would have no effect") as caught:
            connector_for(url, **{name: value})
        assert "hush" not in str(caught.value)

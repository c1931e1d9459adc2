"""Credentials as botocore finds them, from every source that it knows, are those that weights are asked for with."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

import rdmaload
from rdmaload.connectors.s3_client import _shipped
from rdmaload.errors import AuthenticationError
from tests.support.checkpoints import Checkpoint, compare
from tests.support.identities import SOURCES, Identities, honours, key_of, set_up
from tests.support.s3 import HttpObjects, Request

_HOUR = 3600.0
_NEAR_THE_END = 300.0  # botocore renews what ends in less than ten minutes whenever it signs


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials, profiles or proxies of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    _shipped.cache_clear()


def objects_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {f"/bucket/m/{path.name}": path.read_bytes() for path in checkpoint.directory.iterdir()}


def url_of(server: HttpObjects) -> str:
    return f"s3://bucket/m?endpoint_url={server.endpoint}&addressing_style=path"


def native(server: HttpObjects) -> list[Request]:
    return [request for request in server.requests if request.headers.get("user-agent") == "rdmaload"]


@pytest.mark.parametrize("source", SOURCES)
def test_weights_are_asked_for_with_the_credentials_of(
    source: str,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Identities(_HOUR) as identities, HttpObjects(objects_of(tiny_checkpoint), honours()) as server:
        set_up(source, identities, tmp_path, monkeypatch)
        before = dict(os.environ)
        with caplog.at_level(logging.DEBUG, "rdmaload"), rdmaload.open(url_of(server)) as model:
            assert compare(model.load(), tiny_checkpoint.directory) == tiny_checkpoint.bytes
            assert "hush" not in repr(model)
        assert {key_of(request) for request in server.requests} == {"KEY1"}
        assert {key_of(request) for request in native(server)} == {"KEY1"}
        assert identities.refused == []
        assert "hush" not in caplog.text
        assert dict(os.environ) == before


@pytest.mark.parametrize("source", [source for source in SOURCES if source != "machine"])
def test_credentials_near_their_end_are_renewed_before(
    source: str, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Identities(_NEAR_THE_END) as identities, HttpObjects(objects_of(tiny_checkpoint), honours()) as server:
        set_up(source, identities, tmp_path, monkeypatch)
        with rdmaload.open(url_of(server)) as model:
            assert compare(model.load(), tiny_checkpoint.directory) == tiny_checkpoint.bytes
        assert len({key_of(request) for request in native(server)}) == 3  # one per file
        assert identities.refused == []


@pytest.mark.parametrize("source", [source for source in SOURCES if source != "machine"])
def test_a_load_outlives_the_credentials_that_it_began_with(
    source: str, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Urls were signed for an hour: the store refuses them before, and they are signed anew."""
    answer = honours(uses=2)
    with Identities(_NEAR_THE_END) as identities, HttpObjects(objects_of(tiny_checkpoint), answer) as server:
        set_up(source, identities, tmp_path, monkeypatch)
        with rdmaload.open(url_of(server), connections=1, bytes_in_flight=65536) as model:
            for _ in range(4):  # with the urls of the first
                assert compare(model.load(), tiny_checkpoint.directory) == tiny_checkpoint.bytes
        assert len({key_of(request) for request in native(server)}) > 3
        assert identities.refused == []


def test_a_source_that_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What it logs would keep its client, and with it a connection, until the test is reported.
    monkeypatch.setattr(logging.getLogger("botocore.credentials"), "disabled", True)
    with Identities(_HOUR) as identities, HttpObjects({}) as server:
        set_up("web identity", identities, tmp_path, monkeypatch)
        (tmp_path / "token").write_text("hush: somebody else")
        with pytest.raises(
            AuthenticationError,
            match=r"InvalidIdentityToken \(AssumeRoleWithWebIdentity\): who is it\?\. Check the credentials",
        ) as caught:
            rdmaload.load(url_of(server), retry_timeout=0.2)
        assert "hush" not in str(caught.value)
        assert server.requests == []

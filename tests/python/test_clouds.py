"""Models in Google's and Azure's object stores: credentials, refusals and faults; the contract suite has the rest."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rdmaload
from rdmaload.connectors import connector_for
from rdmaload.connectors.obstore import ObstoreConnector
from rdmaload.errors import (
    AuthenticationError,
    IntegrityError,
    NotFoundError,
    NotSupportedError,
    UnavailableError,
    UrlError,
)
from rdmaload.stats import LoadStats
from tests.support.checkpoints import Checkpoint
from tests.support.clouds import AzureBlobs, GoogleStorage
from tests.support.s3 import Reply, Request


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials and proxies of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith(("AZURE_", "GOOGLE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@dataclass
class Cloud:
    """One of the two, and how it is reached."""

    server: Any
    url: str
    options: dict[str, Any]
    wrong: dict[str, Any] = field(default_factory=dict)
    """Credentials that the store does not know."""


@pytest.fixture(params=["gs", "gs-token", "az", "az-token", "az-sas"])
def cloud(request: pytest.FixtureRequest) -> Iterator[Cloud]:
    if request.param.startswith("gs"):
        with GoogleStorage("bucket", public="public") as server, GoogleStorage() as other:
            good, wrong = {"password": "good-token"}, {"password": "hush-hush-token"}
            if request.param == "gs":
                good = {"storage_options": {"service_account_key": server.service_account}}
                wrong = {"storage_options": {"service_account_key": other.service_account}}
            endpoint = {"endpoint_url": server.endpoint}
            yield Cloud(server, "gs://bucket/m", {**endpoint, **good}, {**endpoint, **wrong})
        return
    with AzureBlobs("bucket") as server:
        endpoint = {"endpoint_url": f"{server.endpoint}/account", "username": "account"}
        good, wrong = {"password": server.key}, {"password": "aHVzaCBodXNoIGh1c2g="}
        if request.param == "az-token":
            good, wrong = ({"storage_options": {"token": token}} for token in ("good-token", "hush-hush-token"))
        elif request.param == "az-sas":
            good, wrong = ({"storage_options": {"sas_key": text}} for text in (server.shared(), "sig=hush-hush"))
        yield Cloud(server, "az://bucket/m", {**endpoint, **good}, {**endpoint, **wrong})


def fill(cloud: Cloud, checkpoint: Checkpoint, name: str = "bucket/m") -> None:
    for path in checkpoint.directory.iterdir():
        cloud.server.objects[f"{name}/{path.name}"] = path.read_bytes()


def assert_loaded(state: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    expected: dict[str, torch.Tensor] = {}
    for path in checkpoint.directory.glob("*.safetensors"):
        expected |= load_file(path)
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name].view(torch.uint8).reshape(-1), tensor.view(torch.uint8).reshape(-1)), name


def test_weights_come_natively_unless_nothing_can_sign(cloud: Cloud, tiny_checkpoint: Checkpoint) -> None:
    fill(cloud, tiny_checkpoint)
    stats = LoadStats()
    assert_loaded(rdmaload.load(cloud.url, stats=stats, **cloud.options), tiny_checkpoint)
    if "token" in cloud.options.get("storage_options", {}):
        assert stats.path == "python"
        assert "no url could be signed" in (stats.fallback_reason or "")
    else:
        assert (stats.path, stats.fallback_reason) == ("http", None)
    folder = cloud.url.partition("://")[2] + "/"
    cloud.server.objects[folder] = b""  # what consoles show as a folder
    assert rdmaload.pull_files(cloud.url, **cloud.options).is_dir()


def test_wrong_credentials_and_missing_containers_are_told_apart(cloud: Cloud, tiny_checkpoint: Checkpoint) -> None:
    fill(cloud, tiny_checkpoint)
    with pytest.raises(AuthenticationError, match=r"[Cc]heck the credentials") as caught:
        rdmaload.load(cloud.url, **cloud.wrong)
    assert "hush" not in str(caught.value)
    assert "PRIVATE" not in str(caught.value)
    with pytest.raises(NotFoundError, match=r"Check (bucket|container) and prefix"):
        rdmaload.load(cloud.url.replace("bucket", "no-such"), **cloud.options)
    with pytest.raises(NotFoundError, match=r"check (bucket|container) and prefix"):
        rdmaload.load(f"{cloud.url}-none", **cloud.options)


def test_a_busy_store_is_not_taken_for_one_that_wants_a_token(cloud: Cloud, tiny_checkpoint: Checkpoint) -> None:
    fill(cloud, tiny_checkpoint)
    cloud.server.objects[cloud.url.partition("://")[2] + "/tokenizer.json"] = b"{}"
    busy = [Reply(503)]
    cloud.server.answer = lambda request, honest: busy[0] if request.path.endswith("tokenizer.json") else honest
    with pytest.raises(UnavailableError, match=r"tokenizer\.json"):
        rdmaload.pull_files(cloud.url, allow_pattern="tokenizer.json", retry_timeout=0.3, **cloud.options)


def test_a_storm_of_503_ends_byte_equal(cloud: Cloud, tiny_checkpoint: Checkpoint) -> None:
    fill(cloud, tiny_checkpoint)

    def storm(request: Request, honest: Reply) -> Reply:
        if request.number % 4 == 1:
            return Reply(503, {}, b"<Error><Code>SlowDown</Code></Error>")
        if honest.status == 206 and request.number % 4 == 3:
            honest.cut, honest.then = len(honest.body) // 2, "close"
        return honest

    cloud.server.answer = storm
    assert_loaded(rdmaload.load(cloud.url, **cloud.options), tiny_checkpoint)
    cloud.server.answer = lambda request, honest: Reply(503)
    with pytest.raises(UnavailableError):
        rdmaload.load(cloud.url, retry_timeout=0.3, **cloud.options)


def test_replaced_and_damaged_objects_are_errors(cloud: Cloud, tiny_checkpoint: Checkpoint) -> None:
    rdmaload.save(tiny_checkpoint.directory, cloud.url, **cloud.options)
    weights = sorted(name for name in cloud.server.objects if name.endswith(".safetensors"))[0]
    good = cloud.server.objects[weights]
    damaged = good[:-1] + bytes([good[-1] ^ 1])

    def flips(request: Request, honest: Reply) -> Reply:
        if honest.status == 206 and request.path.endswith(".safetensors"):
            honest.body = honest.body[:-1] + bytes([honest.body[-1] ^ 1])
        return honest

    cloud.server.answer = flips
    with pytest.raises(IntegrityError, match="CRC32C"):
        rdmaload.load(cloud.url, **cloud.options)
    cloud.server.answer = lambda request, honest: honest
    with rdmaload.open(cloud.url, **cloud.options) as model:
        cloud.server.objects[weights] = damaged
        with pytest.raises(IntegrityError, match="replaced"):
            model.load()


def test_a_failed_upload_appears_nowhere_and_leaves_no_parts(cloud: Cloud, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "big.bin").write_bytes(bytes(70 * 2**20))
    sent = 0

    def refuses(request: Request, honest: Reply) -> Reply:
        nonlocal sent
        if request.method == "PUT" and len(request.body) > 2**20:
            sent += 1
            if sent == 3:
                return Reply(403, {}, b"<Error><Code>Refused</Code></Error>")
        return honest

    cloud.server.answer = refuses
    with pytest.raises(AuthenticationError, match=r"write big\.bin"):
        rdmaload.save(source, cloud.url, **cloud.options)
    assert "bucket/m/big.bin" not in cloud.server.objects
    if cloud.url.startswith("gs"):  # Azure forgets uncommitted blocks by itself
        assert cloud.server.parts == {}
    cloud.server.answer = lambda request, honest: honest
    rdmaload.save(source, cloud.url, **cloud.options)
    assert cloud.server.objects["bucket/m/big.bin"] == bytes(70 * 2**20)


def test_parts_that_come_out_of_order_are_stored_in_order(cloud: Cloud) -> None:
    parts = [bytes([number]) * 6 * 2**20 for number in range(5)]
    with connector_for(cloud.url, **cloud.options) as connector:
        assert isinstance(connector, ObstoreConnector)
        upload = connector.begin_upload("x.bin")
        threads = [
            threading.Thread(target=upload.send, args=(number + 1, part))
            for number, part in reversed([*enumerate(parts)])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        etag = upload.finish()
        assert cloud.server.objects["bucket/m/x.bin"] == b"".join(parts)
        assert etag == next(info.etag for info in connector.list_files() if info.path == "x.bin")
        aborted = connector.begin_upload("y.bin")
        aborted.send(1, parts[0])
        aborted.abort()
        connector.begin_upload("z.bin").abort()
        broken = connector.begin_upload("w.bin")
        waiting = threading.Thread(target=broken.send, args=(2, parts[1]))
        waiting.start()
        broken.interrupt()  # the first part will not come
        waiting.join(60)
        assert not waiting.is_alive()
        broken.abort()
    assert "bucket/m/y.bin" not in cloud.server.objects


def test_a_public_bucket_needs_no_credentials(tiny_checkpoint: Checkpoint) -> None:
    with GoogleStorage("public", public="public") as server:
        fill(Cloud(server, "", {}), tiny_checkpoint, "public/m")
        stats = LoadStats()
        url = f"gs://public/m?unsigned=true&endpoint_url={server.endpoint}"
        assert_loaded(rdmaload.load(url, stats=stats), tiny_checkpoint)
        assert stats.path == "http"
        assert not [request for request in server.requests if "authorization" in request.headers]


@pytest.mark.parametrize("url", ["gs://bucket/m", "az://bucket/m"])
def test_options_that_make_no_sense_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UrlError, match=r"names no (bucket|container)"):
        connector_for(url.replace("bucket", ""))
    with pytest.raises(UrlError, match="ca_file"):
        connector_for(url, endpoint_url="http://127.0.0.1:1", ca_file="/x")
    with pytest.raises(NotSupportedError, match="client_cert_file"):
        connector_for(url, client_cert_file="/x")
    with pytest.raises(UrlError, match="storage_options"):
        connector_for(url, storage_options="[1]")
    with pytest.raises(UrlError, match="orrect the url or storage_options"):
        rdmaload.open(url, storage_options={"no_such_key": "x"}, username="account", unsigned=True)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(NotSupportedError, match=r"pip install 'rdmaload\[(gcs|azure)\]'"):
        rdmaload.open(url)


@pytest.mark.parametrize(
    ("proxy", "error"),
    [("socks5://u:hushhush@127.0.0.1:9", NotSupportedError), ("http://u:hushhush/x@y@127.0.0.1:9", UrlError)],
)
@pytest.mark.parametrize("url", ["gs://bucket/m?unsigned=true", "az://bucket/m?unsigned=true&username=account"])
def test_proxies_of_other_kinds_are_refused_by_name(
    url: str, proxy: str, error: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(error, match="http://") as caught:
        rdmaload.open(url)
    assert "hush" not in str(caught.value)
    monkeypatch.setenv("NO_PROXY", "storage.googleapis.com,account.blob.core.windows.net")
    with connector_for(url) as connector:
        assert isinstance(connector, ObstoreConnector)
        connector._store()


def test_the_command_line_knows_clouds(
    cloud: Cloud, tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from rdmaload.cli import main

    options: list[str] = []
    for name, value in cloud.options.items():
        options += ["-o", f"{name}={json.dumps(value) if isinstance(value, dict) else value}"]
    assert main(["save", str(tiny_checkpoint.directory), cloud.url, *options]) == 0
    assert main(["verify", cloud.url, *options]) == 0
    assert main(["ls", cloud.url, *options]) == 0
    assert "config.json" in capsys.readouterr().out
    for missing in (f"{cloud.url}-none", cloud.url.replace("bucket", "no-such")):
        assert main(["ls", missing, *options]) == 3
        assert missing in capsys.readouterr().err


@pytest.mark.parametrize("cloud", ["gs", "gs-token"], indirect=True)
def test_google_is_asked_for_its_checksums_without_a_body(cloud: Cloud, tiny_checkpoint: Checkpoint) -> None:
    fill(cloud, tiny_checkpoint)
    cloud.server.objects["bucket/m/empty.txt"] = b""
    stats = LoadStats()
    assert_loaded(rdmaload.load(cloud.url, verify="require", stats=stats, **cloud.options), tiny_checkpoint)
    assert stats.verified_bytes == stats.read_bytes
    pulled = rdmaload.pull_files(cloud.url, allow_pattern="*", verify="require", **cloud.options)
    assert (pulled / "empty.txt").read_bytes() == b""
    asked = [request for request in cloud.server.requests if request.path.startswith("/bucket/m/")]
    heads = [request for request in asked if request.method == "HEAD"]
    assert heads
    assert all("if-match" in request.headers for request in heads)
    bodies = [request for request in asked if request.method == "GET" and "manifest" not in request.path]
    assert all(request.range is not None and request.range != (0, 0) for request in bodies)


def test_what_was_removed_counts_as_removed_though_the_first_answer_was_lost(cloud: Cloud) -> None:
    lost: list[Request] = []

    def loses(request: Request, honest: Reply) -> Reply:
        if not lost and (request.method == "DELETE" or "comp=batch" in request.target):
            lost.append(request)
            return Reply(503)
        return honest

    cloud.server.objects["bucket/m/config.json"] = b"{}"
    cloud.server.answer = loses
    with connector_for(cloud.url, **cloud.options) as connector:
        assert isinstance(connector, ObstoreConnector)
        assert connector.delete("config.json") is True
        assert len(lost) == 1
        assert cloud.server.objects == {}
        assert connector.delete("config.json") is False

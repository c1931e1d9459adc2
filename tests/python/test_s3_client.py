"""How botocore's clients are made: what they share, what they must not, and where credentials and regions come from."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import UnknownServiceError
from botocore.loaders import Loader

import rdmaload
from rdmaload.connectors import connector_for, s3_client
from rdmaload.connectors.objects import ObjectConnector
from rdmaload.connectors.s3_client import S3Clients, _shipped
from rdmaload.errors import AuthenticationError
from rdmaload.options import Options
from tests.support.s3 import HttpObjects, Reply, Request

_CONFIG = {"/bucket/m/config.json": b"{}"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No credentials, profiles or proxies of whoever runs the tests, and nothing that was read before."""
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    _shipped.cache_clear()
    yield
    _shipped.cache_clear()


def keys_of(requests: list[Request]) -> set[str]:
    """The access key ids that requests were signed with."""
    return {request.headers["authorization"].partition("Credential=")[2].partition("/")[0] for request in requests}


def test_the_data_is_what_botocore_itself_reads() -> None:
    ours, theirs = _shipped(), Loader()
    for service in ("s3", "sts", "sso", "sso-oidc"):  # the others are asked for credentials
        for kind in ("service-2", "endpoint-rule-set-1", "paginators-1"):
            assert ours.load_service_model(service, kind) == theirs.load_service_model(service, kind)
    for name in ("endpoints", "partitions", "sdk-default-configuration", "_retry"):
        assert ours.load_data_with_path(name) == theirs.load_data_with_path(name)
    assert set(theirs.list_available_services("service-2")) <= set(ours.list_available_services("service-2"))
    with pytest.raises(UnknownServiceError):
        ours.load_service_model("s4", "service-2")


def test_what_botocore_ships_is_read_once_for_all_connectors_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    load_file = s3_client._PlainFiles.load_file

    def counted(self: object, file_path: str) -> object:
        found: object = load_file(self, file_path)  # type: ignore[arg-type]
        read.extend([file_path] if found is not None else [])
        return found

    monkeypatch.setattr(s3_client._PlainFiles, "load_file", counted)
    with HttpObjects(_CONFIG) as server:

        def opened(number: int) -> None:
            url = f"s3://bucket/m?endpoint_url={server.endpoint}&addressing_style=path&region=us-east-1"
            with rdmaload.open(url, username=f"KEY{number}", password="secret") as model:
                assert [file.path for file in model.files] == ["config.json"]

        opened(0)
        before = len(read)
        assert before > 0
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(opened, range(1, 9)))
        assert read[before:] == []
        assert keys_of(server.requests) == {f"KEY{number}" for number in range(9)}
    # Nor did any of them change it, but for the urls, in which every client of botocore puts the bucket elsewhere.
    ours, theirs = (data.load_service_model("s3", "service-2") for data in (_shipped(), Loader()))
    for operation in (*ours["operations"].values(), *theirs["operations"].values()):
        del operation["http"]
    assert ours == theirs
    kind = "endpoint-rule-set-1"
    assert _shipped().load_service_model("s3", kind) == Loader().load_service_model("s3", kind)
    # Two that resolve one region, one of them for FIPS, would iterate over what the other changes.
    assert _shipped().load_data("endpoints") == Loader().load_data("endpoints")


def test_what_a_session_learned_is_not_the_next_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(shared))
    with HttpObjects(_CONFIG) as server:
        for key in ("FIRST", "SECOND"):
            shared.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = hush\n")
            server.requests.clear()
            rdmaload.open(f"s3://bucket/m?endpoint_url={server.endpoint}&region=us-east-1").close()
            assert keys_of(server.requests) == {key}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_process_does_not_wait_for_a_thread_of_its_parent() -> None:
    held, over = threading.Event(), threading.Event()

    def reads() -> None:
        with _shipped()._lock:
            held.set()
            assert over.wait(60)

    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(reads)
        assert held.wait(60)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _shipped().load_service_model("s3", "paginators-1")
                status = 0
            finally:
                os._exit(status)
        try:
            assert pool.submit(os.waitpid, child, 0).result(timeout=30) == (child, 0)
        except BaseException:
            os.kill(child, 9)
            raise
        finally:
            over.set()
        reading.result()


def test_data_of_other_services_is_left_to_botocore(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_DATA_PATH", str(tmp_path))
    clients = S3Clients(Options(), None, url="s3://bucket/m", connections=1)
    loader = clients._session.get_component("data_loader")
    assert loader is not _shipped()
    assert str(tmp_path) in loader.search_paths


def test_botocore_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)  # as if it were not installed
    with HttpObjects(_CONFIG) as server:
        rdmaload.open(f"s3://bucket/m?endpoint_url={server.endpoint}&unsigned=true&region=us-east-1").close()


def test_without_a_region_the_bucket_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(request: Request, honest: Reply) -> Reply:
        if request.method == "HEAD" and request.path.rstrip("/") == "/bucket":
            return Reply(403, {"x-amz-bucket-region": "eu-west-3"})
        return honest

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with HttpObjects(_CONFIG, elsewhere) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        with rdmaload.open("s3://bucket/m?addressing_style=path") as model:
            assert len(model.files) == 1
        first, *others = server.requests
        assert first.method == "HEAD"
        assert others
        assert all("/eu-west-3/s3/" in request.headers["authorization"] for request in others)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "ap-south-1")
        server.requests.clear()
        rdmaload.open("s3://bucket/m?addressing_style=path&region=eu-north-1").close()
        assert all("/eu-north-1/s3/" in request.headers["authorization"] for request in server.requests)
        # A default of the environment is for many buckets, and may be another one's.
        server.requests.clear()
        rdmaload.open("s3://bucket/m?addressing_style=path").close()
        first, *others = server.requests
        assert first.method == "HEAD"
        assert "/ap-south-1/s3/" in first.headers["authorization"]
        assert others
        assert all("/eu-west-3/s3/" in request.headers["authorization"] for request in others)


def test_a_profile_says_how_buckets_are_addressed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("[default]\nregion = eu-west-3\ns3 =\n  addressing_style = path\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    for options, expected in (
        (Options(unsigned=True), "https://s3.eu-west-3.amazonaws.com/bucket/key"),
        (Options(unsigned=True, addressing_style="virtual"), "https://bucket.s3.eu-west-3.amazonaws.com/key"),
    ):
        client = S3Clients(options, None, url="s3://bucket/m", connections=1).in_region("eu-west-3")
        assert client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "key"}) == expected
        client.close()


def test_small_calls_and_weights_trust_the_same_authorities(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(AuthenticationError, match=r"none\.pem"):
        rdmaload.open("s3://bucket/m?unsigned=true")


@pytest.mark.parametrize(("status", "code"), [(404, "NoSuchUpload"), (501, "NotImplemented")])
def test_a_store_without_a_list_of_unfinished_uploads_has_none(status: int, code: str) -> None:
    def without(request: Request, honest: Reply) -> Reply:
        if "uploads" in request.target.partition("?")[2]:
            return Reply(status, body=f"<Error><Code>{code}</Code><Message>none</Message></Error>".encode())
        return honest

    with (
        HttpObjects(_CONFIG, without) as server,
        connector_for(
            f"s3://bucket/m?endpoint_url={server.endpoint}&unsigned=true&region=us-east-1&retry_timeout=1"
        ) as store,
    ):
        assert isinstance(store, ObjectConnector)
        assert store.abort_uploads(1e12) == 0
        assert any("uploads" in request.target for request in server.requests)


def test_authorities_are_read_only_where_the_store_speaks_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(s3_client, "native_context", lambda options, url: asked.append(url))
    with HttpObjects(_CONFIG) as server:
        rdmaload.open(f"s3://bucket/m?endpoint_url={server.endpoint}&unsigned=true&region=us-east-1").close()
        assert asked == []
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)  # only botocore knows of it
        rdmaload.open("s3://bucket/m?unsigned=true&region=us-east-1").close()
        assert asked == ["s3://bucket/m?unsigned=true&region=us-east-1"]

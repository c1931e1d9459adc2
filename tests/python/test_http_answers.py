"""What servers answer: one error for a status, whether Python asked or the native transport, over http:// and s3://."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import rdmaload
from rdmaload import _core, errors
from rdmaload.cli import main
from rdmaload.cli.exits import exit_code
from rdmaload.connectors import connector_for
from rdmaload.connectors.connector import Connector
from tests.support.checkpoints import Checkpoint
from tests.support.clouds import AzureBlobs, GoogleStorage
from tests.support.s3 import HttpObjects, Reply, Request, s3_url

_MEANINGS: dict[type[errors.RdmaloadError], tuple[int, ...]] = {
    errors.UrlError: (301, 302, 303, 307, 308, 400, 406, 411, 413, 414, 415, 417, 418, 422, 424, 426, 428, 431, 499),
    errors.FormatError: (201, 204, 300, 304, 306),
    errors.AuthenticationError: (401, 402, 403, 407, 451),
    errors.NotFoundError: (404, 410),
    errors.IntegrityError: (412, 416),
    errors.NotSupportedError: (405, 501, 505),
    errors.UnavailableError: (408, 409, 421, 423, 425, 429, 500, 502, 503, 504, 507, 511, 520, 599),
}
_DATE = "Sun, 22 Nov 2026 08:00:00 GMT"
_STATUSES = [(status, error) for error, statuses in _MEANINGS.items() for status in statuses]


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def is_of_weights(request: Request) -> bool:
    """Whether bytes of tensors are asked for: what comes before them is a header."""
    return request.range is not None and request.range[0] > 8 and request.path.endswith(".safetensors")


@pytest.mark.parametrize("scheme", ["http", "s3"])
@pytest.mark.parametrize(("status", "error"), _STATUSES)
def test_an_answer_to_a_read_of_weights_is_an_error_of_ours_with_all_that_is_known(
    scheme: str,
    status: int,
    error: type[errors.RdmaloadError],
    tiny_checkpoint: Checkpoint,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuses(request: Request, honest: Reply) -> Reply:
        return Reply(status, {}, b"" if status in (204, 304) else b"no") if is_of_weights(request) else honest

    objects = {f"/bucket/m/{path.name}": path.read_bytes() for path in tiny_checkpoint.directory.iterdir()}
    names = "\n".join(path.name for path in tiny_checkpoint.directory.iterdir())
    with HttpObjects({**objects, "/bucket/files.txt": names.encode()}, refuses) as server:
        opts = ["retry_timeout=0.1"]
        if scheme == "http":
            url = f"{server.endpoint}/bucket/m?sig=hush"
            opts.append("listing=../files.txt")
        else:
            url = s3_url(server.endpoint, "bucket", "m", addressing_style="path")
        with pytest.raises(errors.RdmaloadError, match=f"answered {status}") as caught:
            rdmaload.load(url, **dict(opt.split("=") for opt in opts))  # type: ignore[arg-type]
        assert type(caught.value) is error
        assert caught.value.key is not None
        assert caught.value.key.endswith(".safetensors")
        assert caught.value.url is not None
        for words in (caught.value.url, caught.value.key, "offset", "attempt"):
            assert words in str(caught.value)
        assert main(["load", url, "--json", *(word for opt in opts for word in ("-o", opt))]) == exit_code(error())
        printed = capsys.readouterr()
        assert json.loads(printed.out)["error"]["type"] == error.__name__
        assert "hush" not in printed.out + printed.err + str(caught.value)


def small_answer(status: int) -> Reply:
    return Reply(status, {}, b"" if status in (204, 304) else b"no")


@pytest.mark.parametrize(("status", "error"), _STATUSES)
def test_the_same_answer_to_a_small_request_is_the_same_error(
    status: int, error: type[errors.RdmaloadError], tiny_checkpoint: Checkpoint
) -> None:
    def refuses(request: Request, honest: Reply) -> Reply:
        is_header = request.range is not None and request.path.endswith(".safetensors")
        # 416 to a read from the beginning is what an empty file is answered.
        return small_answer(status) if is_header else honest

    if status == 416:
        error = errors.FormatError
    objects = {f"/m/{path.name}": path.read_bytes() for path in tiny_checkpoint.directory.iterdir()}
    names = "\n".join(path.name for path in tiny_checkpoint.directory.iterdir())
    with HttpObjects({**objects, "/files.txt": names.encode()}, refuses) as server:
        with pytest.raises(errors.RdmaloadError) as caught:
            rdmaload.open(f"{server.endpoint}/m", listing="../files.txt", retry_timeout=0.1)
        assert type(caught.value) is error
        assert caught.value.url is not None


@pytest.mark.parametrize(("status", "error"), [one for one in _STATUSES if one[0] != 416])  # the end of the file
def test_the_same_answer_to_a_small_request_to_s3_is_the_same_error(
    status: int, error: type[errors.RdmaloadError]
) -> None:
    def refuses(request: Request, honest: Reply) -> Reply:
        return small_answer(status) if request.path.endswith("x.bin") else honest

    with (
        HttpObjects({"/bucket/m/x.bin": b"x" * 100}, refuses) as server,
        connector_for(s3_url(server.endpoint, "bucket", "m", addressing_style="path"), retry_timeout=0.2) as connector,
    ):
        with pytest.raises(errors.RdmaloadError) as caught:
            connector.read_into("x.bin", 0, memoryview(bytearray(20)))
        assert type(caught.value) is error
        assert (caught.value.key, caught.value.url) == ("x.bin", connector.url)
        tries = len([request for request in server.requests if request.path.endswith("x.bin")])
        assert (tries > 1) == (error is errors.UnavailableError)


@pytest.fixture(params=["gs", "az"])
def cloud(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Connector]]:
    """A store with 100 bytes, m/x.bin, and who reads them through obstore."""
    with GoogleStorage("bucket", public="bucket") if request.param == "gs" else AzureBlobs("bucket") as server:
        server.objects["bucket/m/x.bin"] = b"x" * 100
        options: dict[str, Any] = {"endpoint_url": server.endpoint, "unsigned": True}
        if request.param == "az":
            options = {"endpoint_url": f"{server.endpoint}/account", "username": "account", "password": server.key}
        with connector_for(f"{request.param}://bucket/m", retry_timeout=0.1, **options) as connector:
            yield server, connector


@pytest.mark.parametrize(("status", "error"), _STATUSES)
def test_the_same_answer_to_a_small_request_to_a_cloud_is_the_same_error(
    status: int, error: type[errors.RdmaloadError], cloud: tuple[Any, Connector]
) -> None:
    server, connector = cloud
    server.answer = lambda request, honest: small_answer(status) if request.method == "GET" else honest
    with pytest.raises(errors.RdmaloadError) as caught:
        connector.read_into("x.bin", 10, memoryview(bytearray(20)))
    # obstore follows no redirect and does not say that 300 is none.
    assert type(caught.value) is (errors.UrlError if status in (300, 306) else error)
    assert (caught.value.key, caught.value.url) == ("x.bin", connector.url)


@pytest.mark.parametrize(
    ("bend", "error"),
    [
        (lambda honest: Reply(200, {"ETag": '"x"', "Last-Modified": _DATE}, b"x" * 100), errors.NotSupportedError),
        (
            lambda honest: Reply(206, {**honest.headers, "Content-Range": "bytes 0-9/100"}, b"x" * 10),
            errors.FormatError,
        ),
        (lambda honest: Reply(206, {"ETag": '"x"', "Last-Modified": _DATE}, honest.body), errors.FormatError),
        (lambda honest: Reply(206, honest.headers, honest.body, cut=0, then="close"), errors.UnavailableError),
    ],
    ids=["whole", "other range", "no range", "cut"],
)
def test_what_a_cloud_sends_is_checked(
    bend: Callable[[Reply], Reply], error: type[errors.RdmaloadError], cloud: tuple[Any, Connector]
) -> None:
    server, connector = cloud
    server.answer = lambda request, honest: bend(honest) if request.method == "GET" else honest
    with pytest.raises(error) as caught:
        connector.read_into("x.bin", 10, memoryview(bytearray(20)))
    assert type(caught.value) is error


def test_azure_wants_to_know_the_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(errors.UrlError, match=r"Account must be specified.*AZURE_STORAGE_ACCOUNT_NAME"):
        rdmaload.open("az://bucket/m")


@pytest.mark.parametrize("code", ["InvalidObjectState", "BlobArchived"])
def test_what_is_archived_is_not_a_matter_of_credentials(code: str, tiny_checkpoint: Checkpoint) -> None:
    def archived(request: Request, honest: Reply) -> Reply:
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        return Reply(403, {}, body) if is_of_weights(request) else honest

    objects = {f"/bucket/m/{path.name}": path.read_bytes() for path in tiny_checkpoint.directory.iterdir()}
    with HttpObjects(objects, archived) as server, pytest.raises(errors.NotSupportedError, match="restore it first"):
        rdmaload.load(s3_url(server.endpoint, "bucket", "m", addressing_style="path"))


def test_what_the_extension_refuses_is_an_error_of_ours() -> None:
    with pytest.raises(errors.UrlError, match="no such checksum"):
        _core.crc("md5", b"", 0)
    with pytest.raises(errors.MemoryLimitError, match="no more memory"):
        _core.HostArena(1 << 62)

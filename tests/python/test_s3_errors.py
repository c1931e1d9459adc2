"""What botocore's exceptions mean: which are the network's, which are of credentials, and which nothing will mend."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor

import pytest
import urllib3.exceptions
from botocore import exceptions as theirs
from botocore.parsers import ResponseParserError

import rdmaload
from rdmaload.connectors.s3_errors import meaning_of
from rdmaload.errors import (
    AuthenticationError,
    FormatError,
    IntegrityError,
    LoadTimeoutError,
    NotSupportedError,
    RdmaloadError,
    UnavailableError,
    UrlError,
)
from tests.support.certificates import Authority
from tests.support.s3 import HttpObjects, Reply, Request, s3_url

_URL = "http://store.example/b/k?X-Amz-Signature=hush"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy") or name == "REQUESTS_CA_BUNDLE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent")


def of_urllib3(failure: ssl.SSLError) -> theirs.SSLError:
    failure.reason = failure.args[1]  # which OpenSSL gives it
    failure.verify_code = 18  # type: ignore[attr-defined]
    return theirs.SSLError(endpoint_url=_URL, error=urllib3.exceptions.SSLError(failure))


_MEANINGS: list[tuple[Exception, type[RdmaloadError]]] = [
    (theirs.EndpointConnectionError(endpoint_url=_URL), UnavailableError),
    (theirs.ConnectionClosedError(endpoint_url=_URL), UnavailableError),
    (theirs.ProxyConnectionError(proxy_url="http://u:hush/x@y@proxy:1", error="?"), UnavailableError),
    (theirs.HTTPClientError(error=OSError("reset")), UnavailableError),
    (theirs.ResponseStreamingError(error="cut"), UnavailableError),
    (theirs.IncompleteReadError(actual_bytes=1, expected_bytes=2), UnavailableError),
    (ResponseParserError("no element found"), UnavailableError),
    (urllib3.exceptions.ProtocolError("cut"), UnavailableError),
    (http.client.IncompleteRead(b""), UnavailableError),
    (ConnectionResetError("reset"), UnavailableError),
    (theirs.ReadTimeoutError(endpoint_url=_URL), LoadTimeoutError),
    (theirs.ConnectTimeoutError(endpoint_url=_URL), LoadTimeoutError),
    (of_urllib3(ssl.SSLEOFError(8, "UNEXPECTED_EOF")), UnavailableError),
    (of_urllib3(ssl.SSLCertVerificationError(1, "self-signed")), AuthenticationError),
    (RuntimeError("Credentials were refreshed, but the refreshed credentials are still expired."), AuthenticationError),
    (theirs.NoCredentialsError(), AuthenticationError),
    (theirs.MetadataRetrievalError(error_msg="none"), AuthenticationError),
    (theirs.RefreshWithMFAUnsupportedError(), AuthenticationError),
    (PermissionError(13, "Permission denied"), AuthenticationError),
    (theirs.MissingDependencyException(msg="needs awscrt"), NotSupportedError),
    (theirs.UnsupportedS3ArnError(arn="arn:x", msg="no"), NotSupportedError),
    (theirs.HTTPClientError(error=urllib3.exceptions.URLSchemeUnknown("ftp")), UrlError),
    (theirs.HTTPClientError(error=urllib3.exceptions.LocationParseError("u:hush")), UrlError),
    (theirs.InvalidRetryModeError(mode="x", provided_retry_mode="x", valid_modes="y"), UrlError),
    (theirs.EndpointResolutionError(msg="no such region"), UrlError),
    (ValueError("Invalid endpoint: x"), UrlError),
    (theirs.FlexibleChecksumError(error_msg="differs"), IntegrityError),
    (ZeroDivisionError("division by zero"), RdmaloadError),
]


@pytest.mark.parametrize(("err", "error"), _MEANINGS, ids=lambda value: getattr(type(value), "__name__", None))
def test_what_an_exception_means(err: Exception, error: type[RdmaloadError]) -> None:
    found = meaning_of(err, "read", "config.json", "s3://b/m")
    assert type(found) is error
    assert (found.key, found.url) == ("config.json", "s3://b/m")
    assert str(found).startswith("cannot read config.json in s3://b/m: ")
    assert "hush" not in str(found)
    assert ".." not in str(found)


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("RequestTimeout", 400, UnavailableError),
        ("IncompleteBody", 400, UnavailableError),
        ("RequestThrottledException", 400, UnavailableError),
        ("SlowDown", 503, UnavailableError),
        ("BadDigest", 400, IntegrityError),
        ("400", 400, UrlError),
        ("InvalidArgument", 400, UrlError),
    ],
)
def test_what_a_code_means(code: str, status: int, error: type[RdmaloadError]) -> None:
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    found = meaning_of(theirs.ClientError(answer, "PutObject"), "write", "f", "s3://b/m")  # type: ignore[arg-type]
    assert type(found) is error


def test_a_port_is_not_taken_for_a_password() -> None:
    err = theirs.EndpointConnectionError(endpoint_url="http://127.0.0.1:9/bucket/a@b/c")
    assert "http://127.0.0.1:9/bucket/a@b/c" in str(meaning_of(err, "read", None, "s3://b/m"))


@pytest.mark.parametrize(
    ("url", "options", "error", "words"),
    [
        ("s3://b/m", {"endpoint_url": "http://127.0.0.1:1/"}, UnavailableError, "connect"),
        ("s3://b!/m", {"endpoint_url": "http://127.0.0.1:1"}, UrlError, "b!: names have 1 to 255 letters, digits"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(url: str, options: dict[str, str], error: type, words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        rdmaload.open(url, region="us-east-1", username="a", password="b", retry_timeout=0.1, **options)
    assert "\n" not in str(caught.value)
    assert "regex" not in str(caught.value)


def test_a_handshake_that_breaks_is_tried_again(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = 0
    with HttpObjects({"/bucket/m/config.json": b"{}"}, tls=authority.issue()) as server:
        wrap = server._encrypted

        def breaks(client: object, tls: object) -> object:
            nonlocal broken
            broken += 1
            if broken == 1:
                raise ConnectionResetError  # which closes it
            return wrap(client, tls)  # type: ignore[arg-type]

        monkeypatch.setattr(server, "_encrypted", breaks)
        url = s3_url(server.endpoint.replace("http:", "https:"), "bucket", "m", addressing_style="path")
        with rdmaload.open(url, ca_file=str(authority.ca_file)) as model:
            assert [file.path for file in model.files] == ["config.json"]
    assert broken > 1


def test_a_port_that_speaks_no_tls_is_unavailable(authority: Authority) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                client, _ = listener.accept()
                with client:
                    client.recv(65536)
                    client.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    with ThreadPoolExecutor(1) as pool, listener:
        pool.submit(serve)
        url = s3_url(f"https://127.0.0.1:{listener.getsockname()[1]}", "bucket", "m", addressing_style="path")
        try:
            with pytest.raises(UnavailableError, match="This is no TLS port"):
                rdmaload.open(url, ca_file=str(authority.ca_file), retry_timeout=0.1)
        finally:
            listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_a_variable_that_names_no_authorities_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "/nonexistent")
    with pytest.raises(AuthenticationError, match=f"{name}=/nonexistent") as caught:
        rdmaload.open("s3://bucket/m?unsigned=true&region=us-east-1")
    assert "ca_file" not in str(caught.value)


def listing(entries: str, more: str = "<IsTruncated>false</IsTruncated>") -> bytes:
    return f"<ListBucketResult>{more}{entries}</ListBucketResult>".encode()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (listing("<Contents><Key>m/config.json</Key></Contents>"), "config.json without a size"),
        (listing("<Contents><Size>5</Size></Contents>"), "an object"),
        (listing("<Contents><Key>m/config.json</Key><Size>-5</Size></Contents>"), "without a size"),
        (listing("<Contents><Key>m/config.json</Key><Size>x</Size></Contents>"), "no number"),
        (
            listing(
                "<Contents><Key>m/config.json</Key><Size>2</Size></Contents>",
                "<IsTruncated>true</IsTruncated><NextContinuationToken>again</NextContinuationToken>",
            ),
            "again and again",
        ),
        (listing("", "<IsTruncated>true</IsTruncated>"), "does not say how to go on"),
    ],
)
def test_a_listing_that_makes_no_sense_is_refused(body: bytes, words: str) -> None:
    def lists(request: Request, honest: Reply) -> Reply:
        return Reply(200, {"Content-Type": "application/xml"}, body) if "list-type" in request.query else honest

    with HttpObjects({"/bucket/m/config.json": b"{}"}, lists) as server:
        with pytest.raises(FormatError, match=words):
            rdmaload.open(s3_url(server.endpoint, "bucket", "m", addressing_style="path"))
        assert len([request for request in server.requests if "list-type" in request.query]) <= 2

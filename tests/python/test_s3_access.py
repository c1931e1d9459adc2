"""How buckets are found and asked: regions, access points, directory buckets, and stores that have moved to https."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

import rdmaload
from rdmaload.connectors import connector_for
from rdmaload.connectors.s3 import S3Connector
from rdmaload.errors import AuthenticationError, NotSupportedError, UrlError
from rdmaload.urls import parse_url
from tests.support.certificates import Authority
from tests.support.checkpoints import Checkpoint, compare
from tests.support.s3 import Answer, ConnectProxy, HttpObjects, Reply, Request

_ZONE = "models--usw2-az1--x-s3"
_ZONE_HOST = f"{_ZONE}.s3express-usw2-az1.us-west-2.amazonaws.com"
_POINT = "arn:aws:s3:eu-west-3:123456789012:accesspoint"
_POINT_HOST = "reads-123456789012.s3-accesspoint.eu-west-3.amazonaws.com"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of nobody, and no profiles or proxies of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy") or name == "REQUESTS_CA_BUNDLE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


def objects_of(checkpoint: Checkpoint, root: str = "/bucket/m") -> dict[str, bytes]:
    return {f"{root}/{path.name}": path.read_bytes() for path in checkpoint.directory.iterdir()}


@dataclass(frozen=True)
class Signed:
    """By whom and for where a request was signed; empty where it was not."""

    key: str
    region: str
    service: str
    native: bool


def signed(request: Request) -> Signed:
    given = request.query.get("X-Amz-Credential", "")
    text = given or request.headers.get("authorization", "").partition("Credential=")[2]
    key, _, region, service = [*text.split("/"), "", "", "", ""][:4]
    return Signed(key, region, service, bool(given))


# ---- regions ----


def only_in_paris(code: str, *, status: int = 400, header: bool = True) -> Answer:
    """A bucket that refuses what is signed for another region, in the ways that stores have."""

    def answer(request: Request, honest: Reply) -> Reply:
        if signed(request).region == "eu-west-3":
            return honest
        headers = {"x-amz-bucket-region": "eu-west-3"} if header or request.method == "HEAD" else {}
        word = "<Region>eu-west-3</Region>" if code == "AuthorizationHeaderMalformed" else ""
        code_here = "AuthorizationQueryParametersError" if signed(request).native and status == 400 else code
        return Reply(status, headers, f"<Error><Code>{code_here}</Code><Message>no</Message>{word}</Error>".encode())

    return answer


ELSEWHERE = {
    "malformed": only_in_paris("AuthorizationHeaderMalformed"),
    "in the body": only_in_paris("AuthorizationHeaderMalformed", header=False),
    "redirect": only_in_paris("PermanentRedirect", status=301),
    "constraint": only_in_paris("IllegalLocationConstraintException"),
}


@pytest.mark.parametrize("way", ELSEWHERE)
def test_a_region_that_is_given_and_not_the_buckets_is_refused_with_the_right_one(
    way: str, tiny_checkpoint: Checkpoint
) -> None:
    with HttpObjects(objects_of(tiny_checkpoint), ELSEWHERE[way]) as server:
        url = f"s3://bucket/m?endpoint_url={server.endpoint}&addressing_style=path"
        with pytest.raises(
            UrlError, match="bucket is in the region eu-west-3, not in us-east-1: give region=eu-west-3"
        ):
            rdmaload.load(f"{url}&region=us-east-1")
        assert len(server.requests) == 1
        with pytest.raises(UrlError, match="give region=eu-west-3"):  # a save lists first
            rdmaload.save(tiny_checkpoint.directory, f"{url}&region=us-east-1")
        assert compare(rdmaload.load(f"{url}&region=eu-west-3"), tiny_checkpoint.directory) == tiny_checkpoint.bytes


@pytest.mark.parametrize("way", ELSEWHERE)
@pytest.mark.parametrize("default", [None, "ap-south-1"])
def test_without_a_region_weights_are_asked_for_where_the_store_says(
    way: str, default: str | None, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    if default is not None:
        monkeypatch.setenv("AWS_DEFAULT_REGION", default)
    with HttpObjects(objects_of(tiny_checkpoint), ELSEWHERE[way]) as server:
        url = f"s3://bucket/m?endpoint_url={server.endpoint}&addressing_style=path"
        assert compare(rdmaload.load(url), tiny_checkpoint.directory) == tiny_checkpoint.bytes
        first, *others = [signed(request) for request in server.requests]
        assert first.region == (default or "us-east-1")
        assert {one.region for one in others} == {"eu-west-3"}
        assert any(one.native for one in others)


def test_a_store_that_does_not_mind_regions_may_name_another(tiny_checkpoint: Checkpoint) -> None:
    def names_its_own(request: Request, honest: Reply) -> Reply:
        honest.headers["x-amz-bucket-region"] = "home"
        return honest

    with HttpObjects(objects_of(tiny_checkpoint), names_its_own) as server:
        url = f"s3://bucket/m?endpoint_url={server.endpoint}&addressing_style=path&region=us-east-1"
        assert compare(rdmaload.load(url), tiny_checkpoint.directory) == tiny_checkpoint.bytes
    assert {signed(request).region for request in server.requests} == {"us-east-1"}


def test_a_region_that_is_no_name_is_not_believed() -> None:
    def lies(request: Request, honest: Reply) -> Reply:
        return Reply(400, {"x-amz-bucket-region": "evil.example/"}, b"<Error><Code>BadRequest</Code></Error>")

    with HttpObjects({}, lies) as server, pytest.raises(rdmaload.RdmaloadError) as caught:
        rdmaload.load(f"s3://bucket/m?endpoint_url={server.endpoint}&region=us-east-1")
    assert "evil" not in str(caught.value)


# ---- AWS itself, as far as a proxy and a certificate can be it ----


@contextlib.contextmanager
def amazon(
    objects: dict[str, bytes], answer: Answer, host: str, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HttpObjects]:
    """A server that is reached, whatever the host, as the one that AWS has for a bucket."""
    with (
        HttpObjects(objects, answer, tls=authority.issue(names=(host,))) as server,
        ConnectProxy(server.endpoint.rpartition(":")[2]) as proxy,
    ):
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, proxy.url)
        yield server
    assert {line.split()[1] for line, _ in proxy.requests} == {f"{host}:443"}


def test_an_access_point_is_read_by_its_arn(
    tiny_checkpoint: Checkpoint, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    def honestly(request: Request, honest: Reply) -> Reply:
        return honest

    with amazon(objects_of(tiny_checkpoint, "/m/deep"), honestly, _POINT_HOST, authority, monkeypatch) as server:
        for separator, options in (("/", {}), (":", {"region": "us-east-1"})):
            url = f"s3://{_POINT}{separator}reads/m/deep"
            state = rdmaload.load(url, ca_file=authority.ca_file, **options)
            assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
    found = [signed(request) for request in server.requests]
    assert {(one.key, one.region, one.service) for one in found} == {("KEY", "eu-west-3", "s3")}
    assert {one.native for one in found} == {True, False}


def test_an_access_point_is_where_its_arn_says() -> None:
    with connector_for("s3://arn:aws-cn:s3:cn-north-1:123456789012:accesspoint/reads/m") as connector:
        assert isinstance(connector, S3Connector)
        url = connector._address("config.json", False)[0]
        assert url.startswith("https://reads-123456789012.s3-accesspoint.cn-north-1.amazonaws.com.cn/m/config.json?")
        assert "%2Fcn-north-1%2Fs3%2F" in url


def test_an_arn_is_a_bucket_and_what_follows_it_a_prefix() -> None:
    for text, bucket, prefix in (
        (f"s3://{_POINT}/reads", f"{_POINT}/reads", ""),
        (f"s3://{_POINT}/reads/a/b%20c/?region=x", f"{_POINT}/reads", "a/b c"),
        (f"s3://{_POINT}:reads/a", f"{_POINT}:reads", "a"),
    ):
        url = parse_url(text)
        assert (url.host, url.model, url.port) == (bucket, prefix, None)
    shown = parse_url(f"s3://{_POINT}/reads/m?username=x&password=hush").redacted
    assert shown == f"s3://{_POINT}/reads/m?username=x&password=***"


@pytest.mark.parametrize(
    "arn",
    [
        "arn:aws:s3::123456789012:accesspoint/over.mrap",
        "arn:aws:s3-outposts:us-east-1:123456789012:outpost/op-1/accesspoint/reads",
        "arn:aws:s3-object-lambda:us-east-1:123456789012:accesspoint/changes",
        "arn:aws:s3:::bucket",
    ],
)
def test_other_arns_are_refused_by_name(arn: str) -> None:
    with pytest.raises(NotSupportedError, match=r"s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME") as caught:
        connector_for(f"s3://{arn}/m")
    assert arn in str(caught.value)


class Zone:
    """A directory bucket: takes nothing but what a session of its own signed, and each session for `uses` requests."""

    def __init__(self, uses: int = 10**9, seconds: float = 300) -> None:
        self.sessions = 0
        self.refused = 0
        self._uses = uses
        self._seconds = seconds
        self._used: dict[str, int] = {}

    def answer(self, request: Request, honest: Reply) -> Reply:
        by = signed(request)
        if by.service != "s3express" or by.region != "us-west-2":
            return Reply(403, {}, b"<Error><Code>AccessDenied</Code><Message>not here</Message></Error>")
        if request.target.partition("?")[2].startswith("session"):
            self.sessions += 1
            end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=self._seconds)
            text = (
                "<CreateSessionResult><Credentials>"
                f"<SessionToken>token-{self.sessions}</SessionToken><SecretAccessKey>hush</SecretAccessKey>"
                f"<AccessKeyId>SESSION{self.sessions}</AccessKeyId><Expiration>{end:%Y-%m-%dT%H:%M:%SZ}</Expiration>"
                "</Credentials></CreateSessionResult>"
            )
            return Reply(200, {"Content-Type": "application/xml"}, text.encode())
        token = request.query.get("X-Amz-S3session-Token") or request.headers.get("x-amz-s3session-token", "")
        used = self._used[token] = self._used.get(token, 0) + 1
        if by.key.removeprefix("SESSION") != token.removeprefix("token-") or used > self._uses:
            self.refused += 1
            return Reply(403, {}, b"<Error><Code>ExpiredToken</Code><Message>begin another</Message></Error>")
        if request.method == "PUT":
            return Reply(200, {"ETag": '"x"'})
        return honest


def test_a_directory_bucket_is_read_by_sessions(
    tiny_checkpoint: Checkpoint, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = Zone()
    with amazon(objects_of(tiny_checkpoint, "/m"), zone.answer, _ZONE_HOST, authority, monkeypatch) as server:
        state = rdmaload.load(f"s3://{_ZONE}/m", ca_file=authority.ca_file, region="us-west-2")
        assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
        assert (zone.sessions, zone.refused) == (1, 0)
        with connector_for(f"s3://{_ZONE}/m", ca_file=authority.ca_file, region="us-west-2") as connector:
            assert isinstance(connector, S3Connector)
            connector.put("config.json", b"{}")
    assert [request for request in server.requests if signed(request).native]


def test_a_session_that_ends_during_a_load_is_followed_by_another(
    tiny_checkpoint: Checkpoint, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = Zone(uses=6, seconds=40)  # so near its end that botocore renews it whenever it signs
    with amazon(objects_of(tiny_checkpoint, "/m"), zone.answer, _ZONE_HOST, authority, monkeypatch):
        state = rdmaload.load(f"s3://{_ZONE}/m", ca_file=authority.ca_file, region="us-west-2", connections=2)
        assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
        assert zone.sessions > 2


def test_urls_of_a_directory_bucket_end_before_their_session() -> None:
    zone = Zone()
    with (
        HttpObjects({}, zone.answer) as server,
        connector_for(f"s3://{_ZONE}/m?endpoint_url={server.endpoint}&region=us-west-2") as connector,
        connector_for(f"s3://bucket/m?endpoint_url={server.endpoint}&region=us-west-2") as plain,
    ):
        assert isinstance(connector, S3Connector)
        assert isinstance(plain, S3Connector)
        for one, seconds in ((connector, 30), (plain, 3300)):
            url, *_, lasts = one._address("model.safetensors", False)
            assert ("X-Amz-S3session-Token=token-1" in url) == (one is connector)
            assert lasts == seconds


def test_the_region_of_a_directory_bucket_must_be_given() -> None:
    with pytest.raises(UrlError, match=f"{_ZONE} is a directory bucket .* give region="):
        rdmaload.load(f"s3://{_ZONE}/m")


# ---- https ----


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_store_that_has_moved_to_https_says_what_to_write(
    status: int, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved(request: Request, honest: Reply) -> Reply:
        return Reply(status, {"Location": f"https://store.example{request.target}"})

    words = r"redirect to https://store.example/.* write https:// in endpoint_url="
    with HttpObjects({}, moved) as server:
        with pytest.raises(UrlError, match=words):
            rdmaload.load(f"s3://bucket/m?endpoint_url={server.endpoint}&region=us-east-1&addressing_style=path")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        with pytest.raises(UrlError, match=words):
            rdmaload.load("s3://bucket/m?region=us-east-1&addressing_style=path", ca_file=authority.ca_file)
        assert len(server.requests) == 2


def test_weights_that_are_sent_on_to_https_are_read_there(
    tiny_checkpoint: Checkpoint, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved(request: Request, honest: Reply) -> Reply:
        if signed(request).native:
            return Reply(307, {"Location": f"{there.endpoint.replace('http://', 'https://')}{request.target}"})
        return honest

    objects = objects_of(tiny_checkpoint)
    with HttpObjects(objects, tls=authority.issue()) as there, HttpObjects(objects, moved) as server:
        url = f"s3://bucket/m?endpoint_url={server.endpoint}&region=us-east-1&addressing_style=path"
        monkeypatch.setenv("SSL_CERT_DIR", "/nonexistent")
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))
        assert compare(rdmaload.load(url), tiny_checkpoint.directory) == tiny_checkpoint.bytes
        assert there.requests
        monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent")
        with pytest.raises(AuthenticationError, match="is not accepted"):
            rdmaload.load(url)

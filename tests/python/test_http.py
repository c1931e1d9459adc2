"""Models on http servers: what they list, what they refuse, and what they should not do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import torch

import rdmaload
from rdmaload.cli import main
from rdmaload.connectors import FileConnector, connector_for, http, http_client, http_files
from rdmaload.connectors.http_listing import listed_directory, listed_files, weight_index_files
from rdmaload.errors import (
    AuthenticationError,
    FormatError,
    IntegrityError,
    LoadTimeoutError,
    NotFoundError,
    NotSupportedError,
    UnavailableError,
    UrlError,
)
from rdmaload.options import Options
from rdmaload.stats import LoadStats
from tests.support.certificates import Authority
from tests.support.checkpoints import Checkpoint
from tests.support.s3 import HttpObjects, Reply, Request
from tests.support.web import Nginx, apache_pages


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxies of whoever runs the tests."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def objects_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {f"/m/{path.name}": path.read_bytes() for path in checkpoint.directory.iterdir()}


def assert_loaded(state: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    from safetensors.torch import load_file

    expected: dict[str, torch.Tensor] = {}
    for path in checkpoint.directory.glob("*.safetensors"):
        expected |= load_file(path)
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name].view(torch.uint8).reshape(-1), tensor.view(torch.uint8).reshape(-1)), name


def paths(url: str, **options: object) -> list[str]:
    with connector_for(url, **options) as connector:
        assert isinstance(connector, FileConnector)
        return [info.path for info in connector.list_files()]


@pytest.fixture
def served(tiny_checkpoint: Checkpoint) -> Iterator[HttpObjects]:
    """The tiny checkpoint at /m, on a server that lists directories."""
    objects = objects_of(tiny_checkpoint)
    with HttpObjects(objects, apache_pages(objects)) as server:
        yield server


def test_a_model_is_loaded_natively_and_its_versions_are_pinned(
    served: HttpObjects, tiny_checkpoint: Checkpoint
) -> None:
    stats = LoadStats()
    assert_loaded(rdmaload.load(f"{served.endpoint}/m", stats=stats), tiny_checkpoint)
    assert (stats.path, stats.connections, stats.generation) == ("http", 8, None)
    assert stats.unverified_bytes == stats.read_bytes >= stats.bytes > 0
    ranged = [request for request in served.requests if request.range and request.range[0] > 8]
    assert ranged
    assert all("if-match" in request.headers for request in ranged)


def test_a_manifest_beside_the_files_verifies_them_whatever_their_tags(tiny_checkpoint: Checkpoint) -> None:
    from tests.support.s3 import boto_client, moto_s3, s3_url

    with moto_s3("bucket") as endpoint:
        rdmaload.save(tiny_checkpoint.directory, s3_url(endpoint, "bucket", "m"), chunk_bytes=100_000)
        client = boto_client(endpoint)
        keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="bucket")["Contents"]]
        objects = {f"/{key}": client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys}
        client.close()

    def other_tags(request: Request, honest: Reply) -> Reply:
        assert "if-match" not in request.headers or request.headers["if-match"] == '"mine"'
        if request.headers.pop("if-match", None):
            honest = server.honest(request)
        if "ETag" in honest.headers:
            honest.headers["ETag"] = '"mine"'
        return honest

    with HttpObjects(objects, other_tags) as server:
        stats = LoadStats()
        assert_loaded(rdmaload.load(f"{server.endpoint}/m", verify="require", stats=stats), tiny_checkpoint)
        assert stats.verified_bytes == stats.read_bytes > 0
        assert stats.generation is not None
        wrong = next(path for path in server.objects if path.endswith(".safetensors"))
        server.objects[wrong] = server.objects[wrong][:-1] + bytes([server.objects[wrong][-1] ^ 1])
        with pytest.raises(IntegrityError, match="CRC32C"):
            rdmaload.load(f"{server.endpoint}/m")


def test_where_nothing_is_listed_the_weight_index_or_the_one_file_says_what_there_is(
    tiny_checkpoint: Checkpoint,
) -> None:
    objects = objects_of(tiny_checkpoint)
    weights = sorted(path.removeprefix("/m/") for path in objects if path.endswith(".safetensors"))
    index = json.dumps({"weight_map": {f"t{number}": name for number, name in enumerate(weights)}}).encode()
    objects = {path: data for path, data in objects.items() if not path.endswith(".index.json")}
    objects["/m/model.safetensors.index.json"] = index
    objects["/one/model.safetensors"] = objects[f"/m/{weights[0]}"]
    with HttpObjects(objects) as server:
        wanted = sorted(path.removeprefix("/m/") for path in objects if path.startswith("/m/"))
        assert paths(f"{server.endpoint}/m/") == wanted
        assert paths(f"{server.endpoint}/m/model.safetensors.index.json") == wanted
        assert paths(f"{server.endpoint}/one") == ["model.safetensors"]
        assert paths(f"{server.endpoint}/one/model.safetensors") == ["model.safetensors"]
        with pytest.raises(NotFoundError, match="give listing="):
            paths(f"{server.endpoint}/none")


def test_a_listing_file_names_the_files(tiny_checkpoint: Checkpoint) -> None:
    objects = objects_of(tiny_checkpoint)
    names = sorted(path.removeprefix("/m/") for path in objects)
    objects["/m/files.txt"] = "\n".join(["# the files", "", *names]).encode()
    sizes = [{"path": name, "size": len(objects[f"/m/{name}"])} for name in names]
    objects["/lists/m.json"] = json.dumps({"files": sizes}).encode()
    objects["/m/gone.txt"] = b"none.json\n"
    objects["/m/out.txt"] = b"../secret\n"
    objects["/m/odd.json"] = b'{"a": 1}'
    with HttpObjects(objects) as server:
        url = f"{server.endpoint}/m"
        assert paths(url, listing="files.txt") == names
        assert_loaded(rdmaload.load(url, listing=f"{server.endpoint}/lists/m.json"), tiny_checkpoint)
        with pytest.raises(NotFoundError, match=r"none\.json is listed"):
            paths(url, listing="gone.txt")
        with pytest.raises(FormatError, match="cannot be part of a model"):
            paths(url, listing="out.txt")
        with pytest.raises(FormatError, match="lists no files"):
            paths(url, listing="odd.json")
        with pytest.raises(NotFoundError, match="404"):
            paths(url, listing="nowhere.txt")
        with pytest.raises(UrlError, match="another server"):
            paths(url, listing="http://elsewhere.invalid/files.txt")


def test_pages_of_servers_are_read_as_what_they_list() -> None:
    page = """<html><body><h1>Index of /m/</h1><a href="../">../</a><a href="?C=N">N</a><a href="/other/x">x</a>
    <a href="sub/">sub/</a> <a href="a%20b%23.json">a b</a><a href="./c:d.txt">c</a><a href="%ff">bad</a>
    <a href="https://h.example/m/full.bin">full</a><a href="https://else.example/m/no.bin">no</a><a href="#top">t</a>
    <a href="deep/er.txt">deep</a><a href="http://[bad">bad</a></body></html>"""
    found = listed_directory(page.encode(), "text/html", "https://h.example/m/")
    assert found == {"sub/": None, "a b#.json": None, "c:d.txt": None, "full.bin": None}
    nginx = (
        b'[{"name":"sub","type":"directory"},{"name":"a b","type":"file","size":3},{"name":"..","type":"directory"}]'
    )
    assert listed_directory(nginx, "application/json", "http://h/m/") == {"sub/": None, "a b": 3}
    caddy = b'[{"name":"sub/","is_dir":true,"size":4096},{"name":"x","is_dir":false,"size":0},{"name":"y/z","size":1}]'
    assert listed_directory(caddy, "application/json", "http://h/m/") == {"sub/": None, "x": 0}
    for other in (b'{"detail": "hello"}', b"[1, 2]", b"[", b"\xff["):
        assert listed_directory(other, "application/json", "http://h/m/") is None
    assert listed_files(b'["a", {"name": "b", "size": 2}]') == {"a": None, "b": 2}
    assert listed_files(b'{"weight_map": {"t": "w"}}') == {"w": None}
    for wrong in (b"[1]", b"[", b'{"files": 3}', b"\xff"):
        with pytest.raises(FormatError):
            listed_files(wrong)
    for wrong in (b"[]", b'{"weight_map": {"t": 3}}', b"<html>"):
        with pytest.raises(FormatError):
            weight_index_files(wrong)


def test_links_that_lead_round_in_circles_end(served: HttpObjects) -> None:
    def circle(request: Request, honest: Reply) -> Reply:
        if request.path.endswith("/"):
            return Reply(200, {"Content-Type": "text/html"}, b'<a href="again/">again</a><a href="f">f</a>')
        return Reply(200, {"ETag": '"1"'}, b"x") if request.path.endswith("/f") else honest

    with HttpObjects({}, circle) as server:
        assert len(paths(f"{server.endpoint}/m")) == 33


def test_a_file_that_was_replaced_is_an_error_before_and_while_it_is_read(
    served: HttpObjects, tiny_checkpoint: Checkpoint
) -> None:
    weights = sorted(path for path in served.objects if path.endswith(".safetensors"))[0]
    content = served.objects[weights]
    with rdmaload.open(f"{served.endpoint}/m") as model:
        served.objects[weights] = content[:-1] + bytes([content[-1] ^ 1])
        with pytest.raises(IntegrityError, match="replaced") as caught:
            model.load()
        assert caught.value.key == weights.removeprefix("/m/")
    with connector_for(f"{served.endpoint}/m") as connector:
        assert isinstance(connector, FileConnector)
        buffer = memoryview(bytearray(8))
        connector.read_into(weights.removeprefix("/m/"), 0, buffer)
        served.objects[weights] = content
        with pytest.raises(IntegrityError, match="replaced"):
            connector.read_into(weights.removeprefix("/m/"), 0, buffer)
        connector.pin({})  # as an open does
        assert len(list(connector.list_files())) > 1
        connector.read_into(weights.removeprefix("/m/"), 0, buffer)


def test_a_server_without_tags_is_pinned_by_date(tiny_checkpoint: Checkpoint) -> None:
    date = "Sun, 22 Nov 2026 08:00:00 GMT"
    asked: list[str] = []

    def dated(request: Request, honest: Reply) -> Reply:
        if "if-unmodified-since" in request.headers:
            asked.append(request.headers["if-unmodified-since"])
            if request.headers["if-unmodified-since"] != date:
                return Reply(412)
        assert "if-match" not in request.headers
        honest.headers.pop("ETag", None)
        honest.headers["Last-Modified"] = date
        return pages(request, honest)

    objects = objects_of(tiny_checkpoint)
    pages = apache_pages(objects)
    with HttpObjects(objects, dated) as server, rdmaload.open(f"{server.endpoint}/m") as model:
        assert_loaded(model.load(), tiny_checkpoint)
        assert asked
    with HttpObjects(objects, dated) as server, rdmaload.open(f"{server.endpoint}/m") as model:
        date = "Sun, 22 Nov 2026 09:00:00 GMT"
        with pytest.raises(IntegrityError, match="replaced"):
            model.load()


def test_credentials_go_with_every_request_and_never_into_text(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"authorization": "Bearer hush-token"}

    def guards(request: Request, honest: Reply) -> Reply:
        if any(request.headers.get(name) != text for name, text in wanted.items()):
            return Reply(401, {"WWW-Authenticate": "Basic"})
        return pages(request, honest)

    objects = objects_of(tiny_checkpoint)
    pages = apache_pages(objects)
    with HttpObjects(objects, guards) as server:
        url = f"{server.endpoint}/m"
        monkeypatch.setenv("A_TOKEN", "hush-token")
        assert_loaded(rdmaload.load(url, password_env="A_TOKEN"), tiny_checkpoint)
        wanted = {"authorization": "Basic dTpodXNoOnB3"}
        assert_loaded(rdmaload.load(url, username="u", password="hush:pw"), tiny_checkpoint)
        assert_loaded(rdmaload.load(url.replace("//", "//u:hush%3Apw@")), tiny_checkpoint)
        wanted = {"x-api-key": "hush-key", "x-other": "1"}
        given = {"X-Api-Key": "hush-key", "X-Other": "1"}
        assert_loaded(rdmaload.load(url, headers=given), tiny_checkpoint)
        assert_loaded(rdmaload.load(url, headers="X-Api-Key: hush-key\nX-Other: 1"), tiny_checkpoint)
        for options in ({}, {"headers": {"X-Api-Key": "hush-wrong"}}, {"password": "hush-wrong"}):
            with pytest.raises(AuthenticationError, match=r"answered 401.*password_env") as caught:
                rdmaload.load(url, **options)
            assert "hush" not in str(caught.value)
            assert "hush" not in repr(rdmaload.Options(**options))  # type: ignore[arg-type]
        with pytest.raises(UrlError) as refused:
            rdmaload.load(url, headers="hush-no-header")
        assert "hush" not in str(refused.value)
        for bad in ({"X": "a\r\nY: b"}, {"a b": "x"}, {"X": "\0"}, 3, ""):
            with pytest.raises(UrlError, match="headers must be"):
                rdmaload.Options(headers=bad)  # type: ignore[arg-type]


def test_the_query_belongs_to_the_server_and_is_a_secret(served: HttpObjects, tiny_checkpoint: Checkpoint) -> None:
    url = f"{served.endpoint}/m?sig=hush&connections=wrong"
    assert_loaded(rdmaload.load(url), tiny_checkpoint)
    assert all(request.target.endswith("?sig=hush&connections=wrong") for request in served.requests)
    with pytest.raises(NotFoundError) as caught:
        rdmaload.load(url.replace("/m?", "/none?"))
    assert "hush" not in str(caught.value) + str(caught.value.url)


def test_authorities_are_read_where_a_server_speaks_tls_also_behind_a_redirect(
    served: HttpObjects, tiny_checkpoint: Checkpoint, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    python_context = http_client.python_context

    def counted(options: Options, *, url: str) -> ssl.SSLContext:
        made.append(url)
        return python_context(options, url=url)

    native: list[str] = []
    native_context = http_files.native_context

    def counted_natively(options: Options, *, url: str) -> object:
        native.append(url)
        return native_context(options, url=url)

    monkeypatch.setattr(http_client, "python_context", counted)
    monkeypatch.setattr(http_files, "native_context", counted_natively)
    assert_loaded(rdmaload.load(f"{served.endpoint}/m"), tiny_checkpoint)
    assert (made, native) == ([], [])
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))
    objects = objects_of(tiny_checkpoint)
    with HttpObjects(objects, apache_pages(objects), tls=authority.issue()) as secured:

        def redirects(request: Request, honest: Reply) -> Reply:
            return Reply(302, {"Location": f"{secured.endpoint.replace('http:', 'https:')}{request.target}"})

        with HttpObjects({}, redirects) as front:
            assert_loaded(rdmaload.load(f"{front.endpoint}/m"), tiny_checkpoint)
            assert (len(made), len(native)) == (1, 1)


def test_weights_behind_a_redirect_to_a_server_that_nobody_vouches_for_are_refused_by_url_and_file(
    served: HttpObjects, tiny_checkpoint: Checkpoint, authority: Authority
) -> None:
    honestly = served.answer
    with HttpObjects(served.objects, tls=authority.issue()) as secured:

        def redirects(request: Request, honest: Reply) -> Reply:
            if request.range is None or request.range[0] <= 8:
                return honestly(request, honest)
            return Reply(302, {"Location": f"{secured.endpoint.replace('http:', 'https:')}{request.target}"})

        served.answer = redirects
        with pytest.raises(AuthenticationError, match="certificate") as caught:
            rdmaload.load(f"{served.endpoint}/m", retry_timeout=0.1)
    assert caught.value.url == f"{served.endpoint}/m"
    assert caught.value.key is not None


def test_a_redirect_is_followed_without_the_credentials(served: HttpObjects, tiny_checkpoint: Checkpoint) -> None:
    def redirects(request: Request, honest: Reply) -> Reply:
        assert request.headers.get("authorization") == "Bearer hush"
        return Reply(302, {"Location": f"{served.endpoint}{request.target}?cdn=hush-too"})

    with HttpObjects({}, redirects) as front:
        assert_loaded(rdmaload.load(f"{front.endpoint}/m", password="hush"), tiny_checkpoint)
    assert served.requests
    assert not [request for request in served.requests if "authorization" in request.headers]

    def circle(request: Request, honest: Reply) -> Reply:
        return Reply(302, {"Location": f"/m/?sig=hush{request.number}"})

    with HttpObjects({}, circle) as front:
        with pytest.raises(UrlError, match="more than 5 redirects") as caught:
            rdmaload.load(f"{front.endpoint}/m")
        assert "hush" not in str(caught.value)
        assert len(front.requests) == 6  # and not again: the same would come of it


def test_a_storm_ends_byte_equal(served: HttpObjects, tiny_checkpoint: Checkpoint) -> None:
    honestly = served.answer

    def storm(request: Request, honest: Reply) -> Reply:
        honest = honestly(request, honest)
        if request.number % 3 == 0:
            return Reply(503, {"Retry-After": "0"})
        if honest.status == 206 and request.number % 3 == 1:
            honest.cut, honest.then = len(honest.body) // 2, "close" if request.number % 2 else "reset"
        return honest

    served.answer = storm
    assert_loaded(rdmaload.load(f"{served.endpoint}/m"), tiny_checkpoint)
    pulled = rdmaload.pull_files(f"{served.endpoint}/m")
    assert (pulled / "config.json").read_bytes() == (tiny_checkpoint.directory / "config.json").read_bytes()


def test_a_server_that_is_away_stalls_or_stays_busy_ends_in_time(served: HttpObjects) -> None:
    url = f"{served.endpoint}/m"
    served.answer = lambda request, honest: Reply(503)
    with pytest.raises(UnavailableError, match="answered 503"):
        rdmaload.load(url, retry_timeout=0.2)
    served.answer = lambda request, honest: Reply(200, {}, b"x", cut=0, then="stall")
    with pytest.raises(LoadTimeoutError, match="no byte came in time"):
        rdmaload.load(url, retry_timeout=0.2, inactivity_timeout=0.1)
    served.close()
    with pytest.raises(UnavailableError, match=r"refused\. See that the url is right"):
        rdmaload.load(url, retry_timeout=0.2)


@pytest.mark.parametrize(
    ("lie", "error", "words"),
    [
        (lambda reply: Reply(200, {}, b"x" * 10**6), NotSupportedError, "does not support ranges"),
        (lambda reply: Reply(206, {}, reply.body), FormatError, "without saying which bytes"),
        (lambda reply: Reply(206, {"Content-Range": "bytes 1-8/10"}, b"x" * 8), FormatError, "the server sends 1-8"),
        (
            lambda reply: Reply(206, {**reply.headers, "Content-Encoding": "gzip"}, reply.body),
            FormatError,
            "encoded",
        ),
        (
            lambda reply: Reply(206, {**reply.headers, "ETag": '"other"'}, reply.body),
            IntegrityError,
            "replaced",
        ),
        (lambda reply: Reply(403), AuthenticationError, "answered 403"),
        (lambda reply: Reply(412), IntegrityError, "replaced"),
        (lambda reply: Reply(410), NotFoundError, "answered 410"),
    ],
)
def test_lies_about_headers_of_weight_files_are_refused_by_name(
    served: HttpObjects, lie: object, error: type, words: str
) -> None:
    honestly = served.answer

    def lies(request: Request, honest: Reply) -> Reply:
        honest = honestly(request, honest)
        return lie(honest) if honest.status == 206 and request.path.endswith(".safetensors") else honest  # type: ignore[operator]

    served.answer = lies
    with pytest.raises(error, match=words) as caught:
        rdmaload.open(f"{served.endpoint}/m", retry_timeout=0.1)
    assert caught.value.key.endswith(".safetensors")  # type: ignore[attr-defined]


def test_a_server_that_refuses_head_is_asked_otherwise(served: HttpObjects, tiny_checkpoint: Checkpoint) -> None:
    honestly = served.answer

    def refuses(request: Request, honest: Reply) -> Reply:
        return Reply(405) if request.method == "HEAD" else honestly(request, honest)

    served.objects["/m/empty"] = b""
    served.answer = refuses
    assert_loaded(rdmaload.load(f"{served.endpoint}/m"), tiny_checkpoint)


def test_nothing_is_saved(served: HttpObjects, tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(NotSupportedError, match="read, not saved"):
        rdmaload.save(tiny_checkpoint.directory, f"{served.endpoint}/m")
    assert served.requests == []
    with connector_for(f"{served.endpoint}/m") as connector:
        assert isinstance(connector, FileConnector)
        with pytest.raises(NotSupportedError):
            connector.write("a", 0, [])
        with pytest.raises(NotSupportedError):
            connector.delete("a")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/m", "hf://org/model"])
def test_what_is_read_only_has_nothing_to_remove(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for remove in (rdmaload.remove, rdmaload.prune):
        with pytest.raises(NotSupportedError, match="is read only: remove the model where it is kept"):
            remove(url)
    assert main(["rm", "--yes", url]) != 0
    assert "is read only" in capsys.readouterr().err


def test_a_model_is_copied_into_another_store(served: HttpObjects, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    rdmaload.save(f"{served.endpoint}/m", tmp_path / "copy")
    assert_loaded(rdmaload.load(tmp_path / "copy"), tiny_checkpoint)


def test_tls_is_verified_for_small_requests_and_weights(tiny_checkpoint: Checkpoint, authority: Authority) -> None:
    with Nginx(tiny_checkpoint.directory, tls=authority) as server:
        url = f"{server.endpoint}/"
        assert_loaded(rdmaload.load(url, ca_file=authority.ca_file), tiny_checkpoint)
        with pytest.raises(AuthenticationError, match="ca_file="):
            rdmaload.load(url, retry_timeout=0.1)
        assert_loaded(rdmaload.load(url, verify_tls=False), tiny_checkpoint)
        assert_loaded(rdmaload.load(url, ca_file=authority.ca_file, server_name="localhost"), tiny_checkpoint)
    with pytest.raises(UrlError, match="ca_file would have no effect"):
        connector_for("http://127.0.0.1/m", ca_file=authority.ca_file)


def test_a_proxy_of_the_environment_is_used(tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = objects_of(tiny_checkpoint)
    pages = apache_pages(objects)

    def as_proxy(request: Request, honest: Reply) -> Reply:
        assert request.target.startswith("http://store.invalid/")
        assert request.headers.get("proxy-authorization") == "Basic bWU6aHVzaA=="
        inner = Request(request.method, request.target.removeprefix("http://store.invalid"), request.headers, 0)
        return pages(inner, server.honest(inner))

    with HttpObjects(objects, as_proxy) as server:
        monkeypatch.setenv("http_proxy", server.endpoint.replace("//", "//me:hush@"))
        assert_loaded(rdmaload.load("http://store.invalid/m"), tiny_checkpoint)
        assert [request for request in server.requests if request.range and request.range[0] > 8]


def test_no_proxy_and_secrets_of_a_proxy_are_honoured(
    served: HttpObjects, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and never listens
        monkeypatch.setenv("http_proxy", f"http://me:hush@127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(UnavailableError, match="refused") as caught:
            rdmaload.load(f"{served.endpoint}/m", retry_timeout=0.1)
        assert "hush" not in str(caught.value)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert_loaded(rdmaload.load(f"{served.endpoint}/m"), tiny_checkpoint)


def test_the_command_line_knows_http(served: HttpObjects, capsys: pytest.CaptureFixture[str]) -> None:
    from rdmaload.cli import main

    url = f"{served.endpoint}/m?sig=hush"
    assert main(["ls", url]) == 0
    for more in ([], ["--scan"]):
        assert main(["ls", url.replace("/m?", "/none?"), *more]) == 3
    assert "config.json" in capsys.readouterr().out
    assert main(["info", url]) == 0
    assert main(["doctor", url]) in (0, 1)
    assert main(["load", url, "-o", "headers=X-Key: hush"]) == 0
    assert main(["ls", url, "-o", "headers=hush"]) == 2
    assert "hush" not in "".join(capsys.readouterr())


_ODD = "my modèl (1) a+b&c=d;e,f@g:h 100%41 [x]~!'$*"


@pytest.mark.parametrize("listing", ["html", "json", "off"])
def test_names_with_spaces_and_unicode_are_one_model_however_the_url_writes_them(
    listing: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "web" / _ODD
    shutil.copytree(tiny_checkpoint.directory, folder)
    for path in sorted(folder.glob("*.safetensors")):
        path.rename(folder / f"wéights #{path.name}")
    odd = {f"wéights #{path.name}" for path in tiny_checkpoint.directory.glob("*.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: name for name in odd}}))
    (folder / "my files.txt").write_text("\n".join(sorted({*odd, "config.json"})))
    quoted = quote(_ODD, safe="")
    spellings = [_ODD.replace("%", "%25"), quoted, quoted.replace("%20", " ").replace("%2B", "+"), quoted.lower()]
    with Nginx(tmp_path / "web", listing=listing) as server:
        for number, spelling in enumerate(spellings):
            url = f"{server.endpoint}/{spelling}"
            stats = LoadStats()
            assert_loaded(rdmaload.load(url, cache_dir=tmp_path / "cache", stats=stats), tiny_checkpoint)
            assert (stats.path == "http") == (stats.cached_bytes < stats.read_bytes) == (number == 0)
            pulled = rdmaload.pull_files(url, tmp_path / f"pulled {number}", allow_pattern=["*"])
            for path in folder.iterdir():
                if listing != "off" or path.name in odd | {"config.json"}:
                    assert (pulled / path.name).read_bytes() == path.read_bytes()
            assert odd < set(paths(url, listing="my files.txt"))
            assert odd < set(paths(url, listing=f"{url}/my files.txt"))
            one = sorted(odd)[0]
            assert paths(f"{url}/{one.replace('#', '%23')}") == [one]


def test_a_query_with_spaces_and_a_redirect_to_names_as_they_are_work(
    served: HttpObjects, tiny_checkpoint: Checkpoint
) -> None:
    moved = {path.replace("/m/", "/ä b/"): data for path, data in served.objects.items()}

    def redirects(request: Request, honest: Reply) -> Reply:
        if request.path.startswith("/m/"):
            assert request.query == {"who": "ä b", "sig": "a+b"} or not request.query
            place = f"/ä b/{request.path.removeprefix('/m/')}".encode().decode("latin-1")
            return Reply(302, {"Location": place})
        return honest

    objects = {**moved, "/l.txt": "\n".join(path.removeprefix("/ä b/") for path in moved).encode()}
    with HttpObjects(objects, redirects) as server:
        url = f"{server.endpoint}/m?who=ä b&sig=a%2Bb"
        assert_loaded(rdmaload.load(url, listing="../l.txt"), tiny_checkpoint)
        with pytest.raises(UrlError, match="names a host that cannot be one"):
            connector_for(f"http://{'ä' * 99}/m")
    with connector_for("http://bücher.example:81/m") as connector:
        assert isinstance(connector, http.HttpConnector)
        assert connector.file_url("a b") == "http://xn--bcher-kva.example:81/m/a%20b"

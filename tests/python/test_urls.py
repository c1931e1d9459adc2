"""Urls: parts, refusals, and that a secret never shows."""

from __future__ import annotations

import pickle
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdmaload.errors import UrlError
from rdmaload.urls import Url, is_secret_option, parse_url, redact


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("redis://h/m", {"scheme": "redis", "host": "h", "port": 6379, "model": "m", "user": None}),
        ("redis://h:7000/org/m/", {"port": 7000, "model": "org/m"}),
        ("REDIS://h/M", {"scheme": "redis", "model": "M"}),
        ("valkey://h/m", {"scheme": "valkey", "port": 6379}),
        ("rediss://h/m", {"scheme": "rediss", "port": 6379}),
        ("rdma://h/m?fallback=never", {"port": 6379, "query": {"fallback": "never"}}),
        ("redis://[::1]:7000/m", {"host": "::1", "port": 7000}),
        ("redis://[fe80::1%25eth0]/m", {"host": "fe80::1%eth0", "port": 6379}),
        ("redis://u:p%40%2F%3A@h/m", {"user": "u", "password": "p@/:"}),
        ("redis://:p@h/m", {"user": None, "password": "p"}),
        ("redis://u@h/m", {"user": "u", "password": None}),
        ("redis://h/a%20b", {"model": "a b"}),
        ("redis://h/modèle", {"model": "modèle"}),
        ("redis://h/m?db=1&connections=4", {"query": {"db": "1", "connections": "4"}}),
        ("redis://h/m?password_file=%2Fa+b%26c", {"query": {"password_file": "/a+b&c"}}),
        ("redis://h/7b/1", {"model": "7b/1"}),
        (
            "redis+unix:///run/r.sock?model=a/b&db=2",
            {"path": "/run/r.sock", "model": "a/b", "host": None},
        ),
        ("redis+cluster://a:1,b:2/m", {"host": "a:1,b:2", "port": None, "model": "m"}),
        ("memory://Store/m", {"scheme": "memory", "host": "Store", "port": None, "model": "m"}),
        ("memory://s/123", {"model": "123"}),
        ("s3://bucket/some/prefix", {"host": "bucket", "model": "some/prefix"}),
        ("s3://bucket", {"host": "bucket", "model": ""}),
        ("https://h/m?X-Amz-Signature=abc", {"model": "m", "query": {}}),
        ("plug-in://place:99/m?x=1", {"scheme": "plug-in", "port": 99, "query": {"x": "1"}}),
        ("/abs/path", {"scheme": "file", "path": "/abs/path", "model": "", "host": None}),
        ("./rel", {"scheme": "file", "path": "./rel"}),
        ("rel/path", {"scheme": "file", "path": "rel/path"}),
        ("with?mark and#hash%20", {"scheme": "file", "path": "with?mark and#hash%20", "query": {}}),
        ("file:///a%20b?threads=4", {"scheme": "file", "path": "/a b", "query": {"threads": "4"}}),
        ("file://localhost/a", {"path": "/a"}),
    ],
)
def test_parts(text: str, parts: dict[str, object]) -> None:
    url = parse_url(text)
    assert {name: getattr(url, name) for name in parts} == parts
    assert url.text == text
    assert pickle.loads(pickle.dumps(url)) == url
    assert parse_url(url) is url


def test_a_path_object_is_a_directory_whatever_its_name() -> None:
    assert parse_url(Path("redis:") / "h").scheme == "file"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("redis://h", "names no model; write redis://h/MODEL"),
        ("redis://h/", "names no model"),
        ("redis://h?db=1", "names no model; write redis://h/MODEL"),
        ("memory://s", "names no model"),
        ("redis:///m", "names no host"),
        ("redis://h/0", "did you mean ?db=0"),
        ("redis://h/12/", "did you mean ?db=12"),
        ("redis://h/a{b}", "brace"),
        ("redis://h/a%7Bb", "brace"),
        ("redis://h/a\nb", "control"),
        ("redis://h/a%00b", "control"),
        ("redis://h/a%7fb", "control"),
        ("redis://h/a//b", "empty part"),
        ("redis://h//a", "empty part"),
        ("redis://h/a/chunks", "names keys"),
        ("redis://h/rdmaload:models", "list of models"),
        ("redis://h/a%", "%25"),
        ("redis://h/a%ff", "UTF-8"),
        ("redis://h/a#b", "%23"),
        ("redis://h:0/m", "port"),
        ("redis://h:65536/m", "port"),
        ("redis://h:x/m", "port"),
        ("redis://h:1:2/m", "brackets"),
        ("redis://::1/m", "brackets"),
        ("redis://[::1/m", "IPv6"),
        ("redis://[::1]x/m", "between"),
        ("redis://h h/m", "space"),
        ("redis://h/m?db", "name=value"),
        ("redis://h/m?db=1&db=2", "twice"),
        ("redis://h/m?", None),
        ("file://host/a", "write file:///path"),
        ("file://", "names no directory"),
        ("redis+unix://h/x?model=m", "names a host"),
        ("redis+unix:///x.sock", "names no model; write redis+unix:///x.sock?model=MODEL"),
        ("valkey+unix:///x/?db=1", "names no model; write valkey+unix:///x/?model=MODEL"),
        ("redis+unix:///x.sock?model=0", "a url is redis+unix:///path/of.sock?model=NAME&db=N"),
        ("3d://x", "no valid scheme"),
        ("redis://u:pa/ss@h/m", "%2F"),
        ("hf://token@org/model", "hf://***@org/model names a user: write hf://ORGANISATION/MODEL[@REVISION]"),
        ("https://h/x?sig=a&b#y", "https://h/x?sig=***&***#*** holds"),
    ],
)
def test_what_is_refused_and_what_it_says(text: str, says: str | None) -> None:
    if says is None:
        parse_url(text)
        return
    with pytest.raises(UrlError) as caught:
        parse_url(text)
    assert says in str(caught.value)


def test_a_server_without_a_model_when_asked_for() -> None:
    assert parse_url("redis://h", require_model=False).model == ""
    with pytest.raises(UrlError, match="db=0"):
        parse_url("redis://h/0", require_model=False)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://u:s3cret@h:1/m?db=1", "redis://u:***@h:1/m?db=1"),
        ("redis://:s3cret@h/m", "redis://:***@h/m"),
        ("redis://h/m?password=s3cret&db=1", "redis://h/m?password=***&db=1"),
        ("redis://h/m?pass%77ord=s3cret", "redis://h/m?pass%77ord=***"),
        (
            "redis://h/m?password_file=/f&password_env=E",
            "redis://h/m?password_file=/f&password_env=E",
        ),
        ("https://u:s3cret@h/m?x=s3cret", "https://u:***@h/m?x=***"),
        ("https://u:s3cret@h/m@1/a:b@c", "https://u:***@h/m@1/a:b@c"),
        ("https://h/m?s3cret", "https://h/m?***"),
        ("hf://gpt2@main", "hf://gpt2@main"),
        ("hf://gpt2@refs/pr/1", "hf://gpt2@refs/pr/1"),
        ("hf://org/model@refs/pr/1?password=s3cret", "hf://org/model@refs/pr/1?password=***"),
        ("file:///models/a:b@c/llama@2", "file:///models/a:b@c/llama@2"),
        ("s3://bucket/llama@2?password=s3cret", "s3://bucket/llama@2?password=***"),
    ],
)
def test_redacted_keeps_all_but_the_secrets(text: str, shown: str) -> None:
    url = parse_url(text)
    assert url.redacted == shown
    assert "s3cret" not in f"{url!r} {url}"


@pytest.mark.parametrize(
    "text",
    [
        "redis://u:s3cret@h",
        "redis://u:s3cret@h:x/m",
        "redis://u:s3c/s3cret@h/m",
        "redis://:s3cret?x@h/m",
        "redis://:s3cret#x@h/m",
        "redis://u:s3cret%@h/m",
        "redis://u:s3cret\n@h/m",
        "redis://u:@s3cret@@h:x/m",
        "redis://u:s3cret@h/0",
        "redis://u:s3cret@h/m?db",
        "redis://h?password=s3cret",
        "redis://h/m?db=1&db=2&password=s3cret",
        "file://u:s3cret@h/m",
        "hf://u:s3cret@org/model",
        "hf://u:s3cret@org/model@main",
        "https://s3cret@h:x/m",
        "s3://u:s3cret@h:x/m@1",
        "HTTPS://h:x/m?sig=s3cret",
        "hf://s3cret@org/gated",
        "hf://s3cret@org/gated@main",
        "https://h/x?sig=s3cret#y",
        "https://h/x?s3cret#s3cret",
        "https://h/x#access_token=s3cret",
        "s3://bucket/m#s3cret",
    ],
)
def test_a_refusal_shows_no_secret(text: str) -> None:
    with pytest.raises(UrlError) as caught:
        parse_url(text)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value)) + str(caught.value.url)


@given(st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), min_size=1))
def test_any_password_is_decoded_and_hidden(password: str) -> None:
    from urllib.parse import quote

    marked = f"<s3cret>{password}"
    url = parse_url(f"redis://u:{quote(marked, safe='')}@h/m")
    assert url.password == marked
    assert url.redacted == "redis://u:***@h/m"


@given(st.text())
def test_arbitrary_text_is_parsed_or_refused_as_a_url_error(text: str) -> None:
    for candidate in (
        text,
        f"redis://{text}",
        f"redis://h/{text}",
        f"x://{text}",
        f"file://{text}",
    ):
        redact(candidate)
        try:
            assert isinstance(parse_url(candidate), Url)
        except UrlError as err:
            str(err).encode(errors="strict") if candidate.isascii() else None


def test_which_option_names_are_secret() -> None:
    assert all(is_secret_option(name) for name in ("password", "api_key", "token", "X-Amz-Signature"))
    assert not any(is_secret_option(name) for name in ("password_file", "password_env", "db", "monkey"))

"""Options: types, the three sources and their conflicts, and where a password comes from."""

from __future__ import annotations

import pickle
from dataclasses import fields
from pathlib import Path

import pytest

from rdmaload.errors import AuthenticationError, UrlError
from rdmaload.options import Options, parse_size
from rdmaload.urls import parse_url

URL = parse_url("redis://h/m")


def resolve(query: str = "", options: Options | None = None, **keywords: object) -> Options:
    return Options.resolve(parse_url(f"redis://h/m{query}"), options, **keywords)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("connections", "4", 4),
        ("bytes_in_flight", "16MiB", 2**24),
        ("bytes_in_flight", "8M", 2**23),
        ("window_bytes", "1GB", 10**9),
        ("window_bytes", "1.5 GiB", 3 * 2**29),
        ("chunk_bytes", "1044480", 1044480),
        ("chunk_bytes", "none", None),
        ("connect_timeout", "2.5", 2.5),
        ("timeout", "none", None),
        ("timeout", "7", 7.0),
        ("verify", "require", "require"),
        ("generation", "0" * 32, "0" * 32),
        ("manifest_sha256", "a" * 64, "a" * 64),
        ("protocol", "3", 3),
        ("db", "15", 15),
        ("username", "none", "none"),
        ("password", "none", "none"),
    ],
)
def test_text_and_values_give_the_same(name: str, text: str, value: object) -> None:
    assert getattr(resolve(**{name: text}), name) == value
    assert getattr(resolve(**{name: value}), name) == value
    assert getattr(resolve(f"?{name}={text.replace(' ', '%20')}"), name) == value
    assert getattr(resolve(f"?{name}={text.replace(' ', '%20')}", **{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("connections", 0),
        ("connections", True),
        ("connections", 2.0),
        ("connections", "2.0"),
        ("connections", "٣"),
        ("connections", "9" * 5000),
        ("threads", None),
        ("bytes_in_flight", "16 Mx"),
        ("bytes_in_flight", "-1"),
        ("bytes_in_flight", 0),
        ("bytes_in_flight", 2**63),
        ("connect_timeout", "nan"),
        ("connect_timeout", "inf"),
        ("connect_timeout", 0),
        ("connect_timeout", True),
        ("connect_timeout", "soon"),
        ("verify", "yes"),
        ("verify", True),
        ("protocol", 4),
        ("protocol", True),
        ("generation", "A" * 32),
        ("generation", "0" * 31),
        ("generation", "0" * 32 + "\n"),
        ("db", -1),
        ("username", ""),
        ("password", 5),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UrlError, match=f"option {name} must be"):
        resolve(**{name: value})
    with pytest.raises(UrlError, match=f"option {name} must be"):
        Options(**{name: value})  # type: ignore[arg-type]


def test_a_wrong_value_in_the_url_says_so() -> None:
    with pytest.raises(UrlError, match=r"option db in redis://h/m\?db=x must be a whole number"):
        resolve("?db=x")


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UrlError, match="unknown option conections: did you mean connections"):
        resolve(conections=2)
    with pytest.raises(UrlError, match=r"unknown option verfy in .*did you mean verify"):
        resolve("?verfy=off")
    with pytest.raises(UrlError, match="there are addressing_style, bytes_in_flight, "):
        resolve(zzz=1)


def test_names_that_a_connector_reads_itself_pass() -> None:
    url = parse_url("plug://h/m?region=eu&connections=3")
    assert Options.resolve(url, also={"region"}).connections == 3


def test_keywords_go_before_options_and_must_agree_with_the_url() -> None:
    assert resolve(options=Options(connections=5), connections=6).connections == 6
    assert resolve(options=Options(connections=5)).connections == 5
    assert resolve("?connections=5", Options(connections=5)).connections == 5
    assert resolve("?connections=5", Options(threads=3)).connections == 5
    for options, keywords in (
        (Options(connections=4), {}),
        (None, {"connections": 4}),
        (None, {"connections": 2}),
    ):
        with pytest.raises(UrlError, match=r"connections is given in the url .* \(5 and \d\)"):
            resolve("?connections=5", options, **keywords)


def test_resolving_again_changes_nothing() -> None:
    url = parse_url("redis://u:p@h/m?connections=5")
    options = Options.resolve(url)
    assert Options.resolve(url, options) == options


def test_user_and_password_of_the_url_are_options() -> None:
    options = Options.resolve(parse_url("redis://u:p%40@h/m"))
    assert (options.username, options.password) == ("u", "p@")
    with pytest.raises(UrlError, match=r"username .*'u' and 'v'"):
        Options.resolve(parse_url("redis://u@h/m"), username="v")


@pytest.mark.parametrize(
    ("url", "keywords"),
    [
        ("redis://:s3cret1@h/m", {"password": "s3cret2"}),
        ("redis://:s3cret1@h/m?password=s3cret2", {}),
        ("redis://h/m?password=s3cret1", {"password": "s3cret2"}),
        ("redis://:s3cret1@h/m", {"password_file": "/f"}),
        ("redis://h/m", {"password": ["s3cret1"]}),
        ("redis://h/m", {"password": "s3cret1", "password_env": "E"}),
    ],
)
def test_a_conflict_of_passwords_shows_none(url: str, keywords: dict[str, object]) -> None:
    with pytest.raises(UrlError, match="password") as caught:
        Options.resolve(parse_url(url), **keywords)
    assert "s3cret" not in str(caught.value)


def test_the_password_is_in_no_repr() -> None:
    assert "s3cret" not in repr(Options(password="s3cret"))
    assert pickle.loads(pickle.dumps(Options(password="s3cret"))).password == "s3cret"


def test_password_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    for content, password in (
        (b"p\n", "p"),
        (b"p\r\n", "p"),
        (b" p ", " p "),
        ("pä\n\n".encode(), "pä\n"),
    ):
        path.write_bytes(content)
        assert Options(password_file=str(path)).read_password() == password
        assert resolve(password_file=path).read_password() == password
    for content in (b"", b"\n", b"\xff", b"x" * 70_000):
        path.write_bytes(content)
        with pytest.raises(AuthenticationError, match="password_file="):
            Options(password_file=str(path)).read_password(url="redis://h/m")
    with pytest.raises(AuthenticationError, match=r"for redis://h/m cannot be read: No such file"):
        Options(password_file=str(tmp_path / "none")).read_password(url="redis://h/m")


def test_password_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_PASSWORD", "p")
    options = resolve("?password_env=STORE_PASSWORD")
    assert options.password is None
    assert options.read_password() == "p"
    monkeypatch.delenv("STORE_PASSWORD")
    with pytest.raises(AuthenticationError, match="password_env=STORE_PASSWORD"):
        options.read_password()
    assert Options().read_password() is None


def test_sizes() -> None:
    assert [parse_size(text) for text in ("0", "1", "1k", "1KB", "1kib", "2TiB")] == [
        0, 1, 1024, 1000, 1024, 2**41,
    ]  # fmt: skip
    for text in ("", "MiB", "1e3", "1 2", "-1", "1PiB", "0x10", "\u0661"):
        with pytest.raises(ValueError, match="is no size"):
            parse_size(text)


def test_every_option_has_its_meaning_written_down() -> None:
    import inspect

    source = inspect.getsource(Options)
    for option in fields(Options):
        declaration = source.index(f"    {option.name}: ")
        assert source[source.index("\n", declaration) + 1 :].startswith('    """'), option.name

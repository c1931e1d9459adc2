"""Every setting with its name, type and default; from a url, keywords or an `Options`.

One name serves all three. Values are checked when they are put together, so that a wrong one is
refused before anything is opened. Nothing here is global, and the environment is read only for
`password_env`.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from rdmaload.errors import AuthenticationError, UrlError
from rdmaload.urls import Url, holds_user, is_secret_option

__all__ = ["Options", "parse_size", "takes_none"]

_Value = TypeVar("_Value")

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", re.ASCII)
_MAX_PASSWORD_BYTES = 65536  # more is not a password: the name of another file was given


class _Wrong(Exception):
    """What a value should have been."""


def parse_size(text: str) -> int:
    """Bytes from text: "1048576", "16MiB", "16M" (both 2**20), "16MB" (10**6).

    >>> parse_size("16MiB")
    16777216
    """
    matched = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(matched.group(2).lower()) if matched else None
    if matched is None or unit is None:
        raise ValueError(
            f"{text[:40]!r} is no size; write bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB"
        )
    number = matched.group(1)
    return int(number) * unit if "." not in number else round(float(number) * unit)


def _whole(low: int, high: int = 2**31 - 1) -> Callable[[object], int]:
    def convert(value: object) -> int:
        if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise _Wrong(f"a whole number from {low} to {high}")
        return value

    return convert


def _size(low: int = 1) -> Callable[[object], int]:
    def convert(value: object) -> int:
        if isinstance(value, str):
            try:
                value = parse_size(value)
            except ValueError:
                value = None
        if type(value) is not int or not low <= value < 2**63:
            raise _Wrong(f"bytes, at least {low}, such as 1048576 or 16MiB")
        return value

    return convert


def _seconds(value: object) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise _Wrong("seconds above 0")
    return float(value)


def _one_of(*choices: _Value) -> Callable[[object], _Value]:
    def convert(value: object) -> _Value:
        for choice in choices:
            if value == str(choice) or (type(value) is type(choice) and value == choice):
                return choice
        raise _Wrong("one of " + ", ".join(str(choice) for choice in choices))

    return convert


def _flag(value: object) -> bool:
    if value in ("true", "false"):
        return value == "true"
    if not isinstance(value, bool):
        raise _Wrong("true or false")
    return value


def _text(value: object) -> str:
    # A path is welcome where a name of a file is.
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value:
        raise _Wrong("a text that is not empty")
    return value


_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e\x80-\xff]*)")


def _endpoint(value: object) -> str:
    if holds_user(value):
        raise _Wrong("a url without a user and without a query: credentials go into username= and password_env=")
    return _text(value)


def _headers(value: object) -> str:
    """Request headers as lines; a mapping is taken as well."""
    if isinstance(value, Mapping):
        value = "\n".join(f"{name}: {text}" for name, text in value.items())
    if not isinstance(value, str) or not value:
        raise _Wrong('lines of the form "Name: value", or a mapping')
    lines = [line for line in value.split("\n") if line]
    if not lines or not all(_HEADER.fullmatch(line) for line in lines):
        raise _Wrong('lines of the form "Name: value", or a mapping')
    return "\n".join(lines)


def _json_object(value: object) -> str:
    """A JSON object as text; a mapping is taken as well."""
    wrong = _Wrong("a JSON object, or a mapping of what JSON can hold")
    try:
        parsed = json.loads(value) if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else None
        if not isinstance(parsed, dict):
            raise wrong
        return json.dumps(parsed)
    except (ValueError, TypeError):
        raise wrong from None


def _hex(digits: int) -> Callable[[object], str]:
    def convert(value: object) -> str:
        if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
            raise _Wrong(f"{digits} lower-case hexadecimal digits")
        return value

    return convert


def _option(convert: Callable[[object], object], default: Any, *, secret: bool = False) -> Any:
    return field(default=default, repr=not secret, metadata={"convert": convert, "optional": default is None})


@dataclass(frozen=True)
class Options:
    """Settings of one connector and of the loads and saves through it.

    >>> Options(connections=4, window_bytes=2**30).connections
    4
    """

    connections: int | None = _option(_whole(1, 1024), None)
    """Connections to the store that one load holds; None = 1 to a server on this machine, else 4 (16 to s3://)."""
    bytes_in_flight: int | None = _option(_size(), None)
    """Bytes asked for and not yet received, over all connections; None = 2 MiB on this machine, else 16 MiB."""
    connect_timeout: float = _option(_seconds, 10.0)
    """Seconds for an attempt to connect, and for all of them until one succeeds."""
    inactivity_timeout: float = _option(_seconds, 30.0)
    """Seconds without a byte after which a connection counts as failed."""
    retry_timeout: float = _option(_seconds, 60.0)
    """Seconds without progress for which failed requests are tried again."""
    timeout: float | None = _option(_seconds, None)
    """Seconds for a whole load or save; None = no limit."""
    verify: Literal["auto", "require", "off"] = _option(_one_of("auto", "require", "off"), "auto")
    """"auto" checks what has a checksum, "require" refuses what has none, "off" checks nothing."""
    generation: str | None = _option(_hex(32), None)
    """The generation that must be read; None = the one that is published."""
    manifest_sha256: str | None = _option(_hex(64), None)
    """SHA-256 that the manifest must have, against attackers; None = any."""
    max_host_bytes: int | None = _option(_size(), None)
    """Host memory that a load may use; None = what the control group allows."""
    window_bytes: int = _option(_size(), 512 * 2**20)
    """Bytes that an iterator reads ahead of what was yielded."""
    staging_bytes: int = _option(_size(), 64 * 2**20)
    """Page-locked host memory between the source and a GPU; two reads at least."""
    device_extra_bytes: int = _option(_size(), 256 * 2**20)
    """GPU memory for tensors that are converted or rearranged on their way to where they belong."""
    verify_device: Literal["on", "off"] = _option(_one_of("on", "off"), "off")
    """"on" computes checksums again in GPU memory, so that the way there is verified too."""
    gds: Literal["auto", "off"] = _option(_one_of("auto", "off"), "auto")
    """"auto" reads cold local files into GPU memory by GPUDirect Storage where that is direct; "off" never does."""
    gpudirect: Literal["auto", "off"] = _option(_one_of("auto", "off"), "auto")
    """"auto" has RDMA cards write into GPU memory where card and GPU can; "off" goes through page-locked memory."""
    username: str | None = _option(_text, None)
    """User at the store; None = its default user."""
    password: str | None = _option(_text, None, secret=True)
    """Password at the store. Better: `password_file` or `password_env`."""
    password_file: str | None = _option(_text, None)
    """File that holds the password; a final line break is not part of it."""
    password_env: str | None = _option(_text, None)
    """Environment variable that holds the password."""
    db: int = _option(_whole(0), 0)
    """Redis database number."""
    protocol: int = _option(_one_of(2, 3), 2)
    """RESP version to speak."""
    tcp_port: int | None = _option(_whole(1, 65535), None)
    """TCP port of the server of an rdma:// url; None = the url's port."""
    fallback: Literal["auto", "never"] = _option(_one_of("auto", "never"), "auto")
    """What rdma:// does where RDMA does not work: "auto" reads over TCP and says why, "never" is an error."""
    chunk_bytes: int | None = _option(_size(), None)
    """Bytes per chunk of a save; None = the format's default, or what the store takes."""
    threads: int = _option(_whole(1, 1024), 2)
    """Threads that read local files, or a store without a native transport; 4 for s3:// unless given."""
    file_io: Literal["auto", "buffered", "direct"] = _option(_one_of("auto", "buffered", "direct"), "auto")
    """Local files through the page cache ("buffered"), past it ("direct", where possible), or what is faster."""
    max_integrity_attempts: int = _option(_whole(1, 100), 3)
    """How often a chunk is read in all before a wrong checksum is an error."""
    ca_file: str | None = _option(_text, None)
    """PEM file of the authorities that a TLS server is trusted by; None = the system's."""
    ca_dir: str | None = _option(_text, None)
    """Directory of authorities under their hashed names (`openssl rehash`), instead or as well."""
    client_cert_file: str | None = _option(_text, None)
    """PEM file of the certificate, with its chain, that we show to a TLS server."""
    client_key_file: str | None = _option(_text, None)
    """PEM file of its key, not encrypted; None = it is in `client_cert_file`."""
    server_name: str | None = _option(_text, None)
    """Name that a TLS server is asked for (SNI) and must have in its certificate; None = the url's host."""
    endpoint_url: str | None = _option(_endpoint, None)
    """Where an object store is, such as http://127.0.0.1:9000; None = what boto3 finds."""
    region: str | None = _option(_text, None)
    """Region of a bucket; None = what boto3 finds, or where the bucket says that it is."""
    profile: str | None = _option(_text, None)
    """Profile of the AWS configuration files; None = what boto3 finds."""
    unsigned: bool = _option(_flag, False)
    """True asks an object store without credentials, for public buckets."""
    addressing_style: Literal["auto", "path", "virtual"] = _option(_one_of("auto", "path", "virtual"), "auto")
    """Whether a bucket's name is part of the path or of the host; "auto" is what boto3 chooses."""
    stall_timeout: float = _option(_seconds, 2.0)
    """Seconds without a byte after which the rest of a range is asked for on another http connection."""
    headers: str | None = _option(_headers, None, secret=True)
    """Headers of every request to an http server, one "Name: value" per line (a mapping in Python)."""
    listing: str | None = _option(_text, None)
    """File beside the model, or url, that lists the model's files on an http server; None = what the server lists."""
    revision: str | None = _option(_text, None)
    """Branch, tag or commit of an hf:// model; None = main."""
    storage_options: str | None = _option(_json_object, None, secret=True)
    """JSON object (a mapping in Python) of what obstore, for gs:// and az://, or fsspec takes beside the url."""
    verify_tls: bool = _option(_flag, True)
    """True verifies the certificate of a TLS server; False accepts any, and is logged."""
    cache_dir: str | None = _option(_text, None)
    """Directory on this machine's disk that keeps what was read, for every process; None = nothing is kept."""
    cache_bytes: int | None = _option(_size(), None)
    """Bytes of all files in `cache_dir` together; None = what leaves a tenth of its file system free."""

    def __post_init__(self) -> None:
        for option in fields(self):
            value = _converted(option.name, getattr(self, option.name), "")
            object.__setattr__(self, option.name, value)

    @classmethod
    def resolve(
        cls,
        url: Url,
        options: Options | None = None,
        *,
        also: Collection[str] = (),
        defaults: Mapping[str, object] = MappingProxyType({}),
        **keywords: object,
    ) -> Options:
        """The options that `url`, `options` and `keywords` give together.

        Keywords replace what `options` says. The url must agree with both: a name with two
        different values is a UrlError, and so is an unknown name (with the nearest known one) or a
        value of the wrong type. `also` are names of the query that the connector reads by itself,
        `defaults` what holds where nobody says anything. A
        user and a password in the url are options too.
        """
        where = f" in {url.redacted}"
        from_url = {name: _converted(name, value, where) for name, value in url.query.items() if name not in also}
        for name, value in (("username", url.user), ("password", url.password)):
            if value:
                if from_url.get(name, value) != value:
                    raise _conflict(name, value, from_url[name], url)
                from_url[name] = value
        given = {name: _converted(name, value, "") for name, value in keywords.items()}
        if options is not None:
            for option in fields(cls):
                value = getattr(options, option.name)
                if value != option.default:
                    given.setdefault(option.name, value)
        for name, value in from_url.items():
            if name in given and given[name] != value:
                raise _conflict(name, value, given[name], url)
        merged = replace(cls(), **{**defaults, **from_url, **given})
        sources = [name for name in ("password", "password_file", "password_env") if getattr(merged, name)]
        if len(sources) > 1:
            raise UrlError(f"{' and '.join(sources)} are given for {url.redacted}; keep one", url=url.redacted)
        return merged

    def read_password(self, *, url: str | None = None) -> str | None:
        """The password from wherever the options say it is; None when they say nothing.

        Raises AuthenticationError when the file or the environment variable cannot be used.
        """
        place = f" for {url}" if url else ""
        if self.password_env is not None:
            value = os.environ.get(self.password_env)
            if not value:
                raise AuthenticationError(
                    f"password_env={self.password_env}{place}: the environment has no such variable, or it is empty",
                    url=url,
                )
            return value
        if self.password_file is None:
            return self.password
        try:
            with Path(self.password_file).open("rb") as file:
                content = file.read(_MAX_PASSWORD_BYTES + 1)
        except OSError as err:
            raise AuthenticationError(
                f"password_file={self.password_file}{place} cannot be read: {err.strerror}", url=url
            ) from err
        problem = "holds more than a password"
        if len(content) <= _MAX_PASSWORD_BYTES:
            try:
                text = content.decode()
            except UnicodeDecodeError:
                problem = "is not UTF-8 text"
            else:
                text = text.removesuffix("\n").removesuffix("\r")
                if text:
                    return text
                problem = "is empty"
        raise AuthenticationError(f"password_file={self.password_file}{place} {problem}", url=url)


_FIELDS = {option.name: option for option in fields(Options)}


def _converted(name: str, value: object, where: str) -> Any:
    option = _FIELDS.get(name)
    if option is None:
        near = difflib.get_close_matches(name, _FIELDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(_FIELDS))}"
        raise UrlError(f"unknown option {name}{where}: {hint}")
    convert = option.metadata["convert"]
    if (value is None and option.metadata["optional"]) or (value == "none" and takes_none(name)):
        return None
    try:
        return convert(value)
    except _Wrong as err:
        shown = "" if is_secret_option(name) or holds_user(value) else f", not {str(value)[:80]!r}"
        raise UrlError(f"option {name}{where} must be {err}{shown}") from None


def takes_none(name: str) -> bool:
    """Whether "none" is a way to write None in a url: not where it may be a name or a password."""
    metadata = _FIELDS[name].metadata
    return bool(metadata["optional"]) and metadata["convert"] is not _text


def _conflict(name: str, in_url: object, elsewhere: object, url: Url) -> UrlError:
    hidden = is_secret_option(name) or holds_user(in_url) or holds_user(elsewhere)
    shown = "" if hidden else f" ({in_url!r} and {elsewhere!r})"
    return UrlError(
        f"{name} is given in the url {url.redacted} and beside it with different values{shown}; keep one",
        url=url.redacted,
    )

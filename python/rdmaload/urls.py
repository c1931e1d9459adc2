"""Urls: text to parts, with the secrets kept apart.

Only the text is looked at: nothing is resolved, opened or read. `Url.redacted` is the form for
messages; `Url` shows nothing else of itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import NoReturn
from urllib.parse import quote, unquote

from rdmaload.errors import UrlError

__all__ = ["SECRET_TEXT", "Url", "holds_user", "is_secret_option", "parse_url", "redact", "with_option"]

SECRET_TEXT = "***"
"""What stands for a secret in everything that we show."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SECRET_NAME = re.compile(
    r"pass|secret|token|credential|signature|^headers$|^storage_options$|(^|[_-])(key|sig|auth)($|[_-])", re.IGNORECASE
)
_NAMES_OF_SECRETS = ("password_file", "password_env", "client_key_file")

_DEFAULT_PORTS = {"redis": 6379, "rediss": 6379, "valkey": 6379, "valkeys": 6379, "rdma": 6379}
_REDIS_SCHEMES = frozenset(_DEFAULT_PORTS) | {
    f"{family}+{kind}" for family in ("redis", "valkey") for kind in ("unix", "cluster", "sentinel")
}
# A bucket or a host alone is a model there; in a key-value store the name is the prefix of every
# key.
_OBJECT_SCHEMES = frozenset({"s3", "gs", "az", "hf", "http", "https"})
_OPTIONLESS_SCHEMES = frozenset({"http", "https"})  # their query belongs to the server, and may be signed

# Keys of a model "a" are "a/manifest", "a/chunks/..." and so on: a model "a/chunks" would live
# among them.
_RESERVED_SEGMENTS = frozenset({"manifest", "chunks", "saving", "superseded"})


@dataclass(frozen=True, repr=False)
class Url:
    """The parts of a url. Printing one shows no secret.

    >>> parse_url("redis://:s3cret@10.0.0.5/llama-3-8b?db=1")
    Url('redis://:***@10.0.0.5/llama-3-8b?db=1')
    """

    scheme: str
    """Lower-case; "file" for a local directory, however it was written."""
    redacted: str
    """Safe to show: the user stays, the password and secret query values are replaced by "***"."""
    text: str
    """As it was given, secrets included."""
    host: str | None = None
    """Without the brackets of an IPv6 address; the store's name for `memory://`, the bucket for `s3://`."""
    port: int | None = None
    user: str | None = None
    password: str | None = None
    model: str = ""
    """The model's name, or the prefix in an object store; "" for local directories."""
    path: str = ""
    """The local directory (`file`), or the socket of a `+unix` scheme."""
    query: dict[str, str] = field(default_factory=dict, hash=False)
    """Options by name, percent-decoded; empty for http and https: theirs is the server's."""

    def __repr__(self) -> str:
        return f"Url({self.redacted!r})"

    __str__ = __repr__


def holds_user(value: object) -> bool:
    """Whether a value is a url with a user or a query in it, which may be secrets whatever the option is called."""
    _, found, rest = str(value).partition("://")
    return bool(found) and ("@" in rest or "?" in rest)


def is_secret_option(name: str) -> bool:
    """Whether an option of this name holds a secret, rather than says where one is."""
    return name not in _NAMES_OF_SECRETS and _SECRET_NAME.search(name) is not None


def redact(text: str) -> str:
    """`text` with whatever may be a secret replaced, for a url that could not be parsed."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        return text
    scheme = scheme.lower()
    before, at, after = rest.rpartition("@")
    if scheme == "hf":
        head, question, query = rest.partition("?")
        if _hf_names_user(head):
            rest = f"{SECRET_TEXT}@{head.partition('@')[2]}{question}{query}"
    elif at and not (scheme == "file" and rest.startswith("/")):  # whose names may hold an "@"
        user, colon, _ = before.partition(":")
        rest = f"{user}:{SECRET_TEXT}@{after}" if colon else f"{SECRET_TEXT}@{after}"
    if scheme != "file":  # where nothing is secret
        rest, hash_sign, _ = rest.partition("#")
        fragment = f"#{SECRET_TEXT}" if hash_sign else ""
    else:
        fragment = ""
    head, question, query = rest.partition("?")
    shown = _redact_query(query, everything=scheme in _OPTIONLESS_SCHEMES)
    return f"{text.partition('://')[0]}://{head}{question}{shown}{fragment}"


def _hf_names_user(head: str) -> bool:
    """Whether something like a user, which may be a token, stands before a hub's organisation."""
    before, at, after = head.partition("@")
    is_revision = "/" not in after or after.startswith("refs/")
    return ":" in before or (bool(at) and "/" not in before and not is_revision)


def parse_url(url: str | PathLike[str] | Url, *, require_model: bool = True) -> Url:
    """The parts of `url`; a path without a scheme is a local directory, taken literally.

    `require_model=False` also takes a server without a model, for listing. Raises UrlError, which
    says what to write.
    """
    if isinstance(url, Url):
        return url
    text = fspath(url)
    if not isinstance(text, str):
        raise UrlError("a url is text, not bytes")
    matched = _SCHEME.match(text) if isinstance(url, str) else None
    if _CONTROL.search(text):
        _refuse(
            _CONTROL.sub("?", text),
            "holds a control character; percent-encode it, or find out where it came from",
        )
    if matched is None:
        if not text:
            raise UrlError("the url is empty")
        if "://" in text:
            _refuse(text, "has no valid scheme; a local directory is written ./name or file:///path")
        return Url(scheme="file", redacted=text, text=text, path=text)
    scheme = matched.group(1).lower()
    rest, hash_sign, _ = text[matched.end() :].partition("#")
    if hash_sign:
        _refuse(text, 'holds a "#"; write it %23')
    head, question, query_text = rest.partition("?")
    authority, slash, path_text = head.partition("/")
    query = {} if scheme in _OPTIONLESS_SCHEMES else _parse_query(text, query_text)
    if scheme == "file":
        return _file_url(text, authority, slash + path_text, query)
    if scheme == "s3" and head.startswith("arn:"):
        return _arn_url(text, matched.group(0).lower(), head, query_text, query)
    if scheme == "hf":
        return _hf_url(text, matched.group(0).lower(), head, query_text, query)

    userinfo, at, address = authority.rpartition("@")
    user_text, colon, password_text = userinfo.partition(":")
    user = _decode(text, user_text) if user_text else None
    password = _decode(text, password_text) if colon else None
    # The password is known from here on: show everything else as it was written.
    shown = f"{scheme}://{user_text}{':' + SECRET_TEXT if colon else ''}{at}{address}{slash}{path_text}"
    if question:
        shown += "?" + _redact_query(query_text, everything=scheme in _OPTIONLESS_SCHEMES)
    if scheme in _REDIS_SCHEMES and "@" in path_text:
        _refuse(text, 'has an "@" after a "/": percent-encode the password ("/" is %2F, "@" is %40)')

    path = ""
    if scheme.endswith("+unix"):
        if address:
            _refuse(text, f"names a host; write {scheme}:///path/of.sock?model=NAME")
        path, model = _decode(text, slash + path_text), query.pop("model", "")
        if path in ("", "/"):
            _refuse(text, f"names no socket; write {scheme}:///path/of.sock?model=NAME")
        host, port = None, None
    else:
        host, port = _parse_address(scheme, text, address)
        model = _decode(text, path_text)
    model = model.removesuffix("/")
    if scheme not in _OBJECT_SCHEMES and (model or require_model):
        _check_model(text, shown, scheme, model)
    return Url(
        scheme=scheme,
        redacted=shown,
        text=text,
        host=host,
        port=port,
        user=user,
        password=password,
        model=model,
        path=path,
        query=query,
    )


def _file_url(text: str, authority: str, path_text: str, query: dict[str, str]) -> Url:
    if authority not in ("", "localhost"):
        _refuse(text, "names a host; write file:///path, or ./path without the file://")
    path = _decode(text, path_text)
    if not path:
        _refuse(text, "names no directory; write file:///path")
    return Url(scheme="file", redacted=redact(text), text=text, path=path, query=query)


def _arn_url(text: str, start: str, head: str, query_text: str, query: dict[str, str]) -> Url:
    """An access point by its ARN, which has colons and a slash of its own, in the bucket's place."""
    bucket, _, prefix = head.partition("/")
    if bucket.endswith(":accesspoint"):
        name, _, prefix = prefix.partition("/")
        bucket += f"/{name}"
    shown = start + head + ("?" + _redact_query(query_text, everything=False) if query_text else "")
    model = _decode(text, prefix).removesuffix("/")
    return Url(scheme="s3", redacted=shown, text=text, host=_decode(text, bucket), model=model, query=query)


def _hf_url(text: str, start: str, head: str, query_text: str, query: dict[str, str]) -> Url:
    """A repository has neither host nor user: what follows "@" is a revision, slashes included."""
    if _hf_names_user(head):
        _refuse(
            text,
            "names a user: write hf://ORGANISATION/MODEL[@REVISION], a revision with a slash by ?revision=, and give a "
            "token by password_env=NAME or HF_TOKEN",
        )
    repository, at, revision = (_decode(text, part) for part in head.partition("@"))
    shown = start + head + ("?" + _redact_query(query_text, everything=False) if query_text else "")
    segments = repository.removesuffix("/").split("/")
    if not segments[0] or any(part in ("", ".", "..") for part in segments):
        raise UrlError(f"{shown} names no model; write hf://ORGANISATION/MODEL or hf://ORGANISATION/MODEL@REVISION")
    if at:
        if not revision:
            raise UrlError(f'{shown} has no revision after the "@"', url=shown)
        if query.setdefault("revision", revision) != revision:
            raise UrlError(f"{shown} names two revisions; keep one", url=shown)
    return Url(scheme="hf", redacted=shown, text=text, model="/".join(segments), query=query)


def _parse_address(scheme: str, text: str, address: str) -> tuple[str | None, int | None]:
    if scheme.endswith(("+cluster", "+sentinel")):
        return address or None, None  # a list of addresses
    host, port_text = address, ""
    if address.startswith("["):
        host, bracket, port_text = address[1:].partition("]")
        if not bracket or not re.fullmatch(r"[0-9A-Fa-f:.]+(%25[A-Za-z0-9_.-]+|%[A-Za-z0-9_.-]+)?", host, re.ASCII):
            _refuse(text, "has an IPv6 address that is not of the form [::1]")
        host = host.replace("%25", "%")
        if port_text and not port_text.startswith(":"):
            _refuse(text, 'has something between "]" and the port')
        port_text = port_text.removeprefix(":")
    elif ":" in address:
        host, _, port_text = address.partition(":")
        host = _decode(text, host)
        if ":" in port_text:
            _refuse(text, "has more than one port; an IPv6 address is written in brackets, [::1]:6379")
    else:
        host = _decode(text, host)
    if scheme in _REDIS_SCHEMES and not host:
        _refuse(text, f"names no host; write {scheme}://host:6379/model")
    if any(character.isspace() for character in host):
        _refuse(text, "has a space in its host")
    if not port_text:
        return host or None, _DEFAULT_PORTS.get(scheme)
    if not re.fullmatch("[0-9]{1,5}", port_text) or not 1 <= int(port_text) <= 65535:
        _refuse(text, "has a port that is not a number from 1 to 65535")
    return host or None, int(port_text)


def _check_model(text: str, shown: str, scheme: str, model: str) -> None:
    if not model:
        place = shown.partition("?")[0]
        # A path of a socket has no end that would tell it from a model's name.
        written = f"{place}?model=MODEL" if scheme.endswith("+unix") else f"{place.rstrip('/')}/MODEL"
        raise UrlError(f"{shown} names no model; write {written}", url=shown)
    segments = model.split("/")
    if scheme in _REDIS_SCHEMES and re.fullmatch("[0-9]+", model):
        form = (
            f"{scheme}:///path/of.sock?model=NAME&db=N" if scheme.endswith("+unix") else f"{scheme}://host/model?db=N"
        )
        raise UrlError(
            f"{shown}: {model} is no name of a model; did you mean ?db={model} (a url is {form})",
            url=shown,
        )
    problem = None
    if "{" in model or "}" in model:
        problem = "holds a brace, which Redis Cluster would take for a hash tag"
    elif "" in segments:
        problem = "has an empty part between two slashes"
    elif model.startswith("rdmaload:"):
        problem = 'starts with "rdmaload:", where we keep the list of models'
    elif not _RESERVED_SEGMENTS.isdisjoint(segments[1:]):
        problem = f"has a part that names keys of a model ({', '.join(sorted(_RESERVED_SEGMENTS))})"
    if problem is not None:
        raise UrlError(f"{shown}: the model's name {problem}; choose another", url=shown)


def _parse_query(text: str, query_text: str) -> dict[str, str]:
    query: dict[str, str] = {}
    for item in query_text.split("&") if query_text else ():
        name_text, equals, value_text = item.partition("=")
        name = _decode(text, name_text)
        if not equals or not name:
            _refuse(text, "has a query that is not name=value&name=value")
        if name in query:
            _refuse(text, f"gives {name} twice")
        query[name] = _decode(text, value_text)
    return query


def _redact_query(query_text: str, *, everything: bool) -> str:
    items = []
    for item in query_text.split("&"):
        name, equals, value = item.partition("=")
        secret = everything or is_secret_option(unquote(name)) or holds_user(unquote(value))
        shown = f"{name}={SECRET_TEXT}" if equals else SECRET_TEXT if everything and item else item
        items.append(shown if secret else item)
    return "&".join(items)


def _decode(text: str, part: str) -> str:
    if _ESCAPE.search(part):
        _refuse(text, 'has a "%" that starts no escape; write it %25')
    try:
        decoded = unquote(part, errors="strict")
    except UnicodeDecodeError:
        _refuse(text, "has percent-encoded bytes that are not UTF-8")
    if _CONTROL.search(decoded):
        _refuse(text, "holds a percent-encoded control character")
    try:
        decoded.encode()
    except UnicodeEncodeError:
        _refuse(text, "is not Unicode text")
    return decoded


def _refuse(text: str, problem: str) -> NoReturn:
    # Half of a surrogate pair, which no terminal or log can print, is shown as an escape.
    shown = redact(text).encode(errors="backslashreplace").decode()
    raise UrlError(f"{shown} {problem}", url=shown)


def with_option(url: Url, name: str, value: str) -> str:
    """The text of `url` with an option added to its query; secrets included, for a program and not for a log.

    >>> with_option(parse_url("redis://10.0.0.5/llama?db=1"), "generation", "0f")
    'redis://10.0.0.5/llama?db=1&generation=0f'

    Raises UrlError when the url has that option already, or can have none.
    """
    if url.scheme in _OPTIONLESS_SCHEMES or "://" not in url.text:
        _refuse(url.text, f"takes no options: give {name} beside it")
    if name in url.query:
        _refuse(url.text, f"has {name} already")
    return f"{url.text}{'&' if '?' in url.text else '?'}{quote(name)}={quote(value)}"

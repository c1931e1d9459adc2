"""Which names of models are urls of ours, and how they are written for an engine and for people.

Engines have ways of their own for some schemes (`s3://`, `https://` ...) and look for these in many places. Such a
url is ours only when the user asks for our loader; from then on it is written `rdmaload+s3://...`, which no engine
takes for its own.
"""

from __future__ import annotations

import re

from rdmaload.connectors.registry import known_schemes
from rdmaload.urls import parse_url

__all__ = ["engine_name", "is_ours", "is_url", "shown_name", "store_url"]

_PREFIX = "rdmaload+"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://", re.ASCII)
_ENGINES_OWN = frozenset({"s3", "gs", "az", "http", "https", "hf"})


def is_url(name: object) -> bool:
    """Whether a model's name is a url of any kind, ours or not."""
    return isinstance(name, str) and _SCHEME.match(name) is not None


def is_ours(name: object) -> bool:
    """Whether a model's name is a url that rdmaload loads without being asked for.

    >>> is_ours("redis://10.0.0.5/llama"), is_ours("rdmaload+s3://bucket/llama"), is_ours("s3://bucket/llama")
    (True, True, False)
    """
    matched = _SCHEME.match(name) if isinstance(name, str) else None
    if matched is None:
        return False
    scheme = matched.group(1).lower()
    if scheme.startswith(_PREFIX):
        return scheme.removeprefix(_PREFIX) in known_schemes()
    return scheme not in _ENGINES_OWN and scheme in known_schemes()


def store_url(name: str) -> str:
    """The url that `open` takes, of a name that may be written for an engine.

    >>> store_url("rdmaload+s3://bucket/llama")
    's3://bucket/llama'
    """
    return name[len(_PREFIX) :] if name[: len(_PREFIX)].lower() == _PREFIX else name


def engine_name(url: str) -> str:
    """A url as an engine must see it to leave it to us.

    >>> engine_name("s3://bucket/llama"), engine_name("redis://10.0.0.5/llama")
    ('rdmaload+s3://bucket/llama', 'redis://10.0.0.5/llama')
    """
    matched = _SCHEME.match(url)
    return _PREFIX + url if matched and matched.group(1).lower() in _ENGINES_OWN else url


def shown_name(name: str) -> str:
    """What clients of an engine call the model: the url without user, password and options.

    >>> shown_name("redis://me:secret@10.0.0.5:6379/llama?db=1")
    'redis://10.0.0.5:6379/llama'
    """
    url = parse_url(store_url(name))
    if url.scheme == "file":
        return url.path
    text = url.redacted.partition("?")[0]
    scheme, _, rest = text.partition("://")
    authority, slash, path = rest.partition("/")
    text = f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}".rstrip("/")
    return f"{text}?model={url.model}" if scheme.endswith("+unix") else text

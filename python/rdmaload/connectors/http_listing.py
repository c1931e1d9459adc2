"""What servers write when they are asked for a directory, and files that list files: to names and sizes. No I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlsplit

from rdmaload.errors import FormatError

__all__ = ["Listing", "listed_directory", "listed_files", "weight_index_files"]

Listing = Mapping[str, int | None]
"""Size in bytes by name, None where the list does not say; a name that ends with "/" is a directory."""


def listed_directory(body: bytes, content_type: str, url: str) -> Listing | None:
    """The children of the directory at `url` by what a server wrote of it; None when this is no listing.

    Known: html pages with links (nginx, Apache, Python, lighttpd ...) and JSON (nginx, caddy).
    """
    if "json" in content_type or body.lstrip()[:1] in (b"[", b"{"):
        return _json_directory(body)
    if "html" in content_type or not content_type:
        return _html_directory(body.decode("utf-8", "replace"), url)
    return None


def listed_files(body: bytes) -> Listing:
    """The files that a listing file names: JSON (a list of paths, or of objects with path and size), or a line each.

    Raises FormatError.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as err:
        raise FormatError("it is not UTF-8 text") from err
    if text.lstrip()[:1] not in ("[", "{"):
        lines = (line.strip() for line in text.splitlines())
        return {line.removeprefix("./"): None for line in lines if line and not line.startswith("#")}
    parsed = _parsed(text)
    if isinstance(parsed, dict) and "weight_map" in parsed:
        return weight_index_files(body)
    entries = parsed.get("files") if isinstance(parsed, dict) else parsed
    if not isinstance(entries, list):
        raise FormatError('it is neither a JSON list nor an object with a list of "files"')
    found: dict[str, int | None] = {}
    for entry in entries:
        path = entry.get("path", entry.get("name")) if isinstance(entry, dict) else entry
        if not isinstance(path, str):
            raise FormatError("an entry is neither a path nor an object with one")
        found[path] = _size(entry.get("size")) if isinstance(entry, dict) else None
    return found


def weight_index_files(body: bytes) -> Listing:
    """The weight files that a model.safetensors.index.json names. Raises FormatError."""
    from rdmaload import _core

    return dict.fromkeys(sorted(_core.files_of_weight_map(body)))


def _parsed(text: str) -> object:
    try:
        parsed: object = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise FormatError(f"it is not JSON: {err}") from err
    return parsed


def _size(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _json_directory(body: bytes) -> Listing | None:
    try:
        entries = _parsed(body.decode("utf-8", "replace"))
    except FormatError:
        return None
    if not isinstance(entries, list):
        return None
    found: dict[str, int | None] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            return None
        # A slash inside would be another directory's file.
        if name.rstrip("/") in ("", ".", "..") or "/" in name.rstrip("/"):
            continue
        if entry.get("type") == "directory" or entry.get("is_dir") is True:
            found[name.rstrip("/") + "/"] = None
        elif entry.get("type", "file") == "file":
            found[name] = _size(entry.get("size"))
    return found


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.base = ""
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get("href")
        if target and tag == "a":
            self.links.append(target)
        elif target and tag == "base" and not self.base:
            self.base = target


def _html_directory(text: str, url: str) -> Listing:
    parser = _Links()
    parser.feed(text)
    parser.close()
    place = urlsplit(url)
    found: dict[str, int | None] = {}
    for link in parser.links:
        try:
            target = urlsplit(urljoin(urljoin(url, parser.base), link.strip()))
            path = unquote(target.path, errors="strict")
        except (ValueError, UnicodeDecodeError):  # no url, or no name that we could ask for
            continue
        same = (target.scheme, target.netloc) == (place.scheme, place.netloc)
        # Links to sort by another column have a query; parents, and other places, are no children.
        # Servers differ in which characters they encode.
        if not same or target.query or target.fragment or not path.startswith(unquote(place.path)):
            continue
        name = path.removeprefix(unquote(place.path))
        if name.rstrip("/") not in ("", ".", "..") and "/" not in name.removesuffix("/"):
            found[name] = None
    return found

"""Any http server that knows ranges: `https://host/path/of/model`; the files below the path are the model's.

Which files there are is found out from, in this order: a manifest of ours, the file that `listing` names, what the
server lists of the directory, `model.safetensors.index.json`, `model.safetensors`. The url's query belongs to the
server and goes with every request; options are keywords.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import ClassVar
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from rdmaload.connectors.connector import FileInfo
from rdmaload.connectors.http_client import Headers, sendable, shown_url
from rdmaload.connectors.http_files import HttpFiles, credentials_header, is_hidden
from rdmaload.connectors.http_listing import Listing, listed_directory, listed_files, weight_index_files
from rdmaload.connectors.tls import check_tls_options
from rdmaload.errors import FormatError, NotFoundError, UrlError
from rdmaload.options import Options
from rdmaload.threads import map_in_threads
from rdmaload.urls import Url

__all__ = ["HttpConnector"]

_WEIGHT_INDEX = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"
_MAX_LISTING_BYTES = 64 * 2**20
_MAX_DIRECTORIES = 10_000
_MAX_DEPTH = 32  # a link to a parent directory would lead on for ever

# What lies beside the weights of a model from a hub; asked for by name where a server lists nothing.
_COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


class HttpConnector(HttpFiles):
    """A model below a url: `https://host/models/llama`.

    >>> from rdmaload.urls import parse_url
    >>> with HttpConnector(parse_url("https://models.example/llama?sig=abc")) as connector:
    ...     connector
    <HttpConnector https://models.example/llama?sig=*** open>
    """

    store_options = frozenset({"headers", "listing"})
    read_only: ClassVar[str] = "models on an http server can be read, not saved; save to what it serves"

    def __init__(self, url: Url, options: Options | None = None) -> None:
        super().__init__(url, options)
        parts = urlsplit(url.text)
        if not url.host:
            raise UrlError(f"{self.url} names no host", url=self.url)
        check_tls_options(self.options, url=self.url, tls=url.scheme == "https", write="https://")
        self._query = sendable(parts.query)
        path = sendable(parts.path)
        directory, name = posixpath.split(path)
        self._named = ""  # a file of the model that the url names instead of the directory
        if name.endswith((".safetensors", ".safetensors.index.json")):
            self._named = unquote(name)
        else:
            directory = path
        server = parts.netloc.rpartition("@")[2]
        try:
            server = server if server.isascii() else server.encode("idna").decode()
        except UnicodeError as err:
            raise UrlError(f"{self.url} names a host that cannot be one: {err}", url=self.url) from err
        place = (url.scheme, server, directory.rstrip("/") + "/")
        self._base = urlunsplit((*place, "", ""))
        password = self.options.read_password(url=self.url)
        self._own = (*self._headers, *credentials_header(self.options.username, password))

    def request_headers(self) -> Headers:
        return self._own

    def file_url(self, path: str) -> str:
        return self._with_query(self._base + quote(path, safe="/"))

    def _with_query(self, url: str) -> str:
        return f"{url}?{self._query}" if self._query else url

    def list_files(self) -> list[FileInfo]:
        self._check_open()
        found = self._find()
        for path in found:
            self._check(path)  # ".." would count as hidden
        # A cache knows files by their tags, which no listing tells.
        unknown = self.options.cache_dir is not None
        return self.infos({path: None if unknown else size for path, size in found.items() if not is_hidden(path)})

    def _find(self) -> Listing:
        if self._named.endswith(".json"):
            return self._named_by_index(self._named, self._get(self.file_url(self._named), must=True) or b"")
        if self._named:
            return {self._named: None}
        if self.options.listing is not None:
            return self._named_by_listing(self.options.listing)
        tree = self._tree()
        if tree:
            return tree
        body = self._get(self.file_url(_WEIGHT_INDEX))
        if body is not None:
            return self._named_by_index(_WEIGHT_INDEX, body)
        if self.look(_ONE_FILE) is not None:
            return {_ONE_FILE: None, **self._companions()}
        raise NotFoundError(
            f"there is no model at {self.url}: the server lists no files there, and there is neither {_WEIGHT_INDEX} "
            f"nor {_ONE_FILE}. Check the url, or give listing= a file that names the model's files",
            url=self.url,
        )

    def _companions(self) -> Mapping[str, None]:
        found = map_in_threads(self.look, _COMPANIONS, self.connections, name="rdmaload-look")
        return dict.fromkeys(path for path, version in zip(_COMPANIONS, found, strict=True) if version is not None)

    def _named_by_index(self, path: str, body: bytes) -> Listing:
        try:
            return {path: None, **weight_index_files(body), **self._companions()}
        except FormatError as err:
            raise FormatError(f"{path} at {self.url} names no weight files: {err}", url=self.url, key=path) from err

    def _named_by_listing(self, name: str) -> Listing:
        if "://" in name and urlsplit(name).netloc != urlsplit(self._base).netloc:
            raise UrlError(f"{self.url}: listing={shown_url(name)} is on another server", url=self.url)
        url = urljoin(self._base, sendable(name) if "://" in name else quote(name, safe="/"))
        body = self._get(self._with_query(url), must=True)
        try:
            found = listed_files(body or b"")
        except FormatError as err:
            raise FormatError(f"{shown_url(url)} lists no files: {err}", url=self.url, key=name) from err
        if not found:
            raise NotFoundError(f"{shown_url(url)} names no files", url=self.url, key=name)
        if name.endswith(".safetensors.index.json") and "://" not in name:
            return {name: None, **found, **self._companions()}
        return found

    def _tree(self) -> Listing:
        """Every file below the url that the server lists."""
        found: dict[str, int | None] = {}
        pending = [("", 0)]
        for visited in range(_MAX_DIRECTORIES):
            if not pending:
                return found
            prefix, depth = pending.pop()
            listing = self._directory(prefix)
            if listing is None and visited == 0:
                return {}
            for name, size in (listing or {}).items():
                path = prefix + name
                if not path.endswith("/"):
                    found[path] = size
                elif not name.startswith(".") and depth < _MAX_DEPTH:
                    pending.append((path, depth + 1))
        raise FormatError(f"{self.url} lists more than {_MAX_DIRECTORIES} directories", url=self.url)

    def _directory(self, prefix: str) -> Listing | None:
        def ask() -> Listing | None:
            accepted = ("Accept", "application/json, text/html;q=0.9, */*;q=0.5")
            url = self._with_query(self._base + quote(prefix, safe="/"))
            with self._client.request("GET", url, self.request_headers(), more=(accepted,)) as response:
                if response.status in (400, 403, 404, 405, 410):
                    return None
                if response.status != 200:
                    raise self.meaning(response, None)
                content_type = response.header("content-type")
                if not any(word in content_type for word in ("html", "json", "text")) and content_type:
                    return None
                return listed_directory(response.read(_MAX_LISTING_BYTES), content_type, response.url)

        return self.tried(None, ask)

    def _get(self, url: str, *, must: bool = False) -> bytes | None:
        """A small file; None when there is none, unless there must be one."""

        def ask() -> bytes | None:
            with self._client.request("GET", url, self.request_headers()) as response:
                if response.status == 200 and (must or "text/html" not in response.header("content-type")):
                    return response.read(_MAX_LISTING_BYTES)
                if not must and response.status in (200, 400, 404, 410):
                    return None
                raise self.meaning(response, None)

        return self.tried(None, ask)

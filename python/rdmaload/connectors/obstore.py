"""Stores that obstore reaches, whichever they are: listing, writing, errors, and reads where no url can be had.

obstore does what it is best at: credentials and their refresh, listing, writing. Weights go through the native
transport, by urls that obstore signs or by what a public bucket or a given token needs. Where nothing can sign, reads
go through obstore in `threads` threads, which is logged and shows as `python` in the statistics.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import quote, unquote, urlsplit

from rdmaload.connectors.connector import FileInfo
from rdmaload.connectors.http_client import Headers, shown_url
from rdmaload.connectors.http_statuses import meaning_of_status
from rdmaload.connectors.objects import KEPT, ObjectConnector
from rdmaload.connectors.obstore_upload import ObstoreUpload
from rdmaload.connectors.proxies import Proxies
from rdmaload.connectors.tls import native_context
from rdmaload.errors import (
    AuthenticationError,
    FormatError,
    LoadTimeoutError,
    NotFoundError,
    NotSupportedError,
    RdmaloadError,
    UnavailableError,
    UrlError,
)
from rdmaload.options import Options
from rdmaload.urls import SECRET_TEXT, Url

__all__ = ["GOOD_SECONDS", "URL_SECONDS", "ObstoreConnector"]

_log = logging.getLogger("rdmaload")

# As for S3.
URL_SECONDS = 3600
"""How long a signed url is good for."""
GOOD_SECONDS = 3300.0
"""After how long it is signed anew: a read that waits in a queue still has one that works."""
_MAX_SMALL_BYTES = 64 * 2**20
_WHOLE_DAY = datetime.timedelta(days=1)  # obstore's own limit of a whole request would cut slow transfers short
_PARTS_AT_ONCE = 4
_OF_CREDENTIALS = re.compile(r"credential|token|[Ss]ervice[ _]?[Aa]ccount|private key|decode key|signBlob|SAS")
_NO_ANSWER = re.compile(r"[Hh]eader (?:missing|not present)|Requested \S+, got")
_URLS = re.compile(r"https?://[^\s\"')]+")


class ObstoreConnector(ObjectConnector):
    """A model in a bucket that obstore reaches."""

    default_options: ClassVar[Mapping[str, object]] = {"connections": 8, "threads": 4}
    extra: ClassVar[str]
    """What to install: the extra's name."""

    def __init__(self, url: Url, options: Options | None = None) -> None:
        super().__init__(url, options)
        for name in ("client_cert_file", "ca_dir", "server_name"):
            if getattr(self.options, name) is not None:
                raise NotSupportedError(f"{self.url}: obstore takes no {name}; give ca_file=", url=self.url)
        self._config: dict[str, Any] = json.loads(self.options.storage_options or "{}")
        self._made: Any = None  # Guarded by _lock.
        self._proxies = Proxies()

    @abstractmethod
    def _new_store(self, config: dict[str, Any], **more: object) -> Any:
        """obstore's object for the bucket."""

    @abstractmethod
    def _own_address(self, key: str) -> tuple[str, Headers, float | None] | None:
        """A url that needs no signature of obstore's, its headers, for how many seconds; None where it does."""

    def close(self) -> None:
        """Give connections back. Idempotent."""
        super().close()
        with self._lock:
            self._made = None

    def _store(self) -> Any:
        self._check_open()
        with self._lock:
            if self._made is None:
                try:
                    import obstore  # noqa: F401
                except ImportError as err:
                    raise NotSupportedError(
                        f"{self.url} needs obstore: pip install 'rdmaload[{self.extra}]'", url=self.url
                    ) from err
                with self._translated("open"):
                    made = self._new_store(
                        dict(self._config), client_options=self._client_options(), retry_config=self._retries()
                    )
                if (endpoint := self._endpoint(made.config)) is not None:
                    self._proxies.of(endpoint)  # before obstore uses what we refuse
                self._made = made
            return self._made

    def _endpoint(self, config: Mapping[str, Any]) -> str | None:
        """Where the store is, as `config` says with what the environment does; None where it does not say."""
        if "use_emulator" in config or "use_fabric_endpoint" in config:
            return None
        given = self.options.endpoint_url or config.get("base_url") or config.get("endpoint")
        account = config.get("account_name")
        if "container_name" in config and not account:
            return None
        host = f"{account}.blob.core.windows.net" if account else "storage.googleapis.com"
        return str(given or f"https://{host}")

    def _client_options(self) -> dict[str, object]:
        options = self.options
        found: dict[str, object] = {
            "connect_timeout": datetime.timedelta(seconds=options.connect_timeout),
            "read_timeout": datetime.timedelta(seconds=options.inactivity_timeout),
            "timeout": _WHOLE_DAY,
            "allow_http": (options.endpoint_url or "").startswith("http://"),
            "allow_invalid_certificates": not options.verify_tls,
            "user_agent": "rdmaload",
        }
        if options.ca_file is not None:
            try:
                found["root_certificate"] = Path(options.ca_file).read_bytes()
            except OSError as err:
                raise AuthenticationError(
                    f"ca_file={options.ca_file} for {self.url} cannot be read: {err.strerror}", url=self.url
                ) from err
        return found

    def _retries(self) -> dict[str, object]:
        return {"max_retries": 10, "retry_timeout": datetime.timedelta(seconds=self.options.retry_timeout)}

    # ---- reading ----

    def native_transport(self) -> object | None:
        from rdmaload import _core

        try:
            self._signed("rdmaload")  # any name will do
        except RdmaloadError as err:
            if self._closed:
                raise
            self.fallback_reason = f"weights are read through obstore, as no url could be signed: {err}"
            _log.warning("%s: %s", self.url, self.fallback_reason)
            return None
        options = self.options
        tls = None
        with contextlib.suppress(NotSupportedError):  # without OpenSSL, http:// works all the same
            tls = native_context(options, url=self.url)
        transport: object = _core.HttpTransport(
            self._address,
            connections=self.connections,
            connect_timeout=options.connect_timeout,
            inactivity_timeout=options.inactivity_timeout,
            stall_timeout=options.stall_timeout,
            tls=tls,
            name=self.url,
        )
        return transport

    def _signed(self, key: str, method: Literal["GET", "HEAD"] = "GET") -> tuple[str, Headers, float | None]:
        """A url to read a key by, or to ask about it, its headers, and for how many seconds."""
        store = self._store()
        found = self._own_address(key)
        if found is not None:
            return found
        import obstore

        # obstore leaves "%", "?" and "#" as they are in names of some stores: what it made of the name shows it.
        for name in dict.fromkeys((key, quote(key, safe="/"))):
            with self._translated("sign a url for", key.removeprefix(self._prefix)):
                url: str = obstore.sign(store, method, name, datetime.timedelta(seconds=URL_SECONDS))
            if unquote(urlsplit(url).path).endswith(f"/{key}"):
                return url, (), GOOD_SECONDS
        raise NotSupportedError(f"{self.url}: obstore signs no url for the name {key}", url=self.url, key=key)

    def _address(self, path: str, refused: bool) -> tuple[str, list[tuple[str, str]], str, str, str, float | None]:
        """Where the native transport finds a file; `refused` needs nothing more: every url is signed anew."""
        url, headers, seconds = self._signed(self._key(path))
        proxy, authorization = self._proxies.of(url)
        return url, list(headers), self._etags.get(path, ""), proxy, authorization, seconds

    def list_files(self) -> list[FileInfo]:
        store = self._store()
        import obstore

        found: dict[str, FileInfo] = {}
        with self._translated("list"):
            for page in obstore.list(store, self._prefix.removesuffix("/") or None):
                for entry in page:
                    path = entry["path"][len(self._prefix) :]
                    if path and not any(part.startswith(".") for part in path.split("/")[:-1]):
                        found[path] = FileInfo(path, entry["size"], entry.get("e_tag"))
        # An empty object that others lie "in" is what consoles show as a folder.
        folders = {path.rpartition("/")[0] for path in found}
        files = [info for path, info in sorted(found.items()) if info.size or path not in folders]
        for info in files:
            self._check(info.path)
        if not files:
            raise NotFoundError(f"there are no objects at {self.url}: check {self.place_name} and prefix", url=self.url)
        return files

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        key = self._key(path)
        view = buffer.cast("B")
        if len(view) == 0:
            return 0
        store = self._store()
        import obstore

        options: dict[str, object] = {"range": (offset, offset + len(view))}
        if path in self._etags:
            options["if_match"] = self._etags[path]
        try:
            with self._translated("read", path):
                data = memoryview(obstore.get(store, key, options=options).bytes())
        except RdmaloadError as err:
            if "status code: 416" in str(err.__cause__) or "range" in str(err.__cause__).lower():
                return self._behind_the_end(store, path, key, offset, err)
            raise
        view[: len(data)] = data
        return len(data)

    def _behind_the_end(self, store: Any, path: str, key: str, offset: int, err: RdmaloadError) -> int:
        import obstore

        with self._translated("read", path):
            size = obstore.head(store, key)["size"]
        if offset < size:
            raise err
        return 0

    def read_small(self, path: str) -> bytes | None:
        key = self._key(path)
        store = self._store()
        import obstore

        try:
            with self._translated("read", path):
                result = obstore.get(store, key)
                if result.meta["size"] > _MAX_SMALL_BYTES:
                    raise FormatError(
                        f"{path} in {self.url} has more than {_MAX_SMALL_BYTES} bytes", url=self.url, key=path
                    )
                return bytes(result.bytes())
        except NotFoundError:
            return None

    # ---- writing ----

    def put(self, path: str, data: bytes | bytearray) -> str:
        key = self._key(path)
        store = self._store()
        import obstore

        with self._translated("write", path):
            return str(obstore.put(store, key, bytes(data), use_multipart=False)["e_tag"])

    def begin_upload(self, path: str) -> ObstoreUpload:
        key = self._key(path)
        store = self._store()
        import obstore

        def put(parts: Iterator[bytes], part_bytes: int) -> str:
            with self._translated("write", path):
                result = obstore.put(
                    store, key, parts, use_multipart=True, chunk_size=part_bytes, max_concurrency=_PARTS_AT_ONCE
                )
                return str(result["e_tag"])

        return ObstoreUpload(put)

    def delete(self, path: str) -> bool:
        key = self._key(path)
        store = self._store()
        import obstore

        try:
            with self._translated("remove", path):
                obstore.head(store, key)  # a store does not say whether there was one
        except NotFoundError:
            return False
        # Google and Azure find none where the answer to obstore's first try was lost.
        with contextlib.suppress(NotFoundError), self._translated("remove", path):
            obstore.delete(store, key)
        return True

    def list_kept(self) -> list[tuple[str, float]]:
        store = self._store()
        import obstore

        with self._translated("list"):
            return [
                (entry["path"][len(self._prefix) :], entry["last_modified"].timestamp())
                for page in obstore.list(store, f"{self._prefix}{KEPT}".removesuffix("/"))
                for entry in page
            ]

    # ---- errors ----

    def _meaning(self, err: Exception, verb: str, path: str | None) -> RdmaloadError:
        from obstore import exceptions as theirs

        place = f"{path} in {self.url}" if path else self.url
        text = self._safe(str(err).partition("\n")[0])
        found = re.search(r"status code: (\d{3})", str(err))
        status = int(found[1]) if found else 0
        kind: type[RdmaloadError] = RdmaloadError
        hint = ""
        about = unquote(text).replace(path, "") if path else text  # a file may be called tokenizer.json
        if isinstance(err, FileNotFoundError) or status == 404:
            kind = NotFoundError
            hint = f"check {self.place_name} and prefix" if path is None else ""
        elif isinstance(err, (theirs.PermissionDeniedError, theirs.UnauthenticatedError)):
            kind, hint = meaning_of_status(403)
        elif isinstance(err, theirs.PreconditionError):
            kind, hint = meaning_of_status(412)
        elif isinstance(err, theirs.AlreadyExistsError) and verb in ("write", "remove"):
            kind = RdmaloadError  # a 409, which passes for a read, may here be a lease of somebody else
        elif status and not (status == 400 and _OF_CREDENTIALS.search(about)):
            kind, hint = meaning_of_status(status)
        elif "redirect without" in text:
            kind, hint = meaning_of_status(302)
        elif "must be specified" in text:
            kind, hint = UrlError, f"say which ({self._how_to_log_in()})"
        elif _OF_CREDENTIALS.search(about):
            kind = AuthenticationError
            hint = f"give credentials ({self._how_to_log_in()}), or unsigned=true for what is public"
        elif isinstance(err, (theirs.UnknownConfigurationKeyError, TypeError, ValueError)):
            kind, hint = UrlError, "correct the url or storage_options"
        elif isinstance(err, (theirs.NotSupportedError, NotImplementedError)):
            kind = NotSupportedError
        elif "non-partial response" in text:
            kind, hint = NotSupportedError, "the store does not support ranges, which loading needs"
        elif _NO_ANSWER.search(text):
            kind, hint = FormatError, "that is no answer to such a request"
        elif "timed out" in str(err) or "Timeout" in str(err):
            kind = LoadTimeoutError
        elif "error sending request" in text or "body error" in text or "connect" in text.lower():
            kind = UnavailableError
        message = f"cannot {verb} {place}: {text}"
        if hint:
            message = f"{message.rstrip('. ')}. {hint[0].upper()}{hint[1:]}"
        return kind(message, url=self.url, key=path)

    @abstractmethod
    def _how_to_log_in(self) -> str:
        """Where credentials come from."""

    def _safe(self, text: str) -> str:
        """The library's words without the queries of urls and without what we gave it."""
        text = _URLS.sub(lambda found: shown_url(found[0]), text)
        for value in (self._password, *self._config.values()):
            if isinstance(value, str) and len(value) > 7:
                text = text.replace(value, SECRET_TEXT)
        return text

"""Small HTTP requests from Python: listings, headers of files, what a server says of a file.

Weights go through the native transport. This client shares its rules: retries with backoff for what passes, redirects
that carry credentials to no other server, TLS and proxies as the options and the environment say. Thread-safe.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from rdmaload.connectors.http_statuses import REDIRECTS, meaning_of_status, status_passes
from rdmaload.connectors.proxies import Proxies
from rdmaload.connectors.retries import Refused, Retries, retry_after_seconds
from rdmaload.connectors.tls import failure_in, failure_passes, first_error, meaning_of_failure, python_context
from rdmaload.errors import (
    AuthenticationError,
    FormatError,
    LoadTimeoutError,
    NotSupportedError,
    RdmaloadError,
    UnavailableError,
    UrlError,
)
from rdmaload.options import Options

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse
    from urllib3.connectionpool import HTTPConnectionPool
    from urllib3.poolmanager import PoolManager

__all__ = ["Headers", "HttpClient", "Response", "sendable", "shown_url", "unwarned_pool"]

Headers = tuple[tuple[str, str], ...]
_Result = TypeVar("_Result")

_MAX_REDIRECTS = 5


class Response:
    """A response whose body was not read yet. A context manager: the connection goes back, or is closed."""

    def __init__(self, raw: BaseHTTPResponse, url: str) -> None:
        self._raw = raw
        self.url = url
        """Where it came from, redirects followed; may hold a secret."""
        self.status = raw.status

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *_: object) -> None:
        # What was not read would have to be read before the next answer.
        self._raw.close()
        self._raw.release_conn()

    def header(self, name: str) -> str:
        """A header's text, "" without one."""
        return str(self._raw.headers.get(name, ""))

    @property
    def length(self) -> int | None:
        """The announced size of the body in bytes."""
        text = self.header("content-length")
        return int(text) if text.isascii() and text.isdecimal() else None

    def read(self, limit: int) -> bytes:
        """The body. Raises FormatError when it has more than `limit` bytes."""
        data = bytearray()
        while len(data) <= limit:
            block = self._raw.read(min(1 << 20, limit + 1 - len(data)))
            if not block:
                return bytes(data)
            data += block
        raise FormatError(f"{shown_url(self.url)} has more than {limit} bytes")

    def read_into(self, buffer: memoryview) -> int:
        """Some of the body; 0 at its end."""
        block: bytes = self._raw.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)


class HttpClient:
    """Connections to the servers of one connector; `url` is what messages show, `count` hears of what is sent again."""

    def __init__(
        self, options: Options, *, url: str, connections: int, count: Callable[[], None] = lambda: None
    ) -> None:
        self._options = options
        self._url = url
        self._connections = connections
        self._retries = Retries(options, count=count)
        self._lock = threading.Lock()
        self._pools: dict[tuple[bool, str, str], PoolManager] = {}  # Guarded by _lock; by TLS and proxy.
        self.proxies = Proxies()

    def close(self) -> None:
        """Give connections back and end pauses. Idempotent."""
        self._retries.close()
        with self._lock:
            pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.clear()

    def tried(self, work: Callable[[], _Result]) -> _Result:
        """`work`, again while the server is away or says that it is busy, for `retry_timeout` at most."""
        return self._retries.tried(work)

    def request(
        self, method: str, url: str, headers: Headers, *, more: Iterable[tuple[str, str]] = (), key: str | None = None
    ) -> Response:
        """One request, redirects followed; every status that does not pass by itself is the caller's to judge.

        `headers` are for the server of `url` alone, `more` for every one. To be called from within `tried`.
        """
        begun = urlsplit(url)
        for _ in range(_MAX_REDIRECTS + 1):
            now = urlsplit(url)
            same = (now.scheme, now.netloc) == (begun.scheme, begun.netloc)
            sent = {"User-Agent": "rdmaload", "Accept-Encoding": "identity", **dict(more)}
            sent |= dict(headers) if same else {}
            response = self._send(method, url, sent, key)
            self._retries.has_answered = True
            # A header's bytes are read as Latin-1; some servers send a name as it is.
            location = sendable(response.header("location").encode("latin-1"))
            if response.status in REDIRECTS and location:
                with response:
                    url = urljoin(url, location)
                if begun.scheme == "https" and urlsplit(url).scheme != "https":
                    raise NotSupportedError(
                        f"{self._place(key)}: the server redirects from https to {shown_url(url)}, which anyone on the "
                        "way could change",
                        url=self._url,
                        key=key,
                    )
                continue
            if status_passes(response.status):
                with response:
                    raise Refused(self.meaning(response, key), retry_after_seconds(response.header("retry-after")))
            return response
        raise UrlError(
            f"{self._place(key)}: more than {_MAX_REDIRECTS} redirects, the last to {shown_url(url)}: correct the url, "
            "or the server",
            url=self._url,
            key=key,
        )

    def meaning(self, response: Response, key: str | None = None) -> RdmaloadError:
        """The error that a status is; the native transport says the same of the answers that it gets."""
        status = response.status
        kind, hint = meaning_of_status(status)
        hint = _WHO if kind is AuthenticationError else f"{hint[0].upper()}{hint[1:]}"
        text = f"{self._place(key)}: {shown_url(response.url)} answered {status}"
        return kind(f"{text}. {hint}", url=self._url, key=key)

    def _place(self, key: str | None) -> str:
        return f"{key} in {self._url}" if key else self._url

    def _send(self, method: str, url: str, headers: dict[str, str], key: str | None) -> Response:
        from urllib3 import Timeout, exceptions

        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise UrlError(f"{self._place(key)}: {shown_url(url)} is no http url", url=self._url, key=key)
        pool = self._pool(url)
        timeout = Timeout(connect=self._options.connect_timeout, read=self._options.inactivity_timeout)
        try:
            raw = pool.urlopen(
                method, url, headers=headers, redirect=False, retries=False, preload_content=False, timeout=timeout
            )
        except (exceptions.HTTPError, OSError) as err:
            raise self.translated(err, key) from err
        return Response(raw, url)

    def translated(self, err: Exception, key: str | None) -> RdmaloadError:
        """Our error for one of urllib3's or of a socket."""
        from urllib3 import exceptions

        cause = failure_in(err)
        kind: type[RdmaloadError] = UnavailableError
        hint = ""
        if cause is not None and not failure_passes(cause):
            kind, hint = meaning_of_failure(cause)
        elif isinstance(err, (exceptions.TimeoutError, TimeoutError)) and not isinstance(
            err, exceptions.NewConnectionError
        ):
            kind, hint = LoadTimeoutError, "look at server and network, or raise inactivity_timeout"
        elif isinstance(err, (exceptions.LocationValueError, UnicodeError)):
            kind, hint = UrlError, "correct the url"
        else:
            hint = "see that the url is right, and that the server runs and can be reached from here"
        # Their text shows the url with its query.
        what = "no byte came in time" if kind is LoadTimeoutError else _without_urls(err)
        text = f"cannot reach {self._place(key)}: {what}"
        return kind(f"{text}. {hint[0].upper()}{hint[1:]}" if hint else text, url=self._url, key=key)

    def _pool(self, url: str) -> PoolManager:
        import urllib3

        tls = urlsplit(url).scheme == "https"
        address, authorization = self.proxies.of(url)
        with self._lock:
            if self._retries.closed:
                raise UnavailableError(f"the connector for {self._url} is closed: open another", url=self._url)
            pool = self._pools.get((tls, address, authorization))
            if pool is None:
                more: dict[str, Any] = {}
                if tls:  # to read the system's authorities takes longer than all other work for a small model
                    more["ssl_context"] = python_context(self._options, url=self._url)
                    if self._options.server_name:
                        more["server_hostname"] = self._options.server_name
                if address:
                    sent = {"Proxy-Authorization": authorization} if authorization else {}
                    pool = urllib3.ProxyManager(address, proxy_headers=sent, maxsize=self._connections, **more)
                else:
                    pool = urllib3.PoolManager(maxsize=self._connections, **more)
                if not self._options.verify_tls:
                    pool.pool_classes_by_scheme = {
                        **pool.pool_classes_by_scheme,
                        "https": unwarned_pool(pool.pool_classes_by_scheme["https"]),
                    }
                self._pools[tls, address, authorization] = pool
            return pool


def unwarned_pool(pool: type[HTTPConnectionPool]) -> type[HTTPConnectionPool]:
    """A pool of https whose connections are not verified, as `verify_tls` says, which was logged: no further warnings.

    Only in what is done through it: filters of the warnings module are the whole process's.
    """

    class Connection(pool.ConnectionCls):  # type: ignore[misc,name-defined]  # a class that is not known before
        def connect(self) -> None:
            super().connect()
            self.is_verified = True  # decides about the warning, and nothing else

    return type("UnwarnedPool", (pool,), {"ConnectionCls": Connection})


_WHO = (
    "Give credentials: password_env=NAME of a variable that holds a token (with username=, a password), or headers=; "
    "or see what they may read"
)


def sendable(text: str | bytes) -> str:
    """A url, or a part of one, with what a request cannot hold percent-encoded; what is encoded already stays.

    >>> sendable("/my models/l%20l\u00e9?sig=a+b%3D")
    '/my%20models/l%20l%C3%A9?sig=a+b%3D'
    """
    return quote(text, safe="!#$%&'()*+,/:;=?@[]~")


def shown_url(url: str) -> str:
    """A url without user and query, which may be secrets."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _without_urls(err: BaseException) -> str:
    """The system's own words where there are some: what a library says around them shows objects and urls."""
    inner: BaseException | None = err
    words = type(err).__name__
    while inner is not None:
        if isinstance(inner, OSError) and (inner.strerror or inner.args):
            words = str(inner.strerror or inner.args[0])
        inner = inner.__cause__ or inner.__context__ or first_error(inner)
    return words

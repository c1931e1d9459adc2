"""Models whose files each have an http url: what HttpConnector and HfConnector share. Read-only.

Which content of a file is read is pinned by the first answer about it: its ETag (If-Match) or, where a server has
none, its date (If-Unmodified-Since). A file that is replaced later is an error, never half of another model. Tags in a
manifest are those of the store that it was written to, so that they pin nothing here; its checksums do.
"""

from __future__ import annotations

import base64
import re
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar
from urllib.parse import urlsplit

from rdmaload.connectors.connector import FileConnector, FileInfo, is_hidden
from rdmaload.connectors.http_client import Headers, HttpClient, Response
from rdmaload.connectors.store_digests import FileDigest, digest_of_headers
from rdmaload.connectors.tls import native_context
from rdmaload.errors import FormatError, IntegrityError, NotFoundError, NotSupportedError, RdmaloadError
from rdmaload.options import Options
from rdmaload.threads import map_in_threads
from rdmaload.urls import Url

__all__ = ["HttpFiles", "credentials_header", "header_pairs", "is_hidden"]

_Result = TypeVar("_Result")

_MAX_SMALL_BYTES = 64 * 2**20  # read whole: a manifest, an index or a listing
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19}|\*)", re.ASCII)


@dataclass(frozen=True)
class _Version:
    """The content of a file, as far as its server tells it from others."""

    size: int
    etag: str
    modified: str

    def conditions(self) -> Headers:
        """Headers that make a request for another content fail; a weak tag never matches If-Match."""
        if self.etag and not self.etag.startswith("W/"):
            return (("If-Match", self.etag),)
        return (("If-Unmodified-Since", self.modified),) if self.modified and not self.etag else ()

    def is_same(self, other: _Version) -> bool:
        tags = [version.etag.removeprefix("W/") for version in (self, other)]
        if all(tags):
            return self.size == other.size and tags[0] == tags[1]
        dated = self.modified and other.modified and not any(tags)
        return self.size == other.size and (not dated or self.modified == other.modified)


class HttpFiles(FileConnector):
    """Files by http url. A subclass says where a file is and which there are."""

    default_options: ClassVar[Mapping[str, object]] = {"connections": 8, "threads": 4}
    keeps_manifest: ClassVar[bool] = True
    pins_versions = True
    read_only: ClassVar[str] = "an http server is read only"

    def __init__(self, url: Url, options: Options | None = None) -> None:
        super().__init__(url, options)
        self._client = HttpClient(
            self.options,
            url=self.url,
            connections=max(self.connections, self.options.threads, 4),
            count=self._count_retries,
        )
        self._headers = header_pairs(self.options.headers)
        self._lock = threading.Lock()
        self._seen: dict[str, _Version] = {}  # Guarded by _lock, as is the next.
        self._digests: dict[str, FileDigest] = {}  # of the versions in _seen

    @abstractmethod
    def file_url(self, path: str) -> str:
        """Where a file is."""

    def request_headers(self) -> Headers:
        """Headers for the server of `file_url`, and for no other."""
        return self._headers

    def close(self) -> None:
        """Give connections back. Idempotent."""
        super().close()
        self._client.close()

    # ---- reading ----

    def native_transport(self) -> object | None:
        self._check_open()
        from rdmaload import _core

        options = self.options

        def tls() -> _core.TlsContext:
            return native_context(options, url=self.url)

        # A file that cannot be used, or no OpenSSL, is better known at once. Else it is made when a redirect leads to
        # https: to read the system's authorities takes longer than to load a small model.
        secured = urlsplit(self.file_url("x")).scheme == "https"
        transport: object = _core.HttpTransport(
            self._address,
            connections=self.connections,
            connect_timeout=options.connect_timeout,
            inactivity_timeout=options.inactivity_timeout,
            stall_timeout=options.stall_timeout,
            tls=tls() if secured else tls,
            name=self.url,
        )
        return transport

    def _address(self, path: str, refused: bool) -> tuple[str, list[tuple[str, str]], str, str, str, float | None]:
        """Where the native transport finds a file, and which content of it."""
        self._check(path)
        with self._lock:
            version = self._seen.get(path)
        if version is None:
            version = self.look(path)
        if version is None:
            raise NotFoundError(f"there is no {path} in {self.url} (any more)", url=self.url, key=path)
        url = self.file_url(path)
        headers = list(self.request_headers())
        headers += [(name, text) for name, text in version.conditions() if name != "If-Match"]
        proxy, authorization = self._client.proxies.of(url)
        return url, headers, version.etag, proxy, authorization, None

    def pin(self, etags: Mapping[str, str]) -> None:
        if not etags:
            with self._lock:
                self._seen.clear()
                self._digests.clear()
                self.pins_versions = True

    def digests(self, paths: Sequence[str]) -> dict[str, FileDigest]:
        with self._lock:  # of what was seen: nothing is asked for a checksum that most servers do not have
            return {path: self._digests[path] for path in paths if path in self._digests}

    def look(self, path: str) -> _Version | None:
        """What the server says of a file now; None when there is none. Pins it, unless it is pinned."""

        def ask() -> _Version | None:
            with self._request("HEAD", path) as response:
                if response.status in (404, 410):
                    return None
                if response.status == 200 and response.length is not None:
                    return self._pinned(path, response, response.length)
                if response.status not in (200, 400, 403, 405, 501):
                    raise self.meaning(response, path)
            # Some answer GET alone; a url may be signed for nothing else.
            with self._request("GET", path, ("Range", "bytes=0-0")) as response:
                if response.status in (404, 410):
                    return None
                size = response.length if response.status == 200 else _total_of(response)
                if response.status not in (200, 206, 416):
                    raise self.meaning(response, path)
                if size is None:
                    raise FormatError(f"the server does not say how large {path} in {self.url} is", url=self.url)
                return self._pinned(path, response, size)

        return self.tried(path, ask)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        self._check(path)
        view = buffer.cast("B")
        done = 0

        def read() -> int:
            nonlocal done
            if done == len(view):
                return done
            begin, last = offset + done, offset + len(view) - 1
            with self._lock:
                version = self._seen.get(path)
            conditions = version.conditions() if version is not None else ()
            with self._request("GET", path, ("Range", f"bytes={begin}-{last}"), *conditions) as response:
                if response.status == 416 or (response.status == 200 and response.length == 0):
                    size = _total_of(response) if response.status == 416 else 0
                    if size is not None:
                        self._pinned(path, response, size)
                    return done
                end = self._check_range(response, path, begin, last)
                while begin + done < begin + end:
                    got = response.read_into(view[done:end])
                    if got == 0:
                        raise self._cut(path, offset + done)
                    done += got
                return done

        return self.tried(path, read)

    def read_small(self, path: str) -> bytes | None:
        self._check(path)

        def read() -> bytes | None:
            with self._request("GET", path) as response:
                # Others answer with a page of theirs, or refuse all names that begin with a dot.
                if response.status in (400, 403, 404, 410) or "text/html" in response.header("content-type"):
                    return None
                if response.status != 200:
                    raise self.meaning(response, path)
                return response.read(_MAX_SMALL_BYTES)

        return self.tried(path, read)

    def infos(self, listing: Mapping[str, int | None]) -> list[FileInfo]:
        """Sizes and tags of files, asked for where a listing did not say the size. Sorted."""
        for path in listing:
            self._check(path)

        def info(path: str) -> FileInfo:
            size = listing[path]
            if size is not None:
                return FileInfo(path, size)
            version = self.look(path)
            if version is None:
                raise NotFoundError(
                    f"{path} is listed at {self.url}, but there is no such file: the copy of the model is incomplete",
                    url=self.url,
                    key=path,
                )
            return FileInfo(path, version.size, version.etag or version.modified or None)

        threads = max(self.connections, self.options.threads)
        return map_in_threads(info, sorted(listing), threads, name="rdmaload-look")

    # ---- writing ----

    def write(self, path: str, size: int, blocks: Iterable[memoryview]) -> None:
        self._check(path)
        raise self._read_only()

    def delete(self, path: str) -> bool:
        self._check(path)
        raise self._read_only()

    def _read_only(self) -> NotSupportedError:
        return NotSupportedError(f"{self.url}: {self.read_only}", url=self.url)

    # ---- requests and answers ----

    def _request(self, method: str, path: str, *more: tuple[str, str]) -> Response:
        return self._client.request(method, self.file_url(path), self.request_headers(), more=more, key=path)

    def tried(self, path: str | None, work: Callable[[], _Result]) -> _Result:
        """`work` with our errors, again while the server is away; bodies that are cut included."""
        from urllib3.exceptions import HTTPError

        def translated() -> _Result:
            try:
                return work()
            except RdmaloadError:
                raise
            except (HTTPError, OSError) as err:
                raise self._client.translated(err, path) from err

        return self._client.tried(translated)

    def meaning(self, response: Response, path: str | None) -> RdmaloadError:
        """The error that an answer is; a subclass knows its server's words."""
        return self._client.meaning(response, path)

    def _pinned(self, path: str, response: Response, size: int) -> _Version:
        """Remember the first content that was seen; raise IntegrityError for another one."""
        now = _Version(size, response.header("etag"), response.header("last-modified"))
        digest = digest_of_headers(response.header)
        with self._lock:
            first = self._seen.setdefault(path, now)
            if digest is not None and first is now:
                self._digests[path] = digest
            # Not every server minds If-Unmodified-Since: the loader looks at the dates again after it has read.
            self.pins_versions = self.pins_versions and bool(first.etag)
        if not first.is_same(now):
            raise IntegrityError(
                f"{path} in {self.url} was replaced while it was read (it has {now.size} bytes and ETag "
                f"{now.etag or 'none'}, expected {first.size} and {first.etag or 'none'}): open the model again",
                url=self.url,
                key=path,
            )
        return first

    def _check_range(self, response: Response, path: str, begin: int, last: int) -> int:
        """How many bytes from `begin` on the body has. Raises for what is not the range that was asked for."""
        if response.header("content-encoding") not in ("", "identity"):
            raise FormatError(
                f"the server sends {path} in {self.url} encoded, so that it is no range of the file",
                url=self.url,
                key=path,
            )
        found = _CONTENT_RANGE.fullmatch(response.header("content-range"))
        if response.status == 200 and found is None:
            size = response.length
            if begin == 0 and size is not None and size <= last + 1:
                self._pinned(path, response, size)
                return size
            raise NotSupportedError(
                f"{path} in {self.url}: the server answers with the whole file where a range was asked for: it does "
                "not support ranges, which loading needs. Use a server that does, such as nginx",
                url=self.url,
                key=path,
            )
        if response.status not in (200, 206):
            raise self.meaning(response, path)
        if found is None or found[1] is None:
            raise FormatError(
                f"{path} in {self.url}: the server answered 206 without saying which bytes it sends",
                url=self.url,
                key=path,
            )
        first, end = int(found[1]), int(found[2])
        if first != begin or not begin <= end <= last or (end < last and found[3] not in ("*", str(end + 1))):
            raise FormatError(
                f"{path} in {self.url}: asked for bytes {begin}-{last}, the server sends {first}-{end}",
                url=self.url,
                key=path,
            )
        if found[3] != "*":
            self._pinned(path, response, int(found[3]))
        return end + 1 - begin

    def _cut(self, path: str, at: int) -> RdmaloadError:
        from rdmaload.errors import UnavailableError

        return UnavailableError(f"{path} in {self.url}: the body ended at byte {at}", url=self.url, key=path)


def header_pairs(text: str | None) -> Headers:
    """The `headers` option as pairs."""
    pairs = (line.partition(":") for line in (text or "").splitlines())
    return tuple((name, value.strip()) for name, _, value in pairs)


def credentials_header(username: str | None, password: str | None) -> Headers:
    """A user and a password as Basic; a password alone is a bearer token."""
    if username is not None:
        word = base64.b64encode(f"{username}:{password or ''}".encode()).decode()
        return (("Authorization", f"Basic {word}"),)
    return (("Authorization", f"Bearer {password}"),) if password else ()


def _total_of(response: Response) -> int | None:
    """The file's size in a Content-Range."""
    found = _CONTENT_RANGE.fullmatch(response.header("content-range"))
    return int(found[3]) if found is not None and found[3] != "*" else None

"""S3 and the stores that speak like it: `s3://bucket/prefix`; a model's files are the objects below the prefix.

botocore does what it is best at: credentials (environment, profiles, SSO, roles, and their refresh), endpoints,
regions, addressing, listing and small calls. Weights go through the native transport, which asks by presigned urls:
only the host is signed, so that one url serves every range of an object, and a new one is signed before it expires.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

from rdmaload._core import crc32c
from rdmaload.connectors.connector import FileInfo, is_hidden
from rdmaload.connectors.http_statuses import meaning_of_status
from rdmaload.connectors.objects import KEPT, ObjectConnector
from rdmaload.connectors.retries import Refused, Retries, retry_after_seconds
from rdmaload.connectors.s3_access import S3Access
from rdmaload.connectors.s3_errors import meaning_of
from rdmaload.connectors.s3_upload import S3Upload, crc_text
from rdmaload.connectors.store_digests import FileDigest, digest_of_text
from rdmaload.errors import (
    FormatError,
    IntegrityError,
    NotFoundError,
    NotSupportedError,
    RdmaloadError,
    UnavailableError,
    UrlError,
)
from rdmaload.options import Options
from rdmaload.threads import map_in_threads
from rdmaload.urls import Url

__all__ = ["S3Connector"]

_log = logging.getLogger("rdmaload")

_Result = TypeVar("_Result")

_DIGEST_FIELDS = {"crc32c": "ChecksumCRC32C", "crc32": "ChecksumCRC32", "crc64nvme": "ChecksumCRC64NVME"}

_NEXT_PAGE = {
    "ContinuationToken": "NextContinuationToken",
    "KeyMarker": "NextKeyMarker",
    "UploadIdMarker": "NextUploadIdMarker",
}
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)
_MAX_SMALL_BYTES = 64 * 2**20  # read whole by read_small(): a manifest or an index


class S3Connector(ObjectConnector):
    """A model in a bucket: `s3://bucket/prefix`.

    >>> from rdmaload.urls import parse_url
    >>> with S3Connector(parse_url("s3://bucket/llama?endpoint_url=http://127.0.0.1:9000")) as connector:
    ...     connector
    <S3Connector s3://bucket/llama?endpoint_url=http://127.0.0.1:9000 open>
    """

    store_options = frozenset()
    default_options: ClassVar[Mapping[str, object]] = {"connections": 16, "threads": 4}

    def __init__(self, url: Url, options: Options | None = None) -> None:
        super().__init__(url, options)
        if self.options.server_name is not None:
            raise NotSupportedError(
                f"{self.url}: botocore takes no server_name; write a name that the store's certificate holds into "
                "endpoint_url=",
                url=self.url,
            )
        if (self.options.username is None) != (self._password is None):
            raise UrlError(f"{self.url}: username (access key id) and password (secret key) go together", url=self.url)
        self._retries = Retries(self.options, count=self._count_retries)
        self._access = S3Access(
            self._bucket,
            self.options,
            self._password,
            url=self.url,
            connections=self.connections,
            tried=self._tried,
        )

    def close(self) -> None:
        """Give connections back and end pauses. Idempotent."""
        super().close()
        self._retries.close()
        self._access.close()

    def _client(self) -> Any:
        self._check_open()
        with self._translated("connect to"):
            return self._access.client()

    # ---- reading ----

    def native_transport(self) -> object | None:
        self._client()
        from rdmaload import _core

        options = self.options
        transport: object = _core.HttpTransport(
            self._address,
            connections=self.connections,
            connect_timeout=options.connect_timeout,
            inactivity_timeout=options.inactivity_timeout,
            stall_timeout=options.stall_timeout,
            tls=self._access.tls,
            name=self.url,
        )
        return transport

    def _address(self, path: str, refused: bool) -> tuple[str, list[tuple[str, str]], str, str, str, float | None]:
        """Where the native transport finds a file; `refused` needs nothing more: every url is signed anew."""
        key = self._key(path)
        with self._translated("sign a url for", path):
            found = self._access.signed_url(key)
        return found.url, [], self._etags.get(path, ""), found.proxy, found.proxy_authorization, found.seconds

    def list_files(self) -> list[FileInfo]:
        found: list[FileInfo] = []
        for page in self._pages("list_objects_v2", "list", Prefix=self._prefix):
            for entry in page.get("Contents", ()):
                key, size = entry.get("Key"), entry.get("Size", -1)
                if key is None or size < 0:
                    raise FormatError(f"{self.url}: the store lists {key or 'an object'} without a size", url=self.url)
                path = key[len(self._prefix) :]
                # An empty object whose name ends with a slash is what consoles show as a folder.
                if not path or path.endswith("/") or is_hidden(path):
                    continue
                self._check(path)
                found.append(FileInfo(path, size, _quoted(entry.get("ETag"))))
        if not found:
            raise NotFoundError(f"there are no objects at {self.url}: check bucket and prefix", url=self.url)
        return sorted(found, key=lambda info: info.path)

    def digests(self, paths: Sequence[str]) -> dict[str, FileDigest]:
        self._client()
        found = map_in_threads(self._digest, paths, self.connections, name="rdmaload-head")
        return {path: digest for path, digest in zip(paths, found, strict=True) if digest is not None}

    def _digest(self, path: str) -> FileDigest | None:
        asked = {"Bucket": self._bucket, "Key": self._key(path), "ChecksumMode": "ENABLED"}
        if path in self._etags:
            asked["IfMatch"] = self._etags[path]
        client = self._client()
        try:
            answer = self._tried("look at", path, lambda: client.head_object(**asked))
        except IntegrityError:
            raise  # replaced since it was listed
        except RdmaloadError as err:  # it may be read and not be looked at: unverified is how it was before
            _log.info("%s", err)
            return None
        # Stores that do not say the type have no checksums of parts, or have an ETag that shows parts.
        kind = answer.get("ChecksumType") or ("" if "-" in answer.get("ETag", "-") else "FULL_OBJECT")
        for name, field in _DIGEST_FIELDS.items():
            if kind == "FULL_OBJECT" and answer.get(field):
                return digest_of_text(name, answer[field])
        return None

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        key = self._key(path)
        client = self._client()
        view = buffer.cast("B")
        if len(view) == 0:
            return 0
        asked: dict[str, object] = {"Bucket": self._bucket, "Key": key}
        asked["Range"] = f"bytes={offset}-{offset + len(view) - 1}"
        if path in self._etags:
            asked["IfMatch"] = self._etags[path]

        def read() -> int:
            from botocore.exceptions import ClientError

            try:
                answer = client.get_object(**asked)
            except ClientError as err:
                if err.response.get("Error", {}).get("Code") in ("InvalidRange", "416"):
                    return 0  # it begins behind the end
                raise
            with contextlib.closing(answer["Body"]) as body:
                self._check_answer(path, answer, offset, len(view))
                done = 0
                while done < len(view):
                    got = body.readinto(view[done:])
                    if not got:
                        break
                    done += got
                return done

        return self._tried("read", path, read)

    def _check_answer(self, path: str, answer: Mapping[str, Any], offset: int, count: int) -> None:
        """Refuse an answer that has other bytes than those asked for, or those of another version."""
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        if status not in (200, 206):  # botocore takes every 2xx for an object
            kind, hint = meaning_of_status(status)
            raise kind(f"{path} in {self.url}: the store answered {status}: {hint}", url=self.url, key=path)
        pinned, etag = self._etags.get(path), answer.get("ETag")
        if pinned and etag and _quoted(etag) != pinned:
            raise IntegrityError(
                f"{path} in {self.url} was replaced (its ETag is {etag}, not {pinned}): open the model again",
                url=self.url,
                key=path,
            )
        found = _CONTENT_RANGE.fullmatch(answer.get("ContentRange") or "")
        if found is not None:
            first, last = int(found[1]), int(found[2])
            if (
                first == offset
                and first <= last < offset + count
                and (last == offset + count - 1 or found[3] in ("*", str(last + 1)))
            ):
                return
            raise FormatError(
                f"{path} in {self.url}: asked for bytes {offset}-{offset + count - 1}, the store sends {first}-{last}",
                url=self.url,
                key=path,
            )
        if offset == 0 and answer.get("ContentLength", count + 1) <= count:
            return  # all there is, and no more than that was asked for
        raise NotSupportedError(
            f"{path} in {self.url}: asked for bytes {offset}-{offset + count - 1}, the store sends the whole object: "
            "it does not support ranges",
            url=self.url,
            key=path,
        )

    def read_small(self, path: str) -> bytes | None:
        key = self._key(path)
        client = self._client()

        def read() -> bytes:
            body = client.get_object(Bucket=self._bucket, Key=key)["Body"]
            with contextlib.closing(body):
                data: bytes = body.read(_MAX_SMALL_BYTES + 1)
            if len(data) > _MAX_SMALL_BYTES:
                raise FormatError(
                    f"{path} in {self.url} has more than {_MAX_SMALL_BYTES} bytes", url=self.url, key=path
                )
            return data

        try:
            return self._tried("read", path, read)
        except NotFoundError:
            return None

    # ---- writing ----

    def put(self, path: str, data: bytes | bytearray) -> str:
        key = self._key(path)
        client = self._client()
        crc = crc_text(crc32c(data))

        def put() -> str:
            stored = client.put_object(Bucket=self._bucket, Key=key, Body=data, ChecksumCRC32C=crc)
            return str(stored["ETag"])

        return self._tried("write", path, put)

    def begin_upload(self, path: str) -> S3Upload:
        place = {"Bucket": self._bucket, "Key": self._key(path)}
        client = self._client()

        def begin() -> str:
            begun = client.create_multipart_upload(**place, ChecksumAlgorithm="CRC32C")
            return str(begun["UploadId"])

        return S3Upload(client, self._tried, path, {**place, "UploadId": self._tried("write", path, begin)}, {})

    def resume_upload(self, path: str, token: str) -> S3Upload | None:
        place = {"Bucket": self._bucket, "Key": self._key(path), "UploadId": token}
        client = self._client()
        stored: dict[int, Mapping[str, Any]] = {}
        asked: dict[str, Any] = dict(place)
        try:
            while True:
                page = self._tried("look at the parts of", path, partial(client.list_parts, **asked))
                stored |= {part["PartNumber"]: part for part in page.get("Parts", ())}
                if not page.get("IsTruncated"):
                    return S3Upload(client, self._tried, path, place, stored)
                asked["PartNumberMarker"] = page["NextPartNumberMarker"]
        except RdmaloadError as err:  # ended, pruned, or we may not look: from the start
            _log.info("%s", err)
            return None

    def delete(self, path: str) -> bool:
        key = self._key(path)
        client = self._client()
        place = {"Bucket": self._bucket, "Key": key}
        try:
            # S3 does not say whether there was one; asked before, as the answer to a first try may be lost.
            self._tried("remove", path, partial(client.head_object, **place))
        except NotFoundError:
            return False
        with contextlib.suppress(NotFoundError):
            self._tried("remove", path, partial(client.delete_object, **place))
        return True

    def list_kept(self) -> list[tuple[str, float]]:
        found: list[tuple[str, float]] = []
        for page in self._pages("list_objects_v2", "list", Prefix=f"{self._prefix}{KEPT}"):
            for entry in page.get("Contents", ()):
                found.append((entry["Key"][len(self._prefix) :], entry["LastModified"].timestamp()))
        return found

    def abort_uploads(self, older_than: float) -> int:
        client = self._client()
        count = 0
        try:
            pages = list(self._pages("list_multipart_uploads", "list unfinished uploads of", Prefix=self._prefix))
        except (NotFoundError, NotSupportedError) as err:  # rclone's says so where there are none; others know no list
            _log.info("%s: no unfinished uploads are removed: %s", self.url, err)
            return 0
        for page in pages:
            for entry in page.get("Uploads", ()):
                path = entry["Key"][len(self._prefix) :]
                # Deeper keys may be another model's, or nobody's of ours.
                if "/" not in path and self._prefix and entry["Initiated"].timestamp() < older_than:
                    place = {"Bucket": self._bucket, "Key": entry["Key"], "UploadId": entry["UploadId"]}
                    self._tried("end an upload of", path, partial(client.abort_multipart_upload, **place))
                    count += 1
        return count

    # ---- names and errors ----

    def _tried(self, verb: str, path: str | None, work: Callable[[], _Result]) -> _Result:
        """`work` with our errors, again while the store is away or busy, for `retry_timeout` at most."""

        def translated() -> _Result:
            from botocore.exceptions import ClientError

            try:
                with self._translated(verb, path):
                    return work()
            except UnavailableError as error:
                if isinstance(error.__cause__, ClientError):  # it did answer
                    headers = error.__cause__.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
                    raise Refused(error, retry_after_seconds(headers.get("retry-after", ""))) from error
                raise

        return self._retries.tried(translated)

    def _pages(self, operation: str, verb: str, **asked: object) -> Iterator[Mapping[str, Any]]:
        """The answers of a listing, each tried again by itself."""
        call = getattr(self._client(), operation)
        asked["Bucket"] = self._bucket

        def ask() -> Mapping[str, Any]:
            from botocore.exceptions import BotoCoreError

            try:
                page: Mapping[str, Any] = call(**asked)
            except ValueError as err:
                if isinstance(err, (BotoCoreError, RdmaloadError)):
                    raise
                raise FormatError(
                    f"{self.url}: the store lists what is no number or date: {err}", url=self.url
                ) from err
            return page

        while True:
            page = self._tried(verb, None, ask)
            yield page
            if not page.get("IsTruncated"):
                return
            more = {name: page[given] for name, given in _NEXT_PAGE.items() if given in page}
            if not more:
                raise FormatError(f"{self.url}: the store lists a part and does not say how to go on", url=self.url)
            if more.items() <= asked.items():
                raise FormatError(f"{self.url}: the store lists the same part again and again", url=self.url)
            asked |= more

    def _meaning(self, err: Exception, verb: str, path: str | None) -> RdmaloadError:
        return meaning_of(err, verb, path, self.url)


def _quoted(etag: str | None) -> str | None:
    """An ETag as headers have it; some stores list it without its quotes."""
    return f'"{etag}"' if etag and not etag.endswith('"') else etag

"""S3 and the stores that speak like it: `s3://bucket/prefix`; a model's files are the objects below the prefix.

boto3 does what it is best at: credentials (environment, profiles, SSO, roles, and their refresh), endpoints, regions,
addressing, listing and small calls. Weights go through the native transport, which asks by presigned urls: only the
host is signed, so that one url serves every range of an object, and a new one is signed before it expires.
"""

from __future__ import annotations

import base64
import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from rdmaload._core import crc32c
from rdmaload.connectors.connector import FileInfo
from rdmaload.connectors.objects import ObjectConnector
from rdmaload.connectors.proxies import split_proxy
from rdmaload.connectors.tls import check_tls_options, native_context
from rdmaload.errors import (
    AuthenticationError,
    FormatError,
    IntegrityError,
    LoadTimeoutError,
    NotFoundError,
    NotSupportedError,
    RdmaloadError,
    UnavailableError,
    UrlError,
)
from rdmaload.index import check_path
from rdmaload.options import Options
from rdmaload.urls import Url

if TYPE_CHECKING:
    from rdmaload._core import TlsContext

__all__ = ["S3Connector"]

_Result = TypeVar("_Result")

# A url is good for an hour and signed anew five minutes earlier: a read that waits in a queue still has one that works.
_URL_SECONDS = 3600
_URL_MARGIN_SECONDS = 300

_KEPT = ".rdmaload/"
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)
_ATTEMPTS = 3  # of botocore's, each of which tries a request several times
_MAX_SMALL_BYTES = 64 * 2**20  # read whole by read_small(): a manifest or an index

_NOT_FOUND = frozenset({"404", "NoSuchKey", "NoSuchBucket", "NotFound", "NoSuchVersion"})
_REFUSED = frozenset(
    {
        "403",
        "401",
        "AccessDenied",
        "AllAccessDisabled",
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "Forbidden",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestExpired",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)
_CREDENTIALS = (
    "NoCredentials",
    "PartialCredentials",
    "CredentialRetrieval",
    "SSO",
    "Token",
    "UnauthorizedSSO",
    "Login",
)


class S3Connector(ObjectConnector):
    """A model in a bucket: `s3://bucket/prefix`.

    >>> from rdmaload.urls import parse_url
    >>> with S3Connector(parse_url("s3://bucket/llama?endpoint_url=http://127.0.0.1:9000")) as connector:
    ...     connector
    <S3Connector s3://bucket/llama?endpoint_url=http://127.0.0.1:9000 open>
    """

    default_options: ClassVar[Mapping[str, object]] = {"connections": 16, "threads": 4}
    pins_versions = True

    def __init__(self, url: Url, options: Options | None = None) -> None:
        super().__init__(url, options)
        if not url.host:
            raise UrlError(f"{self.url} names no bucket; write s3://BUCKET/PREFIX", url=self.url)
        self._bucket = url.host
        self._prefix = f"{url.model}/" if url.model else ""
        endpoint = self.options.endpoint_url or ""
        check_tls_options(
            self.options, url=self.url, tls=not endpoint.startswith("http://"), write="endpoint_url=https://..."
        )
        self._password = self.options.read_password(url=self.url)
        if (self.options.username is None) != (self._password is None):
            raise UrlError(f"{self.url}: username (access key id) and password (secret key) go together", url=self.url)
        self._lock = threading.Lock()
        self._made: Any = None  # Guarded by _lock; boto3 has no types.
        self._proxies: Mapping[str, str] = {}
        self._tls: TlsContext | None = None
        self._etags: Mapping[str, str] = {}

    def close(self) -> None:
        """Give connections back. Idempotent."""
        super().close()
        with self._lock:
            client, self._made = self._made, None
        if client is not None:
            client.close()

    # ---- the client ----

    def _client(self) -> Any:
        self._check_open()
        with self._lock:
            if self._made is None:
                with self._translated("connect to"):
                    self._made = self._new_client()
            return self._made

    def _note_retries(self, parsed: Any, **_: object) -> None:
        self._count_retries(int(parsed.get("ResponseMetadata", {}).get("RetryAttempts", 0)))

    def _new_client(self) -> Any:
        import boto3
        import botocore
        from botocore.config import Config
        from botocore.utils import get_environ_proxies

        options = self.options
        session = boto3.Session(
            aws_access_key_id=options.username,
            aws_secret_access_key=self._password,
            profile_name=options.profile,
            region_name=options.region,
        )
        ca_file = options.ca_file or session._session.get_config_variable("ca_bundle")
        certificate = options.client_cert_file
        config = Config(
            signature_version=botocore.UNSIGNED if options.unsigned else "s3v4",
            s3={"addressing_style": options.addressing_style},
            connect_timeout=options.connect_timeout,
            read_timeout=options.inactivity_timeout,
            retries={"mode": "standard", "total_max_attempts": 6},
            max_pool_connections=max(10, options.threads, self.connections),
            client_cert=(certificate, options.client_key_file) if options.client_key_file else certificate,
            # Ours are of every chunk; botocore's own would cost a second pass over all bytes.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        verify = (ca_file or None) if options.verify_tls else False

        def client_in(region: str) -> Any:
            return session.client(
                "s3", region_name=region, endpoint_url=options.endpoint_url, config=config, verify=verify
            )

        client = client_in(session.region_name or "us-east-1")
        if options.region is None and session.region_name is None and options.endpoint_url is None:
            client = self._in_region_of_bucket(client, client_in)
        client.meta.events.register("after-call.s3", self._note_retries)
        self._proxies = get_environ_proxies(client.meta.endpoint_url) or {}
        with contextlib.suppress(NotSupportedError):  # without OpenSSL, http:// works all the same
            self._tls = native_context(
                options if options.ca_file or not ca_file else _with_ca(options, ca_file), url=self.url
            )
        return client

    def _in_region_of_bucket(self, client: Any, client_in: Callable[[str], Any]) -> Any:
        """A url that is signed for another region than the bucket's is refused: ask where it is."""
        from botocore.exceptions import ClientError

        try:
            answer = client.head_bucket(Bucket=self._bucket)
        except ClientError as err:  # a refusal says it too
            answer = err.response
        region = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
        if region in (None, client.meta.region_name):
            return client
        client.close()
        return client_in(region)

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
            tls=self._tls,
            name=self.url,
        )
        return transport

    def _address(self, path: str, refused: bool) -> tuple[str, list[tuple[str, str]], str, str, str, float | None]:
        """Where the native transport finds a file; `refused` needs nothing more: every url is signed anew."""
        client = self._client()
        with self._translated("sign a url for", path):
            url = client.generate_presigned_url(
                "get_object", Params={"Bucket": self._bucket, "Key": self._key(path)}, ExpiresIn=_URL_SECONDS
            )
        proxy, authorization = split_proxy(self._proxies.get(urlsplit(url).scheme, ""))
        seconds = None if self.options.unsigned else float(_URL_SECONDS - _URL_MARGIN_SECONDS)
        return url, [], self._etags.get(path, ""), proxy, authorization, seconds

    def pin(self, etags: Mapping[str, str]) -> None:
        self._etags = dict(etags)

    def list_files(self) -> list[FileInfo]:
        client = self._client()
        found: list[FileInfo] = []
        with self._translated("list"):
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
            for page in pages:
                for entry in page.get("Contents", ()):
                    path = entry["Key"][len(self._prefix) :]
                    # An empty object whose name ends with a slash is what consoles show as a folder.
                    if not path or path.endswith("/") or _is_hidden(path):
                        continue
                    self._check(path)
                    found.append(FileInfo(path, entry["Size"], _quoted(entry.get("ETag"))))
        if not found:
            raise NotFoundError(f"there are no objects at {self.url}: check bucket and prefix", url=self.url)
        return sorted(found, key=lambda info: info.path)

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
        crc = _crc_text(crc32c(data))

        def put() -> str:
            stored = client.put_object(Bucket=self._bucket, Key=key, Body=data, ChecksumCRC32C=crc)
            return str(stored["ETag"])

        return self._tried("write", path, put)

    def begin_upload(self, path: str) -> _Upload:
        key = self._key(path)
        client = self._client()

        def begin() -> str:
            begun = client.create_multipart_upload(Bucket=self._bucket, Key=key, ChecksumAlgorithm="CRC32C")
            return str(begun["UploadId"])

        return _Upload(self, client, path, {"Bucket": self._bucket, "Key": key}, self._tried("write", path, begin))

    def delete(self, path: str) -> bool:
        key = self._key(path)
        client = self._client()

        def delete() -> bool:
            # S3 does not say whether there was one.
            client.head_object(Bucket=self._bucket, Key=key)
            client.delete_object(Bucket=self._bucket, Key=key)
            return True

        try:
            return self._tried("remove", path, delete)
        except NotFoundError:
            return False

    def list_kept(self) -> list[tuple[str, float]]:
        client = self._client()
        found: list[tuple[str, float]] = []
        with self._translated("list"):
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=f"{self._prefix}{_KEPT}"
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    found.append((entry["Key"][len(self._prefix) :], entry["LastModified"].timestamp()))
        return found

    def abort_uploads(self, older_than: float) -> int:
        client = self._client()
        count = 0
        with self._translated("list unfinished uploads of"):
            pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=self._prefix)
            for page in pages:
                for entry in page.get("Uploads", ()):
                    path = entry["Key"][len(self._prefix) :]
                    # Deeper keys may be another model's, or nobody's of ours.
                    if "/" not in path and self._prefix and entry["Initiated"].timestamp() < older_than:
                        client.abort_multipart_upload(Bucket=self._bucket, Key=entry["Key"], UploadId=entry["UploadId"])
                        count += 1
        return count

    # ---- names and errors ----

    def _key(self, path: str) -> str:
        self._check_open()
        self._check(path)
        return self._prefix + path

    def _check(self, path: str) -> None:
        try:
            check_path(path)
        except FormatError as err:
            raise FormatError(
                f"an object at {self.url} cannot be part of a model: {err}", url=self.url, key=path
            ) from err

    def _tried(self, verb: str, path: str, work: Callable[[], _Result]) -> _Result:
        """`work` with our errors; botocore tries requests again, and here bodies that were cut."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with self._translated(verb, path):
                    return work()
            except (UnavailableError, LoadTimeoutError):
                if attempt == _ATTEMPTS or self._closed:
                    raise
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def _translated(self, verb: str, path: str | None = None) -> Iterator[None]:
        try:
            yield
        except (RdmaloadError, AssertionError, NotImplementedError):
            raise
        except Exception as err:
            raise self._meaning(err, verb, path) from err

    def _meaning(self, err: Exception, verb: str, path: str | None) -> RdmaloadError:
        from botocore import exceptions as theirs

        place = f"{path} in {self.url}" if path else self.url
        kind: type[RdmaloadError] = UnavailableError
        name, hint = type(err).__name__, ""
        text = str(err)
        if isinstance(err, theirs.ClientError):
            error = err.response.get("Error", {})
            status = err.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            kind, hint = _meaning_of_code(str(error.get("Code", "")), int(status))
            text = f"{error.get('Code', status)}: {error.get('Message') or 'no further word'}"
        elif name.startswith(_CREDENTIALS) or isinstance(err, (theirs.ProfileNotFound, theirs.ConfigParseError)):
            kind = AuthenticationError
            hint = "set up credentials as for the aws command, or give unsigned=true for a public bucket"
        elif isinstance(err, (theirs.ParamValidationError, ValueError)):
            kind, hint = UrlError, "correct the url or its endpoint_url"
        elif isinstance(err, (theirs.ReadTimeoutError, theirs.ConnectTimeoutError)) or "Timeout" in name:
            kind = LoadTimeoutError
        message = f"cannot {verb} {place}: {text}" + (f". {hint[0].upper()}{hint[1:]}" if hint else "")
        return kind(message, url=self.url, key=path)


def _meaning_of_code(code: str, status: int) -> tuple[type[RdmaloadError], str]:
    if code in _NOT_FOUND:
        return NotFoundError, "check bucket and prefix" if code == "NoSuchBucket" else ""
    if code in _REFUSED:
        return AuthenticationError, "check the credentials and what they may do"
    if code in ("PreconditionFailed", "412"):
        return IntegrityError, "it was replaced after the model was opened: open it again"
    if code in ("PermanentRedirect", "301", "IllegalLocationConstraintException"):
        return UrlError, "the bucket is in another region: give region="
    if code in ("NotImplemented", "MethodNotAllowed", "501", "405"):
        return NotSupportedError, ""
    if status >= 500 or code in ("SlowDown", "RequestTimeout", "Throttling", "429"):
        return UnavailableError, ""
    return RdmaloadError, ""


class _Upload:
    """One multipart upload. Any thread may send parts; they may come in any order."""

    def __init__(
        self, connector: S3Connector, client: Any, path: str, place: Mapping[str, str], upload_id: str
    ) -> None:
        self._connector = connector
        self._client = client
        self._path = path
        self._place = {**place, "UploadId": upload_id}
        self._lock = threading.Lock()
        self._parts: dict[int, dict[str, object]] = {}  # Guarded by _lock.

    def send(self, number: int, data: bytes | bytearray) -> None:
        crc = _crc_text(crc32c(data))

        def send() -> str:
            sent = self._client.upload_part(**self._place, PartNumber=number, Body=data, ChecksumCRC32C=crc)
            return str(sent["ETag"])

        etag = self._connector._tried("write", self._path, send)
        with self._lock:
            self._parts[number] = {"PartNumber": number, "ETag": etag, "ChecksumCRC32C": crc}

    def finish(self) -> str:
        with self._lock:
            parts = [self._parts[number] for number in sorted(self._parts)]

        def finish() -> str:
            self._client.complete_multipart_upload(**self._place, MultipartUpload={"Parts": parts})
            # Not what the call above says: some stores (rclone's) give the object another tag afterwards.
            place = {name: self._place[name] for name in ("Bucket", "Key")}
            return str(self._client.head_object(**place)["ETag"])

        return self._connector._tried("write", self._path, finish)

    def interrupt(self) -> None:
        pass  # parts go in any order

    def abort(self) -> None:
        # Parts of an upload that nobody ends are paid for until they are removed.
        with contextlib.suppress(Exception):
            self._client.abort_multipart_upload(**self._place)


def _crc_text(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def _quoted(etag: str | None) -> str | None:
    """An ETag as headers have it; some stores list it without its quotes."""
    return f'"{etag}"' if etag and not etag.endswith('"') else etag


def _is_hidden(path: str) -> bool:
    """In a directory whose name begins with a dot, as tools keep beside a model (and we our manifest)."""
    return any(part.startswith(".") for part in path.split("/")[:-1])


def _with_ca(options: Options, ca_file: str) -> Options:
    return replace(options, ca_file=ca_file)

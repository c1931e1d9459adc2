"""How a bucket is reached: the client for small calls, in the bucket's region, and signed urls for the weights.

A bucket is called by its name, by the ARN of an access point, or is a directory bucket (S3 Express One Zone), whose
requests are signed by sessions of five minutes that botocore begins and renews.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rdmaload.connectors.http_client import shown_url
from rdmaload.connectors.proxies import split_proxy
from rdmaload.connectors.s3_client import S3Clients
from rdmaload.connectors.s3_upload import Tried
from rdmaload.errors import NotSupportedError, UrlError
from rdmaload.options import Options

if TYPE_CHECKING:
    from rdmaload._core import TlsContext

__all__ = ["S3Access", "SignedUrl"]

# A url is good for an hour and signed anew five minutes earlier: a read that waits in a queue still has one that works.
_URL_SECONDS = 3600
_URL_MARGIN_SECONDS = 300
# botocore renews a session in its last 45 seconds: a url that is signed before has at least so many left.
_SESSION_URL_SECONDS = 30

# Redirects, and the refusal of a signature for another region; others may name a region and mean something else.
_ELSEWHERE = frozenset({301, 302, 307, 308, 400})
_REGION = re.compile(r"[a-z0-9-]{1,40}", re.ASCII)
_ACCESS_POINT = re.compile(r"arn:[^:]+:s3:([^:]+):[^:]+:accesspoint[:/].+")


@dataclass(frozen=True)
class SignedUrl:
    """Where an object can be read, by which proxy ("" for none), and for how many seconds; None for ever."""

    url: str
    proxy: str
    proxy_authorization: str
    seconds: float | None


class S3Access:
    """One bucket as the options reach it. Any thread may use it; `url` is what messages show."""

    def __init__(
        self, bucket: str, options: Options, password: str | None, *, url: str, connections: int, tried: Tried
    ) -> None:
        self._bucket = bucket
        self._options = options
        self._password = password
        self._url = url
        self._connections = connections
        self._tried = tried
        self._is_directory = bucket.endswith("--x-s3")
        self._lock = threading.Lock()
        self._clients: S3Clients | None = None  # Guarded by _lock, as is the next; botocore has no types.
        self._client: Any = None
        self._left: list[Any] = []  # Guarded by _lock; clients that others may still use.
        self._told_region: str | None = None
        self._proxies: Mapping[str, str] = {}
        self.tls: TlsContext | Callable[[], TlsContext] | None = None
        """For the weights: made with the client, or, where the store speaks none, when it sends them on to https."""
        self._arn_region: str | None = None
        if bucket.startswith("arn:"):
            self._arn_region = self._region_of_access_point()

    def _region_of_access_point(self) -> str:
        found = _ACCESS_POINT.fullmatch(self._bucket)
        if found is None:
            raise NotSupportedError(
                f"{self._url}: of the names that begin with arn:, those of access points in one region are supported "
                "(s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME/PREFIX); give the bucket's own name",
                url=self._url,
            )
        return found[1]

    def close(self) -> None:
        """Give connections back. Idempotent."""
        with self._lock:
            made, self._left, self._client = [*self._left, self._client], [], None
        for client in made:
            if client is not None:
                client.close()

    def client(self) -> Any:
        """The client, made by the first call, and again when the store has said that the bucket is elsewhere."""
        with self._lock:
            if self._client is None:
                self._client = self._new_client()
            elif self._told_region not in (None, self._client.meta.region_name):
                assert self._clients is not None
                self._left.append(self._client)
                self._client = self._in_region(self._clients, str(self._told_region))
                self._proxies = self._proxies_for(self._client)
            return self._client

    def signed_url(self, key: str) -> SignedUrl:
        """A url of an object that serves every range of it: only the host is signed with it."""
        client = self.client()
        seconds = _SESSION_URL_SECONDS if self._is_directory else _URL_SECONDS - _URL_MARGIN_SECONDS
        url = client.generate_presigned_url(
            "get_object", Params={"Bucket": self._bucket, "Key": key}, ExpiresIn=_URL_SECONDS
        )
        proxy, authorization = split_proxy(self._proxies.get(urlsplit(url).scheme, ""))
        return SignedUrl(url, proxy, authorization, None if self._options.unsigned else float(seconds))

    def _new_client(self) -> Any:
        options = self._options
        clients = self._clients = S3Clients(
            options, self._password, url=self._url, connections=self._connections, sessions=self._is_directory
        )
        with ThreadPoolExecutor(1, "rdmaload-tls") as pool:
            # OpenSSL reads the system's authorities while botocore, which holds the GIL, reads its own data.
            tls = None
            if not (options.endpoint_url or "").startswith("http://"):
                tls = pool.submit(clients.native_tls)
            client = self._in_region(clients, self._arn_region or clients.region or "us-east-1")
            self._proxies = self._proxies_for(client)
            self.tls = clients.native_tls
            with contextlib.suppress(NotSupportedError):  # without OpenSSL, http:// works all the same
                self.tls = clients.native_tls if tls is None else tls.result()  # first: what is wrong says more
            if self._is_directory:
                self._check_zone_has_region(clients)
            elif options.region is None and options.endpoint_url is None and self._arn_region is None:
                client = self._in_region_of_bucket(client, clients)
                self._proxies = self._proxies_for(client)  # NO_PROXY may name one region's hosts
        return client

    def _proxies_for(self, client: Any) -> dict[str, str]:
        """The environment's for where the client goes, refused here before botocore uses what we cannot."""
        from botocore.utils import get_environ_proxies

        endpoint = client.meta.endpoint_url
        proxies: dict[str, str] = get_environ_proxies(endpoint) or {}
        split_proxy(proxies.get(urlsplit(endpoint).scheme, ""))
        return proxies

    def _in_region(self, clients: S3Clients, region: str) -> Any:
        client = clients.in_region(region)
        encrypted = not client.meta.endpoint_url.startswith("http://")

        def hear(parsed_response: Mapping[str, Any] | None, **_: object) -> None:
            if parsed_response is not None:
                self._hear(parsed_response, region, encrypted=encrypted)

        client.meta.events.register("response-received.s3", hear)
        return client

    def _in_region_of_bucket(self, client: Any, clients: S3Clients) -> Any:
        """A url that is signed for another region than the bucket's is refused: ask where it is.

        A region that environment or profile name is a default for many buckets, so it may be another one, too.
        """
        from botocore.exceptions import ClientError

        def ask() -> Mapping[str, Any]:
            try:
                found: Mapping[str, Any] = client.head_bucket(Bucket=self._bucket)
            except ClientError as err:  # a refusal says it too
                if err.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500:
                    raise
                found = err.response
            return found

        region = _headers(self._tried("look for", None, ask)).get("x-amz-bucket-region")
        if region in (None, client.meta.region_name):
            return client
        client.close()
        return self._in_region(clients, region)

    def _check_zone_has_region(self, clients: S3Clients) -> None:
        """The name of a directory bucket says its zone, from which its region cannot be told."""
        if clients.region is None and self._options.endpoint_url is None:
            raise UrlError(
                f"{self._url}: {self._bucket} is a directory bucket (S3 Express One Zone), which is found only in its "
                "own region: give region=",
                url=self._url,
            )

    def _hear(self, answer: Mapping[str, Any], region: str, *, encrypted: bool) -> None:
        """What a refusal says of where the bucket is.

        botocore asks there by itself, but signs urls for where we said. A region that was given is not replaced by
        another without a word; one that was a default is.
        """
        if answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) not in _ELSEWHERE:
            return
        location = str(_headers(answer).get("location", ""))
        if not encrypted and location.startswith("https://"):
            raise UrlError(
                f"{self._url}: the store answers http:// with a redirect to {shown_url(location)}: write https:// in "
                "endpoint_url=",
                url=self._url,
            )
        told = _headers(answer).get("x-amz-bucket-region") or answer.get("Error", {}).get("Region")
        if told in (None, region) or not _REGION.fullmatch(str(told)) or self._arn_region is not None:
            return
        if self._options.region is not None:
            raise UrlError(
                f"{self._url}: {self._bucket} is in the region {told}, not in {region}: give region={told}, or none",
                url=self._url,
            )
        self._told_region = str(told)


def _headers(answer: Mapping[str, Any]) -> Mapping[str, str]:
    found: Mapping[str, str] = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return found

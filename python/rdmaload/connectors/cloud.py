"""Google Cloud Storage and Azure Blob Storage: `gs://bucket/prefix`, `az://container/prefix`.

What each of them has of its own: how obstore is told of it, the urls that need none of obstore's signatures (public
buckets, tokens, SAS), and, of Google, the CRC32C that it keeps of every object.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import logging
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

from rdmaload.connectors.http_client import Headers, HttpClient
from rdmaload.connectors.obstore import GOOD_SECONDS, URL_SECONDS, ObstoreConnector
from rdmaload.connectors.store_digests import FileDigest, digest_of_headers
from rdmaload.errors import RdmaloadError
from rdmaload.threads import map_in_threads

__all__ = ["AzureConnector", "GcsConnector"]

_log = logging.getLogger("rdmaload")


class GcsConnector(ObstoreConnector):
    """A model in Google Cloud Storage: `gs://bucket/prefix`.

    >>> from rdmaload.urls import parse_url
    >>> with GcsConnector(parse_url("gs://bucket/llama?unsigned=true")) as connector:
    ...     connector
    <GcsConnector gs://bucket/llama?unsigned=true open>
    """

    store_options = frozenset({"storage_options"})
    extra = "gcs"
    place_name = "bucket"

    def _new_store(self, config: dict[str, Any], **more: object) -> Any:
        from obstore.store import GCSStore

        if self.options.endpoint_url is not None:
            config.setdefault("base_url", self.options.endpoint_url.rstrip("/"))
        if self.options.unsigned:
            config["skip_signature"] = True
        if self._password is not None:
            config.setdefault("bearer_token", self._password)
        return GCSStore(self._bucket, config=config, **more)

    def _own_address(self, key: str) -> tuple[str, Headers, float | None] | None:
        config: Mapping[str, Any] = self._store().config  # with what the environment says
        token = config.get("bearer_token")
        if not token and str(config.get("skip_signature", "")).lower() not in ("true", "1"):
            return None
        base = str(config.get("base_url") or "https://storage.googleapis.com")
        headers = (("Authorization", f"Bearer {token}"),) if token and not self.options.unsigned else ()
        return f"{base}/{quote(self._bucket)}/{quote(key, safe='/')}", headers, None

    def digests(self, paths: Sequence[str]) -> dict[str, FileDigest]:
        client = HttpClient(self.options, url=self.url, connections=self.connections)
        try:
            found = map_in_threads(
                lambda path: self._digest(client, path), paths, self.connections, name="rdmaload-head"
            )
            return {path: digest for path, digest in zip(paths, found, strict=True) if digest is not None}
        finally:
            client.close()

    def _digest(self, client: HttpClient, path: str) -> FileDigest | None:
        """The CRC32C that the store keeps of every object, of the content that is pinned."""
        etag = self._etags.get(path)
        if etag is None:
            return None

        def ask() -> FileDigest | None:
            url, headers, _ = self._signed(self._key(path), "HEAD")
            with client.request("HEAD", url, (*headers, ("If-Match", etag)), key=path) as response:
                return digest_of_headers(response.header) if response.status == 200 else None

        try:
            return client.tried(ask)
        except RdmaloadError as err:  # reads will say what is wrong, or go another way
            _log.info("%s", err)
            return None

    def _how_to_log_in(self) -> str:
        return "GOOGLE_APPLICATION_CREDENTIALS, password_env=NAME of a token, storage_options"


class AzureConnector(ObstoreConnector):
    """A model in Azure Blob Storage: `az://container/prefix`; the account is `username`, its key the password.

    >>> from rdmaload.urls import parse_url
    >>> with AzureConnector(parse_url("az://container/llama?username=account&unsigned=true")) as connector:
    ...     connector
    <AzureConnector az://container/llama?username=account&unsigned=true open>
    """

    store_options = frozenset({"storage_options"})
    extra = "azure"
    place_name = "container"

    def _new_store(self, config: dict[str, Any], **more: object) -> Any:
        from obstore.store import AzureStore

        if self.options.endpoint_url is not None:
            config.setdefault("endpoint", self.options.endpoint_url.rstrip("/"))
        if self.options.unsigned:
            config["skip_signature"] = True
        if self.options.username is not None:
            config.setdefault("account_name", self.options.username)
        if self._password is not None:
            config.setdefault("account_key", self._password)
        return AzureStore(container_name=self._bucket, config=config, **more)

    def _own_address(self, key: str) -> tuple[str, Headers, float | None] | None:
        config: Mapping[str, Any] = self._store().config  # with what the environment says
        account, secret = str(config.get("account_name") or ""), config.get("account_key")
        base = str(config.get("endpoint") or f"https://{account}.blob.core.windows.net")
        url = f"{base}/{quote(self._bucket)}/{quote(key, safe='/')}"
        if self.options.unsigned or str(config.get("skip_signature", "")).lower() in ("true", "1"):
            return url, (), None
        if config.get("sas_key"):
            return f"{url}?{str(config['sas_key']).lstrip('?')}", (), None
        if not secret:
            return None
        with self._translated("sign a url for", key):
            # obstore would sign the name as it is written in the url, where the service wants it as it is.
            return f"{url}?{_shared_access(account, str(secret), f'{self._bucket}/{key}')}", (), GOOD_SECONDS

    def _how_to_log_in(self) -> str:
        return "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, username= and password_env=, storage_options"


def _shared_access(account: str, secret: str, name: str) -> str:
    """The query that lets its bearer read one blob for an hour (a service SAS).

    https://learn.microsoft.com/rest/api/storageservices/create-service-sas
    """
    end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=URL_SECONDS)
    fields = {"sp": "r", "se": end.strftime("%Y-%m-%dT%H:%M:%SZ"), "sv": "2022-11-02", "sr": "b"}
    # Permissions, start, end, resource, policy, addresses, protocol, version, kind, and seven that we do not use.
    parts = [fields["sp"], "", fields["se"], f"/blob/{account}/{name}", "", "", "", fields["sv"], fields["sr"]]
    text = "\n".join([*parts, *[""] * 7])
    digest = hmac.new(base64.b64decode(secret), text.encode(), hashlib.sha256).digest()
    return urlencode({**fields, "sig": base64.b64encode(digest).decode()})

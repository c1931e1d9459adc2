"""botocore's clients for one store, made at the price of what they are used for.

botocore finds credentials, endpoint, region and addressing; boto3 would add resources and transfers, which nothing here
calls. Each connector has a session of its own, which reads environment and profiles and keeps credentials; what
botocore ships (what S3 is, where its endpoints are: 3 MB of JSON) is read once for all sessions of a process.
"""

from __future__ import annotations

import copy
import functools
import gzip
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.httpsession import get_cert_path
from botocore.loaders import JSONFileLoader, Loader

from rdmaload.connectors.authorities import given_authorities, system_authorities
from rdmaload.connectors.http_client import unwarned_pool
from rdmaload.connectors.tls import native_context
from rdmaload.errors import AuthenticationError
from rdmaload.options import Options

if TYPE_CHECKING:
    from rdmaload._core import TlsContext

__all__ = ["S3Clients"]


# The store and what credentials come from, by the prefix of their endpoints.
_SERVICES = ("s3", "sts", "portal.sso", "oidc", "signin")


class S3Clients:
    """Makes the clients that differ in nothing but their region: the first in 30 ms, the others in 3.

    One thread at a time; the clients themselves may be used by any.
    """

    def __init__(
        self, options: Options, password: str | None, *, url: str, connections: int, sessions: bool = False
    ) -> None:
        """`sessions`: the bucket wants requests signed by a session of its own, not by credentials."""
        self._options = options
        self._url = url
        session = botocore.session.get_session()
        if options.profile is not None:
            session.set_config_variable("profile", options.profile)
        if options.username is not None:
            session.set_credentials(options.username, password)
        if options.region is not None:
            session.set_config_variable("region", options.region)
        if session.get_config_variable("data_path") is None:  # else somebody brings other data
            session.register_component("data_loader", _shipped())
        self._session = session
        self.region: str | None = session.get_config_variable("region")
        """What options, environment or profile say; None when they say nothing."""
        encrypted = not (options.endpoint_url or "").startswith("http://")
        self._ca_file = self._authorities() if options.verify_tls and encrypted else None
        certificate = options.client_cert_file
        self._config = Config(
            signature_version=UNSIGNED if options.unsigned else None if sessions else "s3v4",
            # What is given here counts more than a profile's own.
            s3=None if options.addressing_style == "auto" else {"addressing_style": options.addressing_style},
            connect_timeout=options.connect_timeout,
            read_timeout=options.inactivity_timeout,
            retries={"mode": "standard", "total_max_attempts": 1},  # the connector does it, within retry_timeout
            max_pool_connections=max(10, options.threads, connections),
            client_cert=(certificate, options.client_key_file) if options.client_key_file else certificate,
            # Ours are of every chunk; botocore's own would cost a second pass over all bytes.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )

    def in_region(self, region: str) -> Any:
        """A new client (botocore has no types); the caller closes it."""
        options = self._options
        client = self._session.create_client(
            "s3",
            region_name=region,
            endpoint_url=options.endpoint_url,
            config=self._config,
            verify=self._ca_file if options.verify_tls else False,
        )
        if not options.verify_tls:
            _silence_warnings(client)
        return client

    def _authorities(self) -> str:
        """The file of whom small calls and weights trust.

        Those that are given, else those of botocore's variables, else the system's; where it has none, botocore's own,
        as for the aws command.
        """
        return (
            given_authorities(self._options, url=self._url)
            or self._named_authorities()[1]
            or system_authorities()
            or str(get_cert_path(True))
        )

    def _named_authorities(self) -> tuple[str, str]:
        """The file that environment or profile name, after who names it; empty where nobody does."""
        bundle = self._session.get_config_variable("ca_bundle")
        if bundle:
            return "AWS_CA_BUNDLE" if "AWS_CA_BUNDLE" in os.environ else "the profile's ca_bundle", str(bundle)
        return "REQUESTS_CA_BUNDLE", os.environ.get("REQUESTS_CA_BUNDLE", "")  # which botocore's http library knows

    def native_tls(self) -> TlsContext:
        """The same TLS for the native transport. Raises NotSupportedError where there is no OpenSSL."""
        ca_file = (self._ca_file or self._authorities()) if self._options.verify_tls else None
        try:
            return native_context(replace(self._options, ca_file=ca_file, ca_dir=None), url=self._url)
        except AuthenticationError as err:
            named, path = self._named_authorities()
            if not path or path != ca_file or self._options.ca_file is not None:
                raise
            raise AuthenticationError(str(err).replace(f"ca_file={path}", f"{named}={path}"), url=self._url) from err


def _silence_warnings(client: Any) -> None:
    """No warning of urllib3's with each request: that nothing is verified was asked for, and logged."""
    # botocore offers no way in. Where it has changed, the warnings are back, and nothing else is wrong.
    http_session = getattr(getattr(client, "_endpoint", None), "http_session", None)
    pools = getattr(http_session, "_pool_classes_by_scheme", None)
    if isinstance(pools, dict) and "https" in pools:
        pools["https"] = unwarned_pool(pools["https"])


class _PlainFiles(JSONFileLoader):  # type: ignore[misc]  # botocore has no types
    """Makes dicts where botocore makes OrderedDicts: the same order in half the time, and less to collect."""

    def load_file(self, file_path: str) -> object:
        """What is in the file, whose name is given without its ending; None when there is none."""
        for ending, opened in ((".json", open), (".json.gz", gzip.open)):
            try:
                with opened(file_path + ending, "rb") as file:
                    return json.load(file)
            except (FileNotFoundError, IsADirectoryError):
                continue
        return None


class _Shipped(Loader):  # type: ignore[misc]  # botocore has no types
    """What botocore ships, read once for all sessions of the process. Any thread may use it."""

    def __init__(self) -> None:
        super().__init__(file_loader=_PlainFiles())
        # A model is completed in place after it was read: nobody else may see it before.
        self._lock = threading.RLock()

    def list_available_services(self, type_name: str) -> Sequence[str]:
        """Every service that has a directory. botocore would open all 400 to see which have files of this type."""
        found: set[str] = set()
        for path in filter(os.path.isdir, self.search_paths):
            with os.scandir(path) as entries:
                found.update(entry.name for entry in entries if entry.is_dir())
        return sorted(found)

    def load_service_model(self, service_name: str, type_name: str, api_version: str | None = None) -> Any:
        with self._lock:
            return super().load_service_model(service_name, type_name, api_version)

    def load_data_with_path(self, name: str) -> tuple[Any, str]:
        with self._lock:
            found, path = super().load_data_with_path(name)
        return (_with_own_services(found) if name == "endpoints" else found), path


def _with_own_services(endpoints: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the services that a session makes clients of: into their regions it writes what it has resolved.

    A copy of all would be 20,000 objects, enough to set off a full collection of Python's, which takes longer than all
    the rest.
    """
    partitions = []
    for partition in endpoints["partitions"]:
        services = partition["services"]
        own = {name: copy.deepcopy(services[name]) for name in _SERVICES if name in services}
        partitions.append({**partition, "services": {**services, **own}})
    return {**endpoints, "partitions": partitions}


@functools.cache
def _shipped() -> _Shipped:
    return _Shipped()


# Another thread may hold the lock when a process forks.
os.register_at_fork(after_in_child=_shipped.cache_clear)

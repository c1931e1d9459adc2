"""Proxies of the environment: which one a url goes through, in the form that transports take."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from rdmaload.errors import NotSupportedError, UrlError

__all__ = ["Proxies", "split_proxy"]


class Proxies:
    """HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY as they are now; the environment is read once."""

    def __init__(self) -> None:
        self._by_scheme: Mapping[str, str] = getproxies()

    def of(self, url: str) -> tuple[str, str]:
        """The proxy for `url` without its user, and the header that says who we are; ("", "") without one."""
        parts = urlsplit(url)
        proxy = self._by_scheme.get(parts.scheme) or self._by_scheme.get("all", "")
        if not proxy or proxy_bypass(parts.hostname or "", self._by_scheme):
            return "", ""
        return split_proxy(proxy)


def split_proxy(proxy: str) -> tuple[str, str]:
    """A proxy's url without its user, and the header that says who we are.

    Raises UrlError for what is no url, without showing it, and NotSupportedError for proxies of other kinds.
    """
    if not proxy:
        return "", ""
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy.removeprefix('//')}")
        user, at, place = parts.netloc.rpartition("@")
        # A slash in a password ends the place, and what follows has the rest of the password.
        sound = bool(parts.hostname) and parts.port != 0 and "@" not in f"{parts.path}{parts.query}{parts.fragment}"
    except ValueError:
        sound = False
    if not sound:
        raise UrlError(
            "a proxy that the environment names is no url: HTTP_PROXY, HTTPS_PROXY and ALL_PROXY are "
            "http://user:password@host:port, with what is special in user and password percent-encoded"
        )
    if parts.scheme != "http":
        raise NotSupportedError(
            f"the proxy {parts.scheme}://{place}, which the environment names, cannot be used: rdmaload goes through "
            "http:// proxies (also to https:// stores, by CONNECT). Name one, or put the store's host into NO_PROXY"
        )
    authorization = f"Basic {base64.b64encode(unquote(user).encode()).decode()}" if at else ""
    return urlunsplit((parts.scheme, place, "", "", "")), authorization

"""TLS for connectors: from the options to what Python's ssl and the native transports take.

Both check the same: the chain up to `ca_file` or the system's store, the dates, and the name or
address of the server. TLS 1.2 is the oldest version spoken.
"""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rdmaload.errors import (
    AuthenticationError,
    NotSupportedError,
    RdmaloadError,
    UnavailableError,
    UrlError,
)
from rdmaload.options import Options

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from rdmaload._core import TlsContext

__all__ = [
    "check_tls_options",
    "failure_in",
    "failure_passes",
    "first_error",
    "meaning_of_failure",
    "native_context",
    "python_context",
]

_log = logging.getLogger("rdmaload")

_FILES = ("ca_file", "ca_dir", "client_cert_file", "client_key_file")

# X509_V_ERR_...: what a certificate fails for has its own remedy.
_WRONG_DATES = (9, 10)
_WRONG_NAME = (62, 64)


def check_tls_options(options: Options, *, url: str, tls: bool, write: str) -> None:
    """Refuse TLS options where there is no TLS, rather than load in the clear; `write` is the scheme to take."""
    given = [name for name in (*_FILES, "server_name") if getattr(options, name) is not None]
    if not options.verify_tls:
        given.append("verify_tls")
    if given and not tls:
        raise UrlError(f"{url}: {' and '.join(given)} would have no effect without TLS; write {write}", url=url)
    if options.client_key_file is not None and options.client_cert_file is None:
        raise UrlError(f"{url}: client_key_file needs client_cert_file beside it", url=url)
    if options.ca_dir is not None and Path(options.ca_dir).is_file():
        # OpenSSL takes it, finds no authority in it and then trusts nobody.
        raise UrlError(f"ca_dir={options.ca_dir} for {url} is no directory; a file is given by ca_file=", url=url)
    if tls and not options.verify_tls:
        _log.warning(
            "%s: verify_tls is off: whoever is between here and the server can read and change what is loaded", url
        )


def python_context(options: Options, *, url: str) -> ssl.SSLContext:
    """A context for sockets of Python. Raises AuthenticationError, which names a file that cannot be used."""
    for name in _FILES:
        path = getattr(options, name)
        try:
            if path is not None:
                os.close(os.open(path, os.O_RDONLY))
        except OSError as err:
            raise AuthenticationError(f"{name}={path} for {url} cannot be read: {err.strerror}", url=url) from err
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = _Socket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not options.verify_tls:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if options.ca_file is None and options.ca_dir is None:
        context.load_default_certs()
    else:
        try:
            context.load_verify_locations(options.ca_file, options.ca_dir)
        except OSError as err:  # ssl.SSLError is one
            raise AuthenticationError(
                f"ca_file={options.ca_file} for {url} holds no certificates in PEM: {err}", url=url
            ) from err
    if options.client_cert_file is not None:
        names = f"client_cert_file={options.client_cert_file}"
        if options.client_key_file is not None:
            names += f" with client_key_file={options.client_key_file}"

        def refuse() -> NoReturn:  # in place of OpenSSL's question on the terminal
            raise AuthenticationError(f"{names} for {url}: the key is encrypted; give one that is not", url=url)

        try:
            context.load_cert_chain(options.client_cert_file, options.client_key_file, password=refuse)
        except AuthenticationError:  # an OSError as well
            raise
        except OSError as err:
            raise AuthenticationError(
                f"{names} for {url} is no certificate with its key in PEM: {err}", url=url
            ) from err
    return context


class _Socket(ssl.SSLSocket):
    """Tells why the peer refused us, where a failed send alone would only say that it is gone."""

    def sendall(self, data: Buffer, flags: int = 0) -> None:
        try:
            super().sendall(data, flags)
        except TimeoutError:
            raise
        except OSError:
            self._raise_alert()
            raise

    def _raise_alert(self) -> None:
        """Raise the alert that came before the end of the connection, if one did."""
        try:
            self.settimeout(1)  # nothing more comes on a connection that is gone
            self.recv(1)
        except ssl.SSLError as err:
            if "ALERT" in (err.reason or ""):
                raise
        except OSError:
            return


def native_context(options: Options, *, url: str) -> TlsContext:
    """The same for native transports. Raises NotSupportedError where OpenSSL is missing, and names it."""
    from rdmaload import _core

    try:
        return _core.TlsContext(
            ca_file=options.ca_file or "",
            ca_dir=options.ca_dir or "",
            client_cert_file=options.client_cert_file or "",
            client_key_file=options.client_key_file or "",
            server_name=options.server_name or "",
            verify=options.verify_tls,
        )
    except (AuthenticationError, NotSupportedError) as err:
        raise type(err)(f"{url}: {err}", url=url) from err


def failure_in(err: BaseException | None) -> ssl.SSLError | None:
    """What OpenSSL said, in what urllib3 made of it; None where it was not TLS that failed."""
    while err is not None and not isinstance(err, ssl.SSLError):
        reason = getattr(err, "reason", None)
        err = reason if isinstance(reason, BaseException) else (err.__cause__ or first_error(err))
    return err


def first_error(err: BaseException) -> BaseException | None:
    """The first exception among the arguments of another."""
    return next((part for part in err.args if isinstance(part, BaseException)), None)


def failure_passes(failure: ssl.SSLError) -> bool:
    """Whether the same may succeed a little later: the connection broke, and nobody refused anybody."""
    return isinstance(failure, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError))


def meaning_of_failure(failure: ssl.SSLError) -> tuple[type[RdmaloadError], str]:
    """Our class for a failure, and what to do about it."""
    reason = (failure.reason or "").upper().replace(" ", "_")
    if isinstance(failure, ssl.SSLCertVerificationError):
        if failure.verify_code in _WRONG_NAME:
            return AuthenticationError, "connect by a name that is in the certificate, or give that by server_name="
        if failure.verify_code in _WRONG_DATES:
            return AuthenticationError, "renew the server's certificate, or look at this machine's clock"
        return AuthenticationError, "give the CA that signed the server's certificate by ca_file="
    if "PROTOCOL_VERSION" in reason or "UNSUPPORTED_PROTOCOL" in reason:
        return NotSupportedError, "the server offers no TLS 1.2 or newer"
    if "UNRECOGNIZED_NAME" in reason:
        return AuthenticationError, "the server has no such name; correct server_name="
    if "ALERT" in reason and any(word in reason for word in ("CERTIFICATE", "CA", "HANDSHAKE", "ACCESS")):
        return (
            AuthenticationError,
            "the server refused us: give a certificate that it accepts by client_cert_file= and client_key_file=",
        )
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"):
        return UnavailableError, "this is no TLS port; give the port that speaks TLS, or a scheme without it"
    return UnavailableError, "TLS with the server failed; check that this is its TLS port"

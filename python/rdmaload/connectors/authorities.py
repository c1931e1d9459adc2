"""One file of all authorities that a TLS server may be certified by, for a library that takes nothing but a file.

OpenSSL also looks into directories, for files that are named by the hash of what they hold. What such a directory holds
is gathered in memory (a memfd), so that nothing is left on a disk, however the process ends. Any thread may ask.
"""

from __future__ import annotations

import hashlib
import os
import re
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

from rdmaload.errors import AuthenticationError
from rdmaload.options import Options

__all__ = ["given_authorities", "system_authorities"]

_HASHED = re.compile(r"[0-9a-f]{8}\.[0-9]+", re.ASCII)
_CERTIFICATE = re.compile(
    rb"-----BEGIN (?P<kind>(?:TRUSTED |X509 )?CERTIFICATE)-----.*?-----END (?P=kind)-----", re.DOTALL
)
_lock = threading.Lock()
_descriptors: dict[bytes, int] = {}  # Guarded by _lock; by SHA-256 of the content.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def given_authorities(options: Options, *, url: str) -> str | None:
    """The file of what `ca_file` and `ca_dir` hold together; None where neither is given.

    Raises AuthenticationError for a directory in which OpenSSL would find nobody.
    """
    if options.ca_dir is None:
        return options.ca_file
    try:
        found = _gathered(options.ca_file, options.ca_dir)
    except OSError as err:
        name = "ca_file" if err.filename == options.ca_file else "ca_dir"
        raise AuthenticationError(f"{name}={err.filename} for {url} cannot be read: {err.strerror}", url=url) from err
    if found is None:
        raise AuthenticationError(
            f"ca_dir={options.ca_dir} for {url} holds no certificates under hashed names: run openssl rehash on it",
            url=url,
        )
    return found


def system_authorities() -> str | None:
    """The file of whom OpenSSL trusts unless told otherwise, SSL_CERT_FILE and SSL_CERT_DIR included.

    None where that is nobody, as in containers without a package of authorities.
    """
    paths = ssl.get_default_verify_paths()
    # Where a system has a file, its directory holds the same, unless somebody names one.
    if paths.capath is None or (paths.cafile is not None and paths.openssl_capath_env not in os.environ):
        return paths.cafile
    try:
        return _gathered(paths.cafile, paths.capath)
    except OSError:  # what may not be read is not trusted
        return paths.cafile


def _gathered(file: str | None, directory: str) -> str | None:
    found = dict.fromkeys(_certificates(file, directory))  # Debian has each in both
    return _in_memory(b"\n".join([*found, b""])) if found else None


def _certificates(file: str | None, directory: str) -> Iterator[bytes]:
    paths = [] if file is None else [Path(file)]
    paths += sorted(path for path in Path(directory).iterdir() if _HASHED.fullmatch(path.name) and path.is_file())
    for path in paths:
        yield from (found[0] for found in _CERTIFICATE.finditer(path.read_bytes()))


def _in_memory(content: bytes) -> str:
    """The path of a file with this content, there for as long as the process is.

    A library opens it with every connection: a descriptor that was closed too early could be another file by then.
    """
    digest = hashlib.sha256(content).digest()
    with _lock:
        if digest not in _descriptors:
            descriptor = os.memfd_create("rdmaload-authorities")
            try:
                with open(descriptor, "wb", closefd=False) as target:
                    target.write(content)
            except BaseException:
                os.close(descriptor)
                raise
            _descriptors[digest] = descriptor  # whole: later calls trust it
        return f"/proc/self/fd/{_descriptors[digest]}"

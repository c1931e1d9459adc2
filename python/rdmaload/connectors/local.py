"""A model in a local directory: its files are the model's files.

Names stay inside the directory: absolute ones and ".." are refused. Links to files are followed,
because caches of downloads are made of links that point out of the model's directory; links to
directories are not.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from rdmaload.connectors.connector import FileConnector, FileInfo
from rdmaload.connectors.output_file import OutputFile
from rdmaload.errors import (
    AuthenticationError,
    NotFoundError,
    RdmaloadError,
    UnavailableError,
    UrlError,
)
from rdmaload.options import Options
from rdmaload.urls import Url

__all__ = ["LocalConnector"]

_log = logging.getLogger("rdmaload")

_TEMPORARY_PREFIX = ".rdmaload-"
_TEMPORARY_SUFFIX = ".tmp"


class LocalConnector(FileConnector):
    """A model in a directory: `/path`, `./path` or `file:///path`.

    >>> import tempfile
    >>> from rdmaload.urls import parse_url
    >>> with tempfile.TemporaryDirectory() as root, LocalConnector(parse_url(root)) as connector:
    ...     connector.write("config.json", 2, [memoryview(b"{}")])
    ...     [(info.path, info.size) for info in connector.list_files()]
    [('config.json', 2)]
    """

    store_options = frozenset()

    def __init__(self, url: Url, options: Options | None = None) -> None:
        super().__init__(url, options)
        if url.user or url.password or url.host:
            raise UrlError(f"{self.url} names a host; a local directory has none", url=self.url)
        # Absolute from the start: the working directory may change while the connector lives.
        self.root = Path(url.path).absolute()
        self._lock = threading.Lock()
        self._ways: set[str] = set()  # Guarded by _lock. Of all that was written.

    @property
    def write_path(self) -> str:  # type: ignore[override]
        with self._lock:
            return "+".join(sorted(self._ways)) or "file-buffered"

    def native_transport(self) -> object | None:
        self._check_open()
        from rdmaload import _core

        transport: object = _core.FileTransport(
            root=str(self.root), threads=self.options.threads, io=self.options.file_io
        )
        return transport

    def list_files(self) -> list[FileInfo]:
        self._check_open()
        if not self.root.is_dir():
            if self.root.exists():
                raise NotFoundError(
                    f"{self.url} is a file; a model is a directory: give {self.root.parent}",
                    url=self.url,
                )
            raise NotFoundError(f"no directory {self.url}: check the path", url=self.url)
        return sorted(self._walk(self.root, ""), key=lambda info: info.path)

    def _walk(self, directory: Path, prefix: str) -> Iterator[FileInfo]:
        pending = [(os.fspath(directory), prefix)]
        while pending:
            place, prefix = pending.pop()
            try:
                with os.scandir(place) as entries:
                    for entry in entries:
                        path = prefix + entry.name
                        if entry.is_dir(follow_symlinks=False):
                            if not entry.name.startswith("."):
                                pending.append((entry.path, f"{path}/"))
                        elif not _is_temporary(entry.name):
                            info = self._info(entry, path)
                            if info is not None:
                                yield info
            except RdmaloadError:
                raise  # some of ours are OSErrors too
            except OSError as err:
                raise self._translated(err, prefix, "list") from err

    def _info(self, entry: os.DirEntry[str], path: str) -> FileInfo | None:
        try:
            status = entry.stat()
        except FileNotFoundError as err:
            if not entry.is_symlink():
                return None  # removed while we looked
            raise NotFoundError(
                f"{path} in {self.url} is a link to a file that does not exist: the copy of the model is incomplete",
                url=self.url,
                key=path,
            ) from err
        if not stat.S_ISREG(status.st_mode):
            return None
        self._check(path)
        return FileInfo(path, status.st_size, _etag(status))

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        target = self._place(path)
        view = buffer.cast("B")
        done = 0
        try:
            with open(target, "rb", buffering=0) as file:
                while done < len(view):
                    got = os.preadv(file.fileno(), [view[done:]], offset + done)
                    if got == 0:
                        break
                    done += got
        except OSError as err:
            raise self._translated(err, path, "read") from err
        return done

    def write(self, path: str, size: int, blocks: Iterable[memoryview]) -> None:
        target = self._place(path)
        temporary = target.with_name(f"{_TEMPORARY_PREFIX}{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            output = OutputFile(temporary, size, self.options.file_io)
        except OSError as err:
            raise self._translated(err, path, "write") from err
        try:
            with output:
                for block in blocks:
                    try:
                        output.write(block.cast("B"))
                    except OSError as err:
                        raise self._translated(err, path, "write") from err
                if output.written != size:
                    raise ValueError(f"{path}: {output.written} bytes were given for a file of {size}")
                output.sync()
            os.replace(temporary, target)
            with self._lock:
                self._ways |= output.ways
            if output.refusal and self.options.file_io == "direct":
                _log.warning("%s: %s was written through the page cache: %s", self.url, path, output.refusal)
        except RdmaloadError:
            raise
        except OSError as err:
            raise self._translated(err, path, "write") from err
        finally:
            temporary.unlink(missing_ok=True)
        self._sync_directory(target.parent, path)

    def delete(self, path: str) -> bool:
        target = self._place(path)
        try:
            target.unlink()
        except FileNotFoundError:
            return False
        except OSError as err:
            raise self._translated(err, path, "remove") from err
        return True

    def _place(self, path: str) -> Path:
        self._check(path)
        return self.root / path

    def _sync_directory(self, directory: Path, path: str) -> None:
        """Make the new name last through a crash, as fsync did for the bytes."""
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as err:
            raise self._translated(err, path, "write") from err

    def _translated(self, err: OSError, path: str, verb: str) -> RdmaloadError:
        kind: type[RdmaloadError] = UnavailableError
        if isinstance(err, FileNotFoundError):
            kind = NotFoundError
        elif isinstance(err, PermissionError):
            kind = AuthenticationError
        place = f"{path} in {self.url}" if path else self.url
        full = err.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; free space there, or save elsewhere" if full else ""
        return kind(f"cannot {verb} {place}: {err.strerror or err}{hint}", url=self.url, key=path or None)


def _is_temporary(name: str) -> bool:
    return name.startswith(_TEMPORARY_PREFIX) and name.endswith(_TEMPORARY_SUFFIX)


def _etag(status: os.stat_result) -> str:
    identity = (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    return "-".join(f"{number:x}" for number in identity)

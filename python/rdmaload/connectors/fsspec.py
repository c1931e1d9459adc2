"""Whatever fsspec knows and we do not: `hdfs://`, `sftp://`, `webhdfs://` ...; also by name, `fsspec+PROTOCOL://`.

Reads go through Python, in `threads` threads, into their final place; what the library hands out is copied once.
Options of the file system itself are `storage_options`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from rdmaload.connectors.connector import FileConnector, FileInfo
from rdmaload.connectors.library_errors import TranslatesErrors
from rdmaload.connectors.retries import Retries
from rdmaload.errors import (
    AuthenticationError,
    FormatError,
    LoadTimeoutError,
    NotFoundError,
    NotSupportedError,
    RdmaloadError,
    UnavailableError,
    UrlError,
)
from rdmaload.options import Options
from rdmaload.urls import SECRET_TEXT, Url

__all__ = ["FsspecConnector"]

_Result = TypeVar("_Result")

_ATTEMPTS = 3  # file systems of networks try again by themselves
_TEMPORARY = ".rdmaload-"

# What the file systems call the tag or the date of a file in what they list, the surest first.
_TAGS = ("ETag", "etag", "e_tag", "md5Hash", "md5", "checksum", "mtime", "LastModified", "last_modified", "modified")
_DATES = ("created", "modificationTime")


class FsspecConnector(TranslatesErrors, FileConnector):
    """A model in a directory of any file system of fsspec: `sftp://user@host/models/llama`.

    >>> from rdmaload.urls import parse_url
    >>> with FsspecConnector(parse_url("fsspec+memory://models/llama")) as connector:
    ...     connector.write("config.json", 2, [memoryview(b"{}")])
    ...     [(info.path, info.size) for info in connector.list_files()]
    [('config.json', 2)]
    """

    store_options = frozenset({"storage_options"})
    default_options: ClassVar[Mapping[str, object]] = {"threads": 4}

    def __init__(self, url: Url, options: Options | None = None) -> None:
        super().__init__(url, options)
        self._given: dict[str, Any] = json.loads(self.options.storage_options or "{}")
        password = self.options.read_password(url=self.url)
        if self.options.username is not None:
            self._given.setdefault("username", self.options.username)
        if password is not None:
            self._given.setdefault("password", password)
        self._retries = Retries(self.options, count=self._count_retries, attempts=_ATTEMPTS)
        self._lock = threading.Lock()
        self._made: tuple[Any, str] | None = None  # Guarded by _lock.

    def close(self) -> None:
        """Let the file system go and end pauses. Idempotent."""
        super().close()
        self._retries.close()
        with self._lock:
            self._made = None

    def _system(self) -> tuple[Any, str]:
        """The file system, and the model's directory in its words."""
        self._check_open()
        with self._lock:
            if self._made is None:
                from fsspec.core import url_to_fs

                text = self.location.text.partition("?")[0].removeprefix("fsspec+")
                if self.location.user:  # they are among the options
                    before, _, after = text.partition("://")
                    authority, slash, path = after.partition("/")
                    text = f"{before}://{authority.rpartition('@')[2]}{slash}{path}"
                with self._translated("open", None):
                    try:
                        system, root = url_to_fs(text, skip_instance_cache=True, **self._given)
                    except TypeError as err:
                        raise UrlError(
                            f"{self.url}: the file system does not take these options: {self._safe(err)}", url=self.url
                        ) from err
                self._made = system, str(root).rstrip("/")
            return self._made

    # ---- reading ----

    def list_files(self) -> list[FileInfo]:
        system, root = self._system()

        def find() -> Mapping[str, Mapping[str, Any]]:
            system.invalidate_cache()
            found: Mapping[str, Mapping[str, Any]] = system.find(root, detail=True)
            if not found and not system.exists(root):
                raise NotFoundError(f"there is nothing at {self.url}: check the path", url=self.url)
            if root in found:
                raise NotFoundError(
                    f"{self.url} is a file; a model is a directory: give the one that it is in", url=self.url
                )
            return found

        files = []
        for name, info in self._tried("list", None, find).items():
            path = name[len(root) :].lstrip("/") if name.startswith(root) else name
            parts = path.split("/")
            if info.get("type", "file") != "file" or not path or any(part.startswith(".") for part in parts[:-1]):
                continue
            if parts[-1].startswith(_TEMPORARY) and path.endswith(".tmp"):
                continue
            self._place(path)
            size = info.get("size")
            files.append(FileInfo(path, self._size(path) if size is None else int(size), _tag(info)))
        return sorted(files, key=lambda info: info.path)

    def _size(self, path: str) -> int:
        system, place = self._place(path)
        size = self._tried("look at", path, lambda: system.size(place))
        if size is None:
            raise NotSupportedError(
                f"the file system does not say how large {path} in {self.url} is", url=self.url, key=path
            )
        return int(size)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        system, place = self._place(path)
        view = buffer.cast("B")
        done = 0
        while done < len(view):
            cat = functools.partial(system.cat_file, place, start=offset + done, end=offset + len(view))
            data: bytes = self._tried("read", path, cat)
            if not data:
                break
            if len(data) > len(view) - done:
                raise FormatError(
                    f"{path} in {self.url}: the file system gave {len(data)} bytes where {len(view) - done} were "
                    "asked for",
                    url=self.url,
                    key=path,
                )
            view[done : done + len(data)] = data
            done += len(data)
        return done

    # ---- writing ----

    def write(self, path: str, size: int, blocks: Iterable[memoryview]) -> None:
        system, place = self._place(path)
        directory, _, _ = place.rpartition("/")
        temporary = f"{directory}/{_TEMPORARY}{secrets.token_hex(8)}.tmp"
        try:
            with self._translated("write", path), contextlib.suppress(NotImplementedError):
                system.makedirs(directory, exist_ok=True)
            with contextlib.ExitStack() as closing:
                with self._translated("write", path):
                    file = closing.enter_context(system.open(temporary, "wb"))
                written = 0
                for block in blocks:
                    view = block.cast("B")
                    written += len(view)
                    with self._translated("write", path):
                        while view:
                            count = file.write(view)
                            view = view[len(view) if count is None else count :]
                if written != size:
                    raise ValueError(f"{path}: {written} bytes were given for a file of {size}")
                with self._translated("write", path):
                    file.close()  # what is buffered goes now, and may fail
            with self._translated("write", path):
                self._move(system, temporary, place)
        except BaseException:
            with contextlib.suppress(Exception):
                system.rm_file(temporary)
            raise

    def _move(self, system: Any, source: str, target: str) -> None:
        try:
            system.mv(source, target)
        except FileExistsError:  # where a rename does not replace, such as HDFS
            system.rm_file(target)
            system.mv(source, target)

    def delete(self, path: str) -> bool:
        system, place = self._place(path)

        def delete() -> bool:
            if not system.exists(place):
                return False
            system.rm_file(place)
            return True

        with self._translated("remove", path):
            return delete()

    # ---- names and errors ----

    def _place(self, path: str) -> tuple[Any, str]:
        self._check(path)
        system, root = self._system()
        return system, f"{root}/{path}"

    def _tried(self, verb: str, path: str | None, work: Callable[[], _Result]) -> _Result:
        def translated() -> _Result:
            with self._translated(verb, path):
                return work()

        return self._retries.tried(translated)

    def _meaning(self, err: Exception, verb: str, path: str | None) -> RdmaloadError:
        kind: type[RdmaloadError] = RdmaloadError
        hint = ""
        if isinstance(err, FileNotFoundError):
            kind = NotFoundError
        elif isinstance(err, PermissionError) or "Authentication" in type(err).__name__:
            kind, hint = AuthenticationError, ". Check the credentials and what they may do"
        elif isinstance(err, TimeoutError):
            kind = LoadTimeoutError
        elif isinstance(err, (NotImplementedError, ImportError)):
            kind = NotSupportedError
        elif isinstance(err, (OSError, EOFError)):
            kind = UnavailableError
        place = f"{path} in {self.url}" if path else self.url
        return kind(f"cannot {verb} {place}: {self._safe(err)}{hint}", url=self.url, key=path)

    def _safe(self, err: Exception) -> str:
        """The library's words without what we gave it."""
        text = f"{type(err).__name__}: {err}"
        for value in _leaves(self._given):
            if len(value) > 3:
                text = text.replace(value, SECRET_TEXT)
        return text


def _tag(info: Mapping[str, Any]) -> str | None:
    found = next((info[name] for name in (*_TAGS, *_DATES) if info.get(name) is not None), None)
    return None if found is None else f"{info.get('size')}-{found}"


def _leaves(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)

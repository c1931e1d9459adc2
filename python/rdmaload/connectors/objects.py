"""Stores of objects that are written whole or in parts, such as S3: what saving to them needs beside FileConnector."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Protocol

from rdmaload.connectors.connector import FileConnector
from rdmaload.connectors.library_errors import TranslatesErrors
from rdmaload.errors import UrlError
from rdmaload.options import Options
from rdmaload.urls import Url

__all__ = ["KEPT", "ObjectConnector", "Upload"]

KEPT = ".rdmaload/"
"""Where saves keep what is no file of the model."""

# S3 takes parts of 5 MiB to 5 GiB and at most 10,000 of them. Two chunks of the default size.
_PART_BYTES = 16 * 2**20
_MAX_PARTS = 10_000


class Upload(Protocol):
    """A file on its way in parts; it appears with `finish`, or never. Any thread may send, in any order."""

    resume_token: str
    """What `resume_upload` takes to go on with it, in this process or another; "" where that is not possible."""

    def send(self, number: int, data: bytes | bytearray) -> bool:
        """Send one part; they count from 1, and all but the last have the same size. False when it was there."""

    def finish(self) -> str:
        """Make the file appear, in place of an older one; its ETag."""

    def interrupt(self) -> None:
        """A part will never come: who waits in `send` for it returns. Never raises; `abort` follows."""

    def abort(self) -> None:
        """Drop what was sent. Never raises."""


class ObjectConnector(TranslatesErrors, FileConnector):
    """A store of objects; a manifest lies beside the files of a model that we saved."""

    keeps_manifest = True
    pins_versions = True
    place_name: ClassVar[str] = "bucket"
    """What such a store calls a bucket."""

    def __init__(self, url: Url, options: Options | None = None) -> None:
        super().__init__(url, options)
        from rdmaload.connectors.tls import check_tls_options  # brings ssl, which not everybody needs

        if not url.host:
            raise UrlError(
                f"{self.url} names no {self.place_name}; write {url.scheme}://{self.place_name.upper()}/PREFIX",
                url=self.url,
            )
        self._bucket = url.host
        self._prefix = f"{url.model}/" if url.model else ""
        endpoint = self.options.endpoint_url or ""
        check_tls_options(
            self.options, url=self.url, tls=not endpoint.startswith("http://"), write="endpoint_url=https://..."
        )
        self._password = self.options.read_password(url=self.url)
        self._lock = threading.Lock()
        self._etags: Mapping[str, str] = {}

    def pin(self, etags: Mapping[str, str]) -> None:
        self._etags = dict(etags)

    @abstractmethod
    def put(self, path: str, data: bytes | bytearray) -> str:
        """Write a file in one request; its ETag."""

    @abstractmethod
    def begin_upload(self, path: str) -> Upload:
        """Begin to write a file in parts."""

    def resume_upload(self, path: str, token: str) -> Upload | None:
        """An upload that an earlier attempt began, with the parts that arrived; None when it is gone."""
        return None

    def list_kept(self) -> Sequence[tuple[str, float]]:
        """Paths below `.rdmaload/`, which `list_files` leaves out, with the time when each was written (of the epoch).

        A store that can list them overrides this: `prune` and `remove` find there what saves have left.
        """
        return []

    def abort_uploads(self, older_than: float) -> int:
        """Drop the parts of uploads that were begun before that time and nobody ended; how many uploads."""
        return 0

    def part_bytes(self, size: int, chunk_bytes: int) -> int:
        """Bytes per part of a file of `size` bytes: whole chunks, so that each is read and checksummed once."""
        wanted = max(_PART_BYTES, -(-size // _MAX_PARTS))
        return -(-wanted // chunk_bytes) * chunk_bytes

    def write(self, path: str, size: int, blocks: Iterable[memoryview]) -> None:
        part_bytes = self.part_bytes(size, 1)
        upload: Upload | None = None
        pending, written, number = bytearray(), 0, 0
        try:
            for block in blocks:
                view = block.cast("B")
                pending += view
                written += len(view)
                if len(pending) >= part_bytes:
                    if upload is None:
                        upload = self.begin_upload(path)
                    number += 1
                    upload.send(number, pending)
                    pending = bytearray()
            if written != size:
                raise ValueError(f"{path}: {written} bytes were given for a file of {size}")
            if upload is None:
                self.put(path, pending)
                return
            if pending:
                upload.send(number + 1, pending)
            upload.finish()
        except BaseException:
            if upload is not None:
                upload.abort()
            raise

    def _key(self, path: str) -> str:
        """What the store calls a file."""
        self._check(path)
        return self._prefix + path

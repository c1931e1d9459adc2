"""Multipart uploads to S3: parts in any order from any thread, and parts of an earlier attempt used again.

Whether a part that is there has the bytes that are to be sent is told by its CRC32C, or by its MD5, which S3 gives as
the ETag of a part; what cannot be told is sent again.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from rdmaload._core import crc32c

__all__ = ["S3Upload", "crc_text"]

_Result = TypeVar("_Result")


class Tried(Protocol):
    """`work`, tried again while that may help, with errors of ours that name verb and path."""

    def __call__(self, verb: str, path: str | None, work: Callable[[], _Result]) -> _Result: ...


class S3Upload:
    """One multipart upload to `place` (Bucket, Key, UploadId)."""

    def __init__(
        self, client: Any, tried: Tried, path: str, place: Mapping[str, str], stored: Mapping[int, Mapping[str, Any]]
    ) -> None:
        self.resume_token = place["UploadId"]
        self._client = client
        self._tried = tried
        self._path = path
        self._place = dict(place)
        self._stored = stored
        self._lock = threading.Lock()
        self._parts: dict[int, dict[str, object]] = {}  # Guarded by _lock.

    def send(self, number: int, data: bytes | bytearray) -> bool:
        crc = crc_text(crc32c(data))
        there = self._stored.get(number, {})
        etag = str(there.get("ETag", ""))
        new = not _is_same(there, data, crc)
        if new:
            etag = self._tried(
                "write",
                self._path,
                lambda: str(
                    self._client.upload_part(**self._place, PartNumber=number, Body=data, ChecksumCRC32C=crc)["ETag"]
                ),
            )
        with self._lock:
            self._parts[number] = {"PartNumber": number, "ETag": etag, "ChecksumCRC32C": crc}
        return new

    def finish(self) -> str:
        with self._lock:
            parts = [self._parts[number] for number in sorted(self._parts)]

        def finish() -> str:
            self._client.complete_multipart_upload(**self._place, MultipartUpload={"Parts": parts})
            # Not what the call above says: some stores (rclone's) give the object another tag afterwards.
            place = {name: self._place[name] for name in ("Bucket", "Key")}
            return str(self._client.head_object(**place)["ETag"])

        return self._tried("write", self._path, finish)

    def interrupt(self) -> None:
        pass  # parts go in any order

    def abort(self) -> None:
        # Parts of an upload that nobody ends are paid for until they are removed.
        with contextlib.suppress(Exception):
            self._client.abort_multipart_upload(**self._place)


def _is_same(there: Mapping[str, Any], data: bytes | bytearray, crc: str) -> bool:
    if there.get("Size") != len(data):
        return False
    if there.get("ChecksumCRC32C"):
        return bool(there["ChecksumCRC32C"] == crc)
    return bool(str(there.get("ETag", "")).strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest())


def crc_text(crc: int) -> str:
    """A CRC32C as S3 writes it."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()

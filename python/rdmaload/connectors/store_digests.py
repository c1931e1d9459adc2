"""CRCs of whole objects as stores write them: in base64, in headers and fields of one name per algorithm.

S3 has CRC32C, CRC32 or CRC64NVME of objects that were uploaded with one, and of all since it computes one by itself; of
an upload in parts only those of type FULL_OBJECT are of the bytes, others of the parts' checksums. Google Cloud Storage
has the CRC32C of every object.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["DIGEST_KINDS", "FileDigest", "digest_of_headers", "digest_of_text"]

DIGEST_KINDS = {"crc32c": 4, "crc32": 4, "crc64nvme": 8}
"""What can be combined from ranges, and its bytes; the cheapest first."""

_GOOGLE = re.compile(r"(?:^|,)\s*crc32c=([A-Za-z0-9+/]{6}==)\s*(?:,|$)", re.ASCII)


@dataclass(frozen=True)
class FileDigest:
    """What a store says of a file: a CRC of all its bytes."""

    kind: str
    """One of DIGEST_KINDS."""
    value: int


def digest_of_text(kind: str, text: str) -> FileDigest | None:
    """The CRC in base64, big-endian; None for what is none, such as one of parts ("...-3")."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return FileDigest(kind, int.from_bytes(data, "big")) if len(data) == DIGEST_KINDS[kind] else None


def digest_of_headers(header: Callable[[str], str]) -> FileDigest | None:
    """The CRC of the whole object that an answer about it names, also one with a range of it."""
    found = _GOOGLE.search(header("x-goog-hash"))
    if found is not None:
        return digest_of_text("crc32c", found[1])
    if header("x-amz-checksum-type") != "FULL_OBJECT":
        return None
    for kind in DIGEST_KINDS:
        text = header(f"x-amz-checksum-{kind}")
        if text:
            return digest_of_text(kind, text)
    return None

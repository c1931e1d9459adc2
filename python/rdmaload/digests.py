"""Checksums that a store keeps of whole objects, for files without a manifest: compared when all of a file was read.

The transport takes the CRC of every range as it arrives; here the CRCs of one load's ranges are put together in order.
A file of which only a part is read has nothing to compare with, and its bytes stay unverified.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Mapping, Sequence

from rdmaload import _core
from rdmaload.connectors.store_digests import DIGEST_KINDS, FileDigest
from rdmaload.errors import IntegrityError
from rdmaload.index import IndexFile

__all__ = ["DIGEST_KINDS", "FileDigest", "WholeFiles"]


class WholeFiles:
    """The ranges of one load, whatever it consists of, by file. Any thread may use it."""

    def __init__(
        self, url: str, files: Sequence[IndexFile], digests: Mapping[int, FileDigest], *, must: bool = False
    ) -> None:
        self._url = url
        self._files = files
        self._digests = digests
        self._must = must  # what cannot be compared is an error
        self._lock = threading.Lock()
        # Guarded by _lock: by file and offset, length and CRC; and how many bytes these are.
        self._pieces: dict[int, dict[int, tuple[int, int]]] = {}
        self._bytes: dict[int, int] = {}

    def add(self, pieces: Iterable[tuple[int, int, int, int]]) -> int:
        """Take (file, offset, length, CRC) of ranges; how many bytes of files that are complete now are right.

        Raises IntegrityError when a file is complete and is not what the store says.
        """
        verified = 0
        touched = set()
        with self._lock:
            for file, offset, length, crc in pieces:
                held = self._pieces.setdefault(file, {})
                self._bytes[file] = self._bytes.get(file, 0) + length
                held[offset] = (length, crc)
                touched.add(file)
            for file in touched:
                first = min(self._pieces[file])
                # Without the header, which was read, as it was used, when the model was opened; or with it.
                if first not in (0, len(_head_of(self._files[file]))):
                    continue
                if self._bytes[file] < self._files[file].size - first:
                    continue
                if self._is_right(file, self._pieces.pop(file)):
                    verified += self._bytes[file]
                del self._bytes[file]
        return verified

    def _is_right(self, file: int, pieces: dict[int, tuple[int, int]]) -> bool:
        """False where ranges overlap, of which no CRC can be made."""
        stored, digest = self._files[file], self._digests[file]
        at = min(pieces)
        crc = _core.crc(digest.kind, _head_of(stored)) if at > 0 else 0
        for offset, (length, part) in sorted(pieces.items()):
            if offset != at:
                break
            crc = _core.crc_combine(digest.kind, crc, part, length)
            at += length
        if at != stored.size:
            if self._must:
                raise self._error(stored, f"its ranges do not fit together at byte {at}, so that nothing is verified")
            return False
        if crc != digest.value:
            name = digest.kind.upper()
            width = 2 * DIGEST_KINDS[digest.kind]
            raise self._error(
                stored, f"the bytes that came have {name} {crc:0{width}x}, the store has {digest.value:0{width}x}"
            )
        return True

    def _error(self, file: IndexFile, what: str) -> IntegrityError:
        return IntegrityError(
            f"{file.path} in {self._url}: {what}. Load again; if it stays, the object is damaged: upload it again",
            url=self._url,
            key=file.path,
        )


def _head_of(file: IndexFile) -> bytes:
    """What comes before the tensors of a weight file."""
    return b"" if file.header is None else struct.pack("<Q", len(file.header)) + file.header

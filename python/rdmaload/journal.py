"""What a save keeps in the store while it runs: key names, journal entries and parts.

Keys below `{model}/saving/{save id}`:

    generation                              32 hex digits: where every attempt of this save writes
    beat                                    time of the last sign of life, RFC 3339
    {generation}/claims/{file number}       token of the attempt that owns the number
    {generation}/journal/{rank}/{path id}   a finished file: its number and chunk checksums
    {generation}/parts/{rank}               a finished rank: a manifest and the index that it names

Everything but the first two is named after the generation: when a save was published and another
one starts under the same id, a late attempt of the first cannot touch the second.

A record is `<json>\\n<crc>\\n` like a manifest. What does not decode is as good as absent: the file
is sent anew.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone

from rdmaload._core import crc32c
from rdmaload.connectors.connector import KeyValueConnector
from rdmaload.errors import FormatError, IntegrityError
from rdmaload.index import Index, check_path
from rdmaload.manifest import Manifest

__all__ = [
    "SAVE_ID",
    "JournalEntry",
    "SaveKeys",
    "decode_part",
    "delete_keys",
    "encode_part",
    "parse_time",
]

SAVE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
"""What a save id may be: it is one segment of a key."""

# Keys per DEL: long enough to hide the round trip, short enough not to stall a single-threaded
# server that frees about 1 MB per key.
_DELETE_KEYS = 256


@dataclass(frozen=True)
class SaveKeys:
    """The keys of one save of `model`."""

    model: str
    save_id: str

    @property
    def root(self) -> str:
        return f"{self.model}/saving/{self.save_id}"

    @property
    def generation(self) -> str:
        return f"{self.root}/generation"

    @property
    def beat(self) -> str:
        return f"{self.root}/beat"

    def claim(self, generation: str, number: int) -> str:
        return f"{self.root}/{generation}/claims/{number}"

    def journal(self, generation: str, rank: int | None, path: str) -> str:
        owner = "all" if rank is None else str(rank)
        digest = hashlib.sha256(path.encode()).hexdigest()[:32]
        return f"{self.root}/{generation}/journal/{owner}/{digest}"

    def part(self, generation: str, rank: int) -> str:
        return f"{self.root}/{generation}/parts/{rank}"


@dataclass(frozen=True)
class JournalEntry:
    """A file that is in the store completely, in the chunks of file number `number`."""

    path: str
    size: int
    fingerprint: str
    number: int
    chunk_bytes: int
    crcs: bytes
    """CRC32C per chunk, u32 little-endian."""

    def encode(self) -> bytes:
        fields = {
            "path": self.path,
            "size": self.size,
            "fingerprint": self.fingerprint,
            "number": self.number,
            "chunk_bytes": self.chunk_bytes,
            "crcs": base64.b64encode(self.crcs).decode(),
        }
        line = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        return line + b"%08x\n" % crc32c(line)

    @classmethod
    def decode(cls, value: bytes | None) -> JournalEntry | None:
        """The entry, or None for anything that is not exactly what `encode` wrote."""
        if value is None or len(value) < 10 or value[-1:] != b"\n":
            return None
        line, crc = value[:-9], value[-9:-1]
        if b"%08x" % crc32c(line) != crc:
            return None
        try:
            fields = json.loads(line)
            crcs = base64.b64decode(fields.pop("crcs"), validate=True)
            entry = cls(**fields, crcs=crcs)
            check_path(entry.path)
            numbers = (entry.size, entry.number, entry.chunk_bytes)
            sound = all(type(number) is int and number >= 0 for number in numbers)
            if not sound or entry.encode() != value:
                return None
            if len(crcs) != 4 * -(-entry.size // max(1, entry.chunk_bytes)):
                return None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, binascii.Error):
            return None
        return entry


def encode_part(manifest: Manifest, index: bytes) -> bytes:
    """What one rank has saved: a manifest of that rank alone, then its index."""
    return manifest.encode() + index


def decode_part(value: bytes, *, url: str, key: str) -> tuple[Manifest, Index]:
    """The manifest and index of a part, checked against each other.

    Raises FormatError or IntegrityError for what `encode_part` did not write.
    """
    end = value.find(b"\n", value.find(b"\n") + 1) + 1
    try:
        manifest = Manifest.decode(value[:end])
        manifest.check_index(value[end:])
        return manifest, Index.decode(value[end:])
    except (FormatError, IntegrityError) as err:
        raise type(err)(
            f"{key} on {url} is damaged ({err}); nothing was published. Save again under another "
            "save_id, or delete that key and repeat the rank.",
            url=url,
            key=key,
        ) from err


def delete_keys(connector: KeyValueConnector, keys: Iterable[str]) -> int:
    """Delete `keys` in batches; how many there were."""
    count = 0
    batch: list[str] = []
    for key in keys:
        batch.append(key)
        if len(batch) == _DELETE_KEYS:
            count += connector.delete(*batch)
            batch.clear()
    if batch:
        count += connector.delete(*batch)
    return count


def parse_time(value: bytes | None) -> float | None:
    """Seconds since 1970 of what `utc_now` of manifest.py wrote, else None."""
    if value is None or len(value) > 64:
        return None
    try:
        parsed = datetime.strptime(value.decode(), "%Y-%m-%dT%H:%M:%SZ")
        return parsed.replace(tzinfo=timezone.utc).timestamp()
    except ValueError:
        return None

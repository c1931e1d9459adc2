"""The root value of a model in a key-value store, written last: a model is there or not.

    manifest = json "\\n" crc "\\n"
    json     = one line, UTF-8, members sorted, no spaces
    crc      = CRC32C of json "\\n", 8 lower-case hexadecimal digits

It pins the index by length and CRC32C, the index pins every chunk: a bit flipped anywhere is
noticed. That protects against accidents; `manifest_sha256=` protects against attackers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, NoReturn, TypeGuard

from rdmaload._core import crc32c
from rdmaload.errors import FormatError, IntegrityError, NotSupportedError
from rdmaload.index import MAX_FILES, MAX_INDEX_BYTES, MAX_SIZE_BYTES, PENDING

__all__ = [
    "FORMAT",
    "GENERATION_PATTERN",
    "MAX_MANIFEST_BYTES",
    "Manifest",
    "generation_manifest_key",
    "manifest_key",
    "utc_now",
]

FORMAT = 1
"""The format that this release writes, and the newest that it reads."""

MAX_MANIFEST_BYTES = 2**20  # a thousand times what one takes

GENERATION_PATTERN = re.compile(r"[0-9a-f]{32}", re.ASCII)
"""A generation: 128 random bits in lower-case hexadecimal."""

_Bytes = bytes  # in Manifest the name is a field

_CRC = re.compile(rb"[0-9a-f]{8}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?Z", re.ASCII)
_MAX_WORLD_SIZE = 2**31 - 1
_MAX_MEMBERS = 1000  # of layout and identity each
_FIELDS = frozenset(
    {
        "format",
        "generation",
        "kind",
        "world_size",
        "layout",
        "identity",
        "index_bytes",
        "index_crc32c",
        "files",
        "bytes",
        "created",
        "writer",
    }
)


def manifest_key(model: str) -> str:
    """The key of a model's manifest."""
    return f"{model}/manifest"


def generation_manifest_key(model: str, generation: str) -> str:
    """Where a copy of the manifest that published a generation stays, for readers that have pinned it."""
    return f"{model}/chunks/{generation}/manifest"


def utc_now() -> str:
    """The time as manifests and notes hold it: RFC 3339, UTC, whole seconds.

    >>> len(utc_now())
    20
    """
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Manifest:
    """What a model is, and where its index lies.

    >>> manifest = Manifest.of(bytes(16), generation="0" * 32, files=1, bytes=5, writer="rdmaload")
    >>> Manifest.decode(manifest.encode()) == manifest
    True
    """

    generation: str
    """128 random bits, 32 lower-case hexadecimal digits."""
    index_bytes: int
    index_crc32c: str
    """8 lower-case hexadecimal digits."""
    files: int
    bytes: int
    """The sum of the files' sizes."""
    created: str
    """RFC 3339, UTC."""
    writer: str
    """"rdmaload <version>"."""
    kind: str = "checkpoint"
    """"checkpoint": every rank reads all of it; "sharded": each rank has its own files."""
    world_size: int = 1
    layout: Mapping[str, int] = field(default_factory=dict)
    """Parallel sizes by name (tp, pp, ep, dp ...); may be empty."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """What wrote the tensors (engine, version, quantization, dtype ...); may be empty."""
    format: int = FORMAT
    checksums: str | None = None
    """"pending" while whoever gives the model out computes them; None, and absent, when the index has them."""

    @classmethod
    def of(
        cls,
        index: _Bytes | memoryview,
        *,
        generation: str,
        files: int,
        bytes: int,
        writer: str,
        created: str | None = None,
        kind: str = "checkpoint",
        world_size: int = 1,
        layout: Mapping[str, int] | None = None,
        identity: Mapping[str, str] | None = None,
        checksums: str | None = None,
    ) -> Manifest:
        """A manifest for an encoded index, dated now unless `created` says otherwise."""
        return cls(
            generation=generation,
            index_bytes=len(index),
            index_crc32c=f"{crc32c(index):08x}",
            files=files,
            bytes=bytes,
            created=utc_now() if created is None else created,
            writer=writer,
            kind=kind,
            world_size=world_size,
            layout=dict(layout or {}),
            identity=dict(identity or {}),
            checksums=checksums,
        )

    def encode(self) -> _Bytes:
        """The value to store. Raises FormatError when a field breaks a rule of the format."""
        members = {name: getattr(self, name) for name in _FIELDS}
        members["layout"] = dict(self.layout)
        members["identity"] = dict(self.identity)
        if self.checksums is not None:
            members["checksums"] = self.checksums
        _check_shape(members)
        try:
            line = _dump(members).encode() + b"\n"
        except UnicodeEncodeError as err:
            raise FormatError(f"manifest: a field is not Unicode text: {err}") from err
        value = line + b"%08x\n" % crc32c(line)
        if len(value) > MAX_MANIFEST_BYTES:
            _refuse(f"{len(value)} bytes, above the limit of {MAX_MANIFEST_BYTES}")
        return value

    @classmethod
    def decode(
        cls,
        value: _Bytes | bytearray | memoryview,
        *,
        url: str | None = None,
        key: str | None = None,
    ) -> Manifest:
        """The manifest that `encode` wrote; `url` and `key` name it in errors.

        Raises IntegrityError when the checksum differs, NotSupportedError for a newer format,
        FormatError for everything else that `encode` would not have written.
        """
        where = "manifest" + (f" {key}" if key else "") + (f" at {url}" if url else "")
        try:
            return cls._decode(_Bytes(value[: MAX_MANIFEST_BYTES + 1]))
        except (FormatError, IntegrityError, NotSupportedError) as err:
            detail = str(err).removeprefix("manifest: ")
            raise type(err)(f"{where}: {detail}", url=url, key=key) from err.__cause__

    @classmethod
    def _decode(cls, value: _Bytes) -> Manifest:
        if len(value) > MAX_MANIFEST_BYTES:
            _refuse(f"longer than the limit of {MAX_MANIFEST_BYTES} bytes: not a manifest of rdmaload")
        if len(value) < 10 or value[-1:] != b"\n" or value[-10:-9] != b"\n" or not _CRC.fullmatch(value[-9:-1]):
            _refuse("does not end in a checksum line: cut off, or not a manifest of rdmaload")
        line, crc = value[:-9], int(value[-9:-1], 16)
        if crc32c(line) != crc:
            raise IntegrityError(
                f"manifest: the checksum says {crc:08x}, the bytes have {crc32c(line):08x}: "
                "damaged in the store or on the way; read it again, and save the model again if "
                "that gives the same"
            )
        try:
            text = line[:-1].decode()
            members = json.loads(text)
        except (ValueError, RecursionError) as err:
            raise FormatError(f"manifest: not JSON: {err}") from err
        if not isinstance(members, dict):
            _refuse("not a JSON object")
        number = members.get("format")
        if type(number) is int and number > FORMAT:
            raise NotSupportedError(
                f"manifest: format {number}, and this release reads up to format {FORMAT}: "
                "upgrade rdmaload, or save the model again with this one"
            )
        _check_shape(members)
        # One spelling per content: also refuses spaces, another order, doubled members, needless
        # escapes.
        if _dump(members) != text:
            _refuse("the JSON is not in its one canonical spelling")
        return cls(**members)

    def check_index(self, index: _Bytes | memoryview, *, url: str | None = None, key: str | None = None) -> None:
        """Raise IntegrityError unless `index` is the value that this manifest pins."""
        where = "index" + (f" {key}" if key else "") + (f" at {url}" if url else "")
        problem = None
        if len(index) != self.index_bytes:
            problem = f"{len(index)} bytes where the manifest says {self.index_bytes}"
        elif f"{crc32c(index):08x}" != self.index_crc32c:
            problem = f"checksum {crc32c(index):08x} where the manifest says {self.index_crc32c}"
        if problem is not None:
            raise IntegrityError(
                f"{where}: {problem}: damaged in the store or on the way; read it again, "
                "and save the model again if that gives the same",
                url=url,
                key=key,
            )

    @staticmethod
    def sha256(value: _Bytes | memoryview) -> str:
        """What `manifest_sha256=` must equal: SHA-256 of the stored value, in hexadecimal."""
        return hashlib.sha256(value).hexdigest()


def _dump(members: Mapping[str, object]) -> str:
    return json.dumps(members, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _check_shape(members: Mapping[str, object]) -> None:
    if members.keys() - {"checksums"} != _FIELDS:
        odd = sorted(str(name)[:40] for name in (members.keys() - {"checksums"}) ^ _FIELDS)
        _refuse(f"fields missing or unknown: {', '.join(odd[:5])}")
    _check_int(members, "format", FORMAT, FORMAT)
    _check_int(members, "index_bytes", 16, MAX_INDEX_BYTES)
    _check_int(members, "files", 0, MAX_FILES)
    _check_int(members, "bytes", 0, MAX_SIZE_BYTES)
    _check_int(members, "world_size", 1, _MAX_WORLD_SIZE)
    _check_text(members, "generation", GENERATION_PATTERN)
    _check_text(members, "index_crc32c", re.compile(_CRC.pattern.decode(), re.ASCII))
    _check_text(members, "created", _TIME)
    _check_text(members, "writer", re.compile(r"[ -~]{1,256}", re.ASCII))
    _check_text(members, "kind", re.compile("checkpoint|sharded"))
    if members["kind"] == "checkpoint" and members["world_size"] != 1:
        _refuse("a checkpoint has world_size 1")
    if members.get("checksums", PENDING) != PENDING:
        _refuse(f"checksums is {str(members['checksums'])[:40]!r}, not {PENDING!r}")
    layout, identity = members["layout"], members["identity"]
    if not _small_object(layout, int) or any(not 0 <= value <= _MAX_WORLD_SIZE for value in layout.values()):
        _refuse("layout is not an object of whole numbers")
    if not _small_object(identity, str):
        _refuse("identity is not an object of texts")


def _small_object(value: object, kind: type) -> TypeGuard[dict[str, Any]]:
    return (
        isinstance(value, dict)
        and len(value) <= _MAX_MEMBERS
        and all(type(name) is str and type(member) is kind for name, member in value.items())
    )


def _check_int(members: Mapping[str, object], name: str, low: int, high: int) -> None:
    value = members[name]
    if type(value) is not int or not low <= value <= high:
        _refuse(f"{name} is {str(value)[:40]!r}, not a whole number from {low} to {high}")


def _check_text(members: Mapping[str, object], name: str, pattern: re.Pattern[str]) -> None:
    value = members[name]
    if not isinstance(value, str) or not pattern.fullmatch(value):
        _refuse(f"{name} is {str(value)[:80]!r}, which does not look like one")


def _refuse(problem: str) -> NoReturn:
    raise FormatError(f"manifest: {problem}")

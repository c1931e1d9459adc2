"""The manifest: one spelling, strict decoding, and that no flipped bit passes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdmaload._core import crc32c
from rdmaload.errors import FormatError, IntegrityError, NotSupportedError
from rdmaload.manifest import MAX_MANIFEST_BYTES, Manifest, manifest_key

INDEX = b"RDMALOAD and so on, at least sixteen bytes"
MANIFEST = Manifest.of(
    INDEX,
    generation="0123456789abcdef" * 2,
    files=3,
    bytes=12345,
    writer="rdmaload 0.1.0",
    created="2026-01-02T03:04:05Z",
    kind="sharded",
    world_size=2,
    layout={"tp": 2},
    identity={"engine": "vllm", "dtype": "bfloat16"},
)


def sealed(text: str | bytes) -> bytes:
    """`text` with the checksum that makes it a manifest, whatever it says."""
    line = (text.encode() if isinstance(text, str) else text) + b"\n"
    return line + b"%08x\n" % crc32c(line)


def spelled(**changes: Any) -> str:
    members = json.loads(MANIFEST.encode().split(b"\n")[0])
    for name, value in changes.items():
        if value is ...:
            del members[name]
        else:
            members[name] = value
    return json.dumps(members, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def test_the_stored_bytes() -> None:
    manifest = Manifest.of(
        INDEX,
        generation="a" * 32,
        files=1,
        bytes=5,
        writer="rdmaload 1",
        created="2026-01-02T03:04:05Z",
    )
    line = (
        b'{"bytes":5,"created":"2026-01-02T03:04:05Z","files":1,"format":1,"generation":"' + b"a" * 32 + b'",'
        b'"identity":{},"index_bytes":42,"index_crc32c":"%08x","kind":"checkpoint","layout":{},"world_size":1,'
        b'"writer":"rdmaload 1"}\n' % crc32c(INDEX)
    )
    assert manifest.encode() == line + b"%08x\n" % crc32c(line)
    assert manifest_key("org/m") == "org/m/manifest"


def test_what_is_encoded_is_decoded() -> None:
    value = MANIFEST.encode()
    for kind in (bytes, bytearray, memoryview):
        assert Manifest.decode(kind(value)) == MANIFEST
    assert len(Manifest.sha256(value)) == 64


def test_a_manifest_can_say_that_checksums_are_pending() -> None:
    pending = dataclasses.replace(MANIFEST, checksums="pending")
    assert Manifest.decode(pending.encode()) == pending != MANIFEST
    assert b'"checksums":"pending"' in pending.encode()
    assert b"checksums" not in MANIFEST.encode()
    for other in ("", "known", "Pending"):
        with pytest.raises(FormatError, match="checksums"):
            dataclasses.replace(MANIFEST, checksums=other).encode()


def test_every_flipped_bit_is_caught() -> None:
    value = MANIFEST.encode()
    for position in range(8 * len(value)):
        damaged = bytearray(value)
        damaged[position // 8] ^= 1 << (position % 8)
        with pytest.raises((IntegrityError, FormatError)):
            Manifest.decode(damaged)


def test_every_truncation_and_addition_is_caught() -> None:
    value = MANIFEST.encode()
    for length in range(len(value)):
        with pytest.raises((IntegrityError, FormatError)):
            Manifest.decode(value[:length])
    for added in (b"\n", b" ", b"\0", value):
        with pytest.raises((IntegrityError, FormatError)):
            Manifest.decode(value + added)


def test_a_damaged_byte_is_an_integrity_error_that_says_what_to_do() -> None:
    value = MANIFEST.encode().replace(b"12345", b"12346")
    with pytest.raises(IntegrityError, match="save the model again") as caught:
        Manifest.decode(value, url="redis://h/m", key="m/manifest")
    assert str(caught.value).startswith("manifest m/manifest at redis://h/m: the checksum says")
    assert (caught.value.url, caught.value.key) == ("redis://h/m", "m/manifest")


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": "A" * 32},
        {"generation": "0" * 31},
        {"generation": 5},
        {"kind": "other"},
        {"kind": "checkpoint"},  # with world_size 2
        {"world_size": 0},
        {"world_size": True},
        {"world_size": 2.0},
        {"layout": []},
        {"layout": {"tp": True}},
        {"layout": {"tp": -1}},
        {"layout": {"tp": "2"}},
        {"identity": {"engine": 1}},
        {"identity": {f"n{i}": "" for i in range(1001)}},
        {"index_bytes": 15},
        {"index_bytes": 2**29 + 1},
        {"index_crc32c": "0000000G"},
        {"index_crc32c": "0000000A"},
        {"files": -1},
        {"files": 10**6 + 1},
        {"bytes": 2**53},
        {"created": "yesterday"},
        {"created": "2026-01-02T03:04:05+00:00"},
        {"writer": ""},
        {"writer": "a\x1b[0m"},
        {"format": 0},
        {"format": True},
        {"format": "2"},
        {"writer": ...},
        {"extra": 1},
    ],
)
def test_a_wrong_shape_with_a_right_checksum_is_a_format_error(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=r"^manifest: "):
        Manifest.decode(sealed(spelled(**changes)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{",
        "[" * 100_000,
        '{"format":' + "9" * 5000 + "}",
        b"\xff",
        spelled().replace(",", ", ", 1),
        spelled().replace('"bytes":12345', '"bytes":12345,"bytes":12345'),
        spelled().replace("vllm", "vll\\u006d"),
        spelled(identity={"a": "\ud800"}).encode(errors="surrogatepass"),
        "\n" + spelled(),
        spelled() + "\n",
        "{}" + " " * MAX_MANIFEST_BYTES,
    ],
)
def test_other_texts_with_a_right_checksum_are_format_errors(text: str | bytes) -> None:
    with pytest.raises(FormatError):
        Manifest.decode(sealed(text))


def test_a_newer_format_is_named_whatever_its_shape() -> None:
    for text in (spelled(format=2), '{"format":7}'):
        with pytest.raises(NotSupportedError, match=r"format [27], and this release reads up to format 1"):
            Manifest.decode(sealed(text))


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_only_our_errors(data: bytes) -> None:
    for value in (data, sealed(data)):
        with pytest.raises((FormatError, IntegrityError, NotSupportedError)):
            Manifest.decode(value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.sampled_from(sorted(json.loads(MANIFEST.encode().split(b"\n")[0]))), json_values)
def test_any_value_in_any_field_is_taken_or_refused_as_ours(name: str, value: object) -> None:
    try:
        text = spelled(**{name: value}).encode()
    except UnicodeEncodeError:
        return
    try:
        decoded = Manifest.decode(sealed(text))
    except (FormatError, NotSupportedError):
        return
    assert decoded.encode() == sealed(text)


def test_what_breaks_a_rule_is_not_encoded() -> None:
    for changes in (
        {"files": -1},
        {"kind": "x"},
        {"identity": {"a": "\ud800"}},
        {"world_size": True},
    ):
        with pytest.raises(FormatError):
            dataclasses.replace(MANIFEST, **changes).encode()  # type: ignore[arg-type]


def test_the_index_is_pinned_by_length_and_checksum() -> None:
    MANIFEST.check_index(INDEX)
    with pytest.raises(IntegrityError, match="41 bytes where the manifest says 42"):
        MANIFEST.check_index(INDEX[:-1], url="redis://h/m", key="m/chunks/g/index")
    for position in range(8 * len(INDEX)):
        damaged = bytearray(INDEX)
        damaged[position // 8] ^= 1 << (position % 8)
        with pytest.raises(IntegrityError, match="checksum"):
            MANIFEST.check_index(bytes(damaged))

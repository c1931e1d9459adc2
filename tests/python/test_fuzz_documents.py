"""Manifest and index under the targets of tests/fuzz/documents.py: the corpus, and mutations of valid documents.

`scripts/fuzz 3600 manifest` runs the same targets guided by coverage.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdmaload._core import crc32c
from rdmaload.errors import IntegrityError, RdmaloadError
from rdmaload.index import Index, IndexFile
from rdmaload.manifest import Manifest
from tests.fuzz.documents import TARGETS, bounded

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus"
HEADER = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
FILES = [
    IndexFile("a.safetensors", 8 + len(HEADER) + 4, 4, 0, HEADER, {"b": "a"}),
    IndexFile("config.json", 2, 0),
    IndexFile("sub/model.safetensors", 1001, 9, 1, HEADER),
]
CHUNKS = sum(file.chunk_count(64) for file in FILES)
INDEX = Index.of(FILES, chunk_bytes=64, crcs=bytes(i % 251 for i in range(4 * CHUNKS)))
MANIFEST = Manifest.of(
    INDEX.encode(),
    generation="0123456789abcdef" * 2,
    files=3,
    bytes=INDEX.total_bytes,
    writer="rdmaload 0.1.0",
    created="2026-01-02T03:04:05Z",
    kind="sharded",
    world_size=2,
    layout={"tp": 2},
    identity={"engine": "vllm"},
)
META_BYTES = int.from_bytes(INDEX.encode()[12:16], "little")
DOCUMENTS = {
    "manifest": MANIFEST.encode().split(b"\n")[0],
    "index": INDEX.encode()[16 : 16 + META_BYTES] + b"\n" + INDEX.encode()[16 + META_BYTES :],
}

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../a", "/", "a\0", "\ud800", 2**53, 2**53 - 1, 2**31, -1, "0" * 32]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


@st.composite
def changed_json(draw: st.DrawFn, text: bytes) -> bytes:
    """`text` with some of its values replaced or removed, in the canonical spelling or another."""
    document = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(places(document)[1:] or [("x",)]))
        parent = document
        for key in path:
            parent = parent[key]
        if draw(st.booleans()) and isinstance(parent, dict):
            parent.pop(last, None)
        else:
            parent[last] = draw(json_values)
    separators = draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    changed = json.dumps(
        document, sort_keys=draw(st.booleans()), separators=separators, ensure_ascii=draw(st.booleans())
    )
    return changed.encode(errors="surrogatepass")


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """`valid` with bytes changed, cut, doubled or put in."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = draw(st.integers(at, min(len(data), at + 40)))
        data[at:end] = draw(st.binary(max_size=20) | st.just(bytes(data[at:end]) * 2))
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus(name: str) -> None:
    paths = sorted((CORPUS / name).iterdir())
    assert paths
    for path in paths:
        bounded(TARGETS[name], path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_gives_only_our_errors_in_bounded_memory(name: str, data: st.DataObject) -> None:
    valid = DOCUMENTS[name]
    text, _, tail = valid.partition(b"\n")
    whole = MANIFEST.encode() if name == "manifest" else INDEX.encode()
    tails = st.just(b"\n" + tail if tail else b"")
    strategy = st.one_of(
        st.binary(max_size=300), mutated(valid), mutated(whole), st.tuples(changed_json(text), tails).map(b"".join)
    )
    bounded(TARGETS[name], data.draw(strategy))


def test_a_text_that_costs_the_most_is_within_the_bound() -> None:
    for text in (b"[" + b"{}," * 100_000 + b"{}]", b'{"a":[' + b'"",' * 100_000 + b'""]}', b"[" * 100_000):
        bounded(TARGETS["manifest"], text)
        bounded(TARGETS["index"], text)
    with pytest.raises(AssertionError, match="for an input of 1"):
        bounded(lambda _: bytearray(2 << 20).clear(), b"x")


@given(st.data())
def test_a_changed_byte_of_manifest_or_index_is_always_caught(data: st.DataObject) -> None:
    index, manifest = INDEX.encode(), MANIFEST.encode()
    damaged = bytearray(index)
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(IntegrityError):
        MANIFEST.check_index(bytes(damaged))
    for cut in (index[:at], index + index[: at + 1]):
        with pytest.raises(IntegrityError):
            MANIFEST.check_index(cut)
    MANIFEST.check_index(index)

    damaged = bytearray(manifest)
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    for value in (bytes(damaged), manifest[:at], manifest + manifest[: at + 1]):
        with pytest.raises(RdmaloadError):
            Manifest.decode(value)
    assert Manifest.decode(manifest) == MANIFEST


@given(st.data())
def test_an_index_cut_off_or_followed_by_anything_is_refused_even_without_its_checksum(data: st.DataObject) -> None:
    index = INDEX.encode()
    cut = data.draw(st.integers(0, len(index) - 1))
    tail = data.draw(st.binary(min_size=1, max_size=40))
    for value in (index[:cut], index + tail):
        with pytest.raises(RdmaloadError):
            Index.decode(value)


@given(st.binary(max_size=64), st.integers(0, 2**32 - 1))
def test_crc32c_is_the_polynomials_whatever_the_length(data: bytes, start: int) -> None:
    crc = start ^ 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    assert crc32c(data, start) == crc ^ 0xFFFFFFFF

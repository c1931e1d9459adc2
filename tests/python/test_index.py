"""The index: round trips, every rule of the format, hostile bytes, and the cost of a big one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdmaload.connectors import connector_for
from rdmaload.connectors.connector import FileConnector
from rdmaload.errors import FormatError, NotFoundError, NotSupportedError
from rdmaload.index import Index, IndexFile, check_path, chunk_key, index_key, index_of_files

HEADER = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
FILES = [
    IndexFile("a.safetensors", 8 + len(HEADER) + 4, 4, 0, HEADER, {"b": "a"}),
    IndexFile("config.json", 2, 0),
    IndexFile("empty", 0, 7),
    IndexFile("sub/model.safetensors", 1001, 9, 1, HEADER),
]
CHUNKS = 5 + 1 + 0 + 63
CRCS = bytes(range(4 * CHUNKS % 256)) + bytes(4 * CHUNKS - 4 * CHUNKS % 256)
INDEX = Index.of(FILES, chunk_bytes=16, crcs=CRCS)


def file_of(**changes: Any) -> dict[str, Any]:
    fields = {"path": "a", "size": 20, "number": 0, "rank": None, "header_bytes": 0, **changes}
    return {name: value for name, value in fields.items() if value is not ...}


def value_of(meta: object, tail: bytes = b"", *, magic: bytes = b"RDMALOAD", version: int = 1) -> bytes:
    text = meta if isinstance(meta, bytes) else json.dumps(meta).encode()
    return struct.pack("<8sII", magic, version, len(text)) + text + tail


def meta_of(*files: dict[str, Any], chunk_bytes: Any = 16) -> dict[str, Any]:
    return {"chunk_bytes": chunk_bytes, "files": list(files)}


def test_the_stored_bytes() -> None:
    file = IndexFile("a.safetensors", 8 + len(HEADER) + 4, 3, None, HEADER)
    meta = b'{"chunk_bytes":100,"files":[{"header_bytes":53,"number":3,"path":"a.safetensors","rank":null,"size":65}]}'
    index = Index.of([file], chunk_bytes=100, crcs=b"\x01\x02\x03\x04")
    assert index.encode() == b"RDMALOAD\x01\0\0\0" + struct.pack("<I", len(meta)) + meta + b"\x01\x02\x03\x04" + HEADER
    assert index.crc(index.files[0], 0) == 0x04030201


def test_keys() -> None:
    assert index_key("m", "g") == "m/chunks/g/index"
    assert chunk_key("o/m", "g", 3, 14) == "o/m/chunks/g/3/14"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_is_encoded_is_decoded(kind: Any) -> None:
    value = kind(INDEX.encode())
    decoded = Index.decode(value)
    assert decoded == INDEX
    assert decoded.encode() == value
    assert [file.first_chunk for file in decoded.files] == [0, 5, 6, 6]
    assert [file.chunk_count(16) for file in decoded.files] == [5, 1, 0, 63]
    assert (decoded.total_bytes, decoded.total_chunks) == (sum(file.size for file in FILES), CHUNKS)
    assert decoded.files[0].tied == {"b": "a"}
    assert pickle.loads(pickle.dumps(decoded)) == decoded


def test_a_decoded_index_does_not_follow_its_buffer() -> None:
    buffer = bytearray(INDEX.encode())
    decoded = Index.decode(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    assert decoded == INDEX


def test_weight_files_by_rank() -> None:
    assert [file.path for file in INDEX.weight_files()] == [
        "a.safetensors",
        "sub/model.safetensors",
    ]
    assert [file.path for file in INDEX.weight_files(1)] == ["sub/model.safetensors"]
    assert INDEX.weight_files(5) == ()


def test_an_index_can_say_that_checksums_are_pending() -> None:
    index = Index.of(FILES, chunk_bytes=16, checksums_pending=True)
    encoded = index.encode()
    assert Index.decode(encoded) == index != INDEX
    assert len(INDEX.encode()) - len(encoded) == len(CRCS) - len(',"checksums":"pending"')
    with pytest.raises(IndexError, match="no checksum"):
        index.crc(index.files[0], 0)
    with pytest.raises(FormatError, match="bytes of checksums"):
        Index.of(FILES, chunk_bytes=16, crcs=CRCS, checksums_pending=True)
    with pytest.raises(FormatError, match="do not add up"):
        Index.decode(value_of({"checksums": "pending", **meta_of(file_of())}, bytes(8)))
    for other in ("Pending", "", None, True, 1):
        with pytest.raises(FormatError, match="checksums"):
            Index.decode(value_of({"checksums": other, **meta_of(file_of())}))


def test_checksums_stay_inside_their_file() -> None:
    last = INDEX.files[0].chunk_count(16) - 1
    assert INDEX.crc(INDEX.files[0], last) == int.from_bytes(CRCS[4 * last : 4 * last + 4], "little")
    for chunk in (-1, last + 1):
        with pytest.raises(IndexError):
            INDEX.crc(INDEX.files[0], chunk)


GOOD = value_of(meta_of(file_of()), bytes(8))


def test_the_pattern_of_the_refusals_is_itself_good() -> None:
    assert Index.decode(GOOD).files[0].size == 20


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"RDMALOAD",
        GOOD[:15],
        GOOD[:-1],
        GOOD + b"\0",
        value_of(meta_of(file_of()), bytes(8), magic=b"RDMALOAX"),
        struct.pack("<8sII", b"RDMALOAD", 1, 2**32 - 1) + b"{}",
        value_of([]),
        value_of({"files": []}),
        value_of({"chunk_bytes": 1, "files": [], "more": 1}),
        value_of({"chunk_bytes": 1, "files": {}}),
        value_of(b'{"chunk_bytes":16,"files":[],"files":[]}'),
        value_of(b"\xff"),
        value_of(b"["),
        value_of(b"[" * 1_000_000),
        value_of(b'{"a":' * 200_000),
        value_of(b'{"chunk_bytes":' + b"9" * 5000 + b',"files":[]}'),
        value_of(b'{"chunk_bytes":1e3,"files":[]}'),
        value_of(b'{"chunk_bytes":NaN,"files":[]}'),
        *(value_of(meta_of(chunk_bytes=wrong)) for wrong in (0, -1, True, None, "16", 2**29 + 1)),
        *(
            value_of(meta_of(file_of(**changes)), bytes(8))
            for changes in (
                {"extra": 1},
                {"rank": ...},
                {"tied": {}},
                {"tied": []},
                {"tied": {"a": "b"}},  # without a header
                {"size": -1},
                {"size": True},
                {"size": 2**53},
                {"size": 2**60},
                {"number": -1},
                {"number": None},
                {"rank": -1},
                {"rank": True},
                {"rank": "0"},
                {"header_bytes": 10**8 + 1},
                {"header_bytes": 1},
                {"path": 5},
                {"path": ""},
                {"path": "/etc/passwd"},
                {"path": "../a"},
                {"path": "a/.."},
                {"path": "a/../b"},
                {"path": "./a"},
                {"path": "a/"},
                {"path": "a//b"},
                {"path": "a\0"},
                {"path": "a" * 4097},
                {"path": "\ud800"},
            )
        ),
        value_of(meta_of(file_of(), file_of(number=1)), bytes(16)),
        value_of(meta_of(file_of(), file_of(path="b")), bytes(16)),
        value_of(meta_of(file_of(), file_of(path="a/b", number=1)), bytes(16)),
        value_of(
            meta_of(file_of(), file_of(path="a!", number=1), file_of(path="a/b/c", number=2)),
            bytes(24),
        ),
        value_of(meta_of(file_of(header_bytes=13)), bytes(8 + 13)),
        value_of(meta_of(file_of(header_bytes=2, tied={"x": "x"})), bytes(8 + 2)),
        value_of(meta_of(file_of(header_bytes=2, tied={"x": 1})), bytes(8 + 2)),
        value_of(meta_of(*(file_of(path=str(i), number=i, size=2**52) for i in range(3)), chunk_bytes=2**29)),
    ],
)
def test_what_breaks_a_rule_is_a_format_error(value: bytes) -> None:
    with pytest.raises(FormatError, match=r"^index: "):
        Index.decode(value)


def test_a_newer_version_says_what_to_do() -> None:
    with pytest.raises(NotSupportedError, match="version 2, and this release reads version 1: upgrade"):
        Index.decode(value_of(meta_of(), version=2))


def test_what_breaks_a_rule_is_not_encoded() -> None:
    wrong = [
        dataclasses.replace(INDEX, crcs=CRCS[:-1]),
        dataclasses.replace(INDEX, chunk_bytes=None),
        dataclasses.replace(INDEX, files=tuple(FILES)),  # first_chunk is not set
        Index((IndexFile("../a", 0),), 16),
        Index((IndexFile("a", 20, 0, None, b"{}", {"x\ud800": "a"}),), 16, bytes(8)),
    ]
    for index in wrong:
        with pytest.raises(FormatError):
            index.encode()
    with pytest.raises(FormatError):
        Index.of([IndexFile("a", 20)], chunk_bytes=16, crcs=b"")


def test_names_that_only_look_alike_are_not_a_directory() -> None:
    for name in ("a-b", "a.b", "ab", "a!/c"):
        check_path(name)
        Index.of([IndexFile("a", 0, 0), IndexFile(name, 0, 1), IndexFile("b/a", 0, 2)], chunk_bytes=16)
    for name in ("..a", "a..", "...", ".a/b."):
        check_path(name)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_our_errors(data: bytes) -> None:
    for value in (
        data,
        b"RDMALOAD\x01\0\0\0" + data,
        value_of(data),
        value_of(meta_of(file_of()), data[:20]),
    ):
        with contextlib.suppress(FormatError, NotSupportedError):
            Index.decode(value)


@settings(max_examples=300)
@given(st.data())
def test_damage_anywhere_raises_only_our_errors(data: st.DataObject) -> None:
    value = bytearray(INDEX.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(value) - 1))
        value[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError, NotSupportedError):
        Index.decode(value)


paths = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3).map("/".join)


@given(st.dictionaries(paths, st.integers(0, 500), max_size=6), st.integers(1, 64), st.randoms())
def test_any_valid_index_survives_the_round_trip(sizes: dict[str, int], chunk_bytes: int, random: Any) -> None:
    files = []
    for number, (path, size) in enumerate(sizes.items()):
        header = random.randbytes(random.randint(2, size - 8)) if size >= 10 and random.random() < 0.5 else None
        tied = {"alias": "name"} if header and random.random() < 0.5 else {}
        files.append(IndexFile(path, size, number, random.choice([None, 0, 3]), header, tied))
    crcs = random.randbytes(4 * sum(file.chunk_count(chunk_bytes) for file in files))
    try:
        index = Index.of(files, chunk_bytes=chunk_bytes, crcs=crcs)
    except FormatError:
        return
    assert Index.decode(index.encode()) == index


def test_an_index_of_a_terabyte_decodes_in_well_under_a_second() -> None:
    chunk_bytes = 2**20 - 4096
    size = 1000 * chunk_bytes
    names = {
        f"model.layers.{i}.mlp.experts.proj.weight": {
            "dtype": "BF16",
            "shape": [4, 4],
            "data_offsets": [0, 32],
        }
        for i in range(100)
    }
    header = json.dumps(names, separators=(",", ":")).encode()
    files = [IndexFile(f"model-{i:05}-of-01000.safetensors", size, i, None, header) for i in range(1000)]
    value = Index.of(files, chunk_bytes=chunk_bytes, crcs=bytes(4 * 1_000_000)).encode()
    started = time.perf_counter()
    index = Index.decode(value)
    seconds = time.perf_counter() - started
    assert index.total_chunks == 1_000_000
    assert seconds < 0.5


def test_many_paths_of_many_segments_are_checked_in_linear_time() -> None:
    files = [file_of(path="/".join("x" * 1000) + f"/{i}", size=0, number=i) for i in range(2000)]
    started = time.perf_counter()
    assert len(Index.decode(value_of(meta_of(*files))).files) == 2000
    assert time.perf_counter() - started < 2


def safetensors(*, length: int | None = None, header: bytes = HEADER, body: bytes = b"abcd") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def test_the_index_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors())
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.safetensors").write_bytes(b"a plain file here")
    with connector_for(tmp_path) as connector:
        assert isinstance(connector, FileConnector)
        index = index_of_files(connector)
    assert [(file.path, file.header, file.rank) for file in index.files] == [
        ("config.json", None, None),
        ("model.safetensors", HEADER, None),
        ("sub/other.safetensors", None, None),
    ]
    assert (index.chunk_bytes, index.crcs, index.total_chunks) == (None, b"", 0)


@pytest.mark.parametrize("header_bytes", [len(HEADER), 65527, 65528, 65529, 200_000])
def test_a_header_of_any_length_takes_one_read_or_two(
    tmp_path: Path, header_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = HEADER + b" " * (header_bytes - len(HEADER))
    (tmp_path / "model.safetensors").write_bytes(safetensors(header=header))
    with connector_for(tmp_path) as connector:
        assert isinstance(connector, FileConnector)
        reads = []
        read_into = connector.read_into

        def counted(path: str, offset: int, into: memoryview) -> int:
            reads.append((offset, len(into)))
            return read_into(path, offset, into)

        monkeypatch.setattr(connector, "read_into", counted)
        assert index_of_files(connector).files[0].header == header
    assert len(reads) == (1 if header_bytes <= 65536 - 8 else 2)
    assert sum(length for _, length in reads) <= max(65536, 8 + header_bytes)


def test_shards_of_a_directory_get_their_rank_only_all_together(tmp_path: Path) -> None:
    for rank, part in ((0, 0), (0, 1), (10, 0)):
        (tmp_path / f"model-rank-{rank}-part-{part}.safetensors").write_bytes(safetensors())
    with connector_for(tmp_path) as connector:
        assert isinstance(connector, FileConnector)
        assert [file.rank for file in index_of_files(connector).files] == [0, 0, 10]
        (tmp_path / "z.safetensors").write_bytes(safetensors())
        assert [file.rank for file in index_of_files(connector).files] == [None] * 4


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        safetensors(length=2**63),
        safetensors(length=100),
        safetensors(length=1),
        safetensors(length=0),
    ],
)
def test_a_header_that_cannot_be_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with connector_for(tmp_path) as connector:
        assert isinstance(connector, FileConnector)
        with pytest.raises(FormatError, match=r"m\.safetensors") as caught:
            index_of_files(connector)
    assert caught.value.key == "m.safetensors"


def test_only_files_that_the_weight_map_names_count(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_bytes(safetensors())
    listing = tmp_path / "model.safetensors.index.json"
    listing.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with connector_for(tmp_path) as connector:
        assert isinstance(connector, FileConnector)
        assert [file.path for file in index_of_files(connector).weight_files()] == ["model-1.safetensors"]
        listing.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "gone.safetensors"}}))
        with pytest.raises(FormatError, match=r"names gone\.safetensors, which is not there") as caught:
            index_of_files(connector)
        assert caught.value.key == "gone.safetensors"
        for wrong in ("", "[]", "{}", '{"weight_map":[]}', '{"weight_map":{"a":1}}', "[" * 100_000):
            listing.write_text(wrong)
            with pytest.raises(FormatError, match=r"model.safetensors.index.json cannot be used"):
                index_of_files(connector)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with connector_for(tmp_path / "none") as connector:
        assert isinstance(connector, FileConnector)
        with pytest.raises(NotFoundError):
            index_of_files(connector)

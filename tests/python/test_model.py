"""Loading: byte-equal from every store, memory that the caller owns, and the rules of ranks, filters and options."""

from __future__ import annotations

import gc
import hashlib
import io
import itertools
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import rdmaload
from rdmaload import _core
from rdmaload.connectors import KeyValueConnector, connector_for
from rdmaload.connectors.memory import forget_store
from rdmaload.errors import (
    AuthenticationError,
    FormatError,
    IntegrityError,
    LayoutMismatchError,
    MemoryLimitError,
    NotFoundError,
    NotSupportedError,
    RdmaloadError,
    UnavailableError,
)
from rdmaload.stats import LoadStats, Progress
from tests.support.checkpoints import (
    Checkpoint,
    compare,
    make_checkpoint,
    many_tensors,
    one_large_tensor,
    write_safetensors,
)
from tests.support.servers import RedisServer, ServerError

MIB = 1 << 20

# Puts a directory into the store and gives the url to load it from.
Place = Callable[[Path], str]


@pytest.fixture(params=["redis", "memory", "directory"])
def place(request: pytest.FixtureRequest, model: str) -> Iterator[Place]:
    def put(directory: Path) -> str:
        if request.param == "directory":
            return str(directory)
        if request.param == "redis":
            server: RedisServer = request.getfixturevalue("redis_server")
            url = server.url(model)
        else:
            url = f"memory://{model}/m"
        rdmaload.save(directory, url)
        return url

    yield put
    forget_store(model)


@pytest.fixture
def memory_url(model: str) -> Iterator[str]:
    yield f"memory://{model}/m"
    forget_store(model)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Names in the same order, dtypes, shapes and bytes (bytes, as random bits hold NaNs)."""
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert raw(tensor) == raw(expected[name]), name


def load_files(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """What safetensors gives, in the order file, then offset."""
    state: dict[str, torch.Tensor] = {}
    for path in checkpoint.weight_files:
        state |= load_file(path)
    return {name: state[name] for name in checkpoint.tensors}


def assert_owned(state: dict[str, torch.Tensor]) -> None:
    """Every tensor is a storage of its own, of its own size, aligned, and overlaps no other."""
    spans = []
    for name, tensor in state.items():
        assert tensor.is_contiguous(), name
        assert tensor.storage_offset() == 0, name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
        assert not tensor._is_view(), name
        assert tensor.data_ptr() % 64 == 0, name
        if tensor.nbytes:
            spans.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
    spans.sort()
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


# ---- the bytes of the files ------------------------------------------------------------------------------------------


def test_every_store_gives_the_bytes_of_the_files(place: Place, tiny_checkpoint: Checkpoint) -> None:
    url = place(tiny_checkpoint.directory)
    stats = LoadStats()
    state = rdmaload.load(url, stats=stats)
    assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
    assert_same(state, load_files(tiny_checkpoint))
    assert_owned(state)
    assert stats.bytes == tiny_checkpoint.bytes
    assert stats.seconds > 0
    assert stats.gb_per_s > 0
    assert {"open", "plan", "read", "checksum", "export"} <= set(stats.stages)
    assert stats.retries == 0
    assert stats.fallback_reason is None
    if url.startswith("/"):
        assert (stats.path, stats.generation) == ("file-buffered", None)
        assert (stats.verified_bytes, stats.unverified_bytes) == (0, stats.read_bytes)
    else:
        assert stats.path == ("resp-tcp" if url.startswith("redis") else "python")
        assert stats.generation is not None
        assert (stats.verified_bytes, stats.unverified_bytes) == (stats.read_bytes, 0)


def test_every_dtype_and_empty_and_scalar_tensors(place: Place, all_dtypes_checkpoint: Checkpoint) -> None:
    state = rdmaload.load(place(all_dtypes_checkpoint.directory))
    assert compare(state, all_dtypes_checkpoint.directory) == all_dtypes_checkpoint.bytes
    assert list(state) == list(all_dtypes_checkpoint.tensors)
    assert_owned(state)
    not_in_torch = set()
    (path,) = all_dtypes_checkpoint.weight_files
    with safe_open(path, "pt") as opened:
        for name, spec in all_dtypes_checkpoint.tensors.items():
            try:
                expected = opened.get_tensor(name)
            except (SafetensorError, AttributeError, KeyError):
                # What torch has no type for is the raw bytes, in one dimension.
                not_in_torch.add(spec.dtype)
                assert (state[name].dtype, state[name].shape) == (torch.uint8, (spec.bytes,)), name
                continue
            assert (state[name].dtype, state[name].shape) == (expected.dtype, expected.shape), name
            assert raw(state[name]) == raw(expected), name
    assert not_in_torch == {"F6_E2M3", "F6_E3M2"}


def test_20_000_tiny_tensors(place: Place, many_tensors_checkpoint: Checkpoint) -> None:
    stats = LoadStats()
    state = rdmaload.load(place(many_tensors_checkpoint.directory), stats=stats)
    assert len(state) == 20_000
    assert compare(state, many_tensors_checkpoint.directory) == many_tensors_checkpoint.bytes
    assert_owned(state)


def test_making_tensors_does_not_set_off_collections(many_tensors_checkpoint: Checkpoint) -> None:
    collections: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        collections.append(phase)

    directory = many_tensors_checkpoint.directory
    gc.callbacks.append(note)
    try:
        state = rdmaload.load(directory)
        few = collections.count("start")
        assert gc.isenabled()
        gc.disable()
        rdmaload.load(directory)
        assert not gc.isenabled()
    finally:
        gc.callbacks.remove(note)
        gc.enable()
    assert few < len(state) / gc.get_threshold()[0] / 2


def test_1_000_files(place: Place, many_files_checkpoint: Checkpoint) -> None:
    state = rdmaload.load(place(many_files_checkpoint.directory))
    assert len(state) == 1_000
    assert compare(state, many_files_checkpoint.directory) == many_files_checkpoint.bytes


@pytest.mark.slow
def test_a_tensor_above_512_mib(tmp_path: Path) -> None:
    # More than a value of Redis may hold, and than an arena of several tensors.
    checkpoint = one_large_tensor(tmp_path / "large")
    assert checkpoint.bytes > 512 * MIB
    with RedisServer() as server:
        rdmaload.save(checkpoint.directory, server.url("large"))
        for url in (server.url("large"), str(checkpoint.directory)):
            state = rdmaload.load(url)
            assert compare(state, checkpoint.directory) == checkpoint.bytes
            assert_owned(state)
            del state


@pytest.mark.parametrize("chunk_bytes", [1000, 4096, 100_000])
def test_any_chunk_size(memory_url: str, tiny_checkpoint: Checkpoint, chunk_bytes: int) -> None:
    rdmaload.save(tiny_checkpoint.directory, memory_url, chunk_bytes=chunk_bytes)
    state = rdmaload.load(memory_url, include="model.layers.0.*")
    expected = {name: t for name, t in load_files(tiny_checkpoint).items() if name.startswith("model.layers.0.")}
    assert_same(state, expected)


def test_chunks_smaller_than_a_tensor_and_larger_than_a_file(memory_url: str, tmp_path: Path) -> None:
    state = {f"t{i}": torch.arange(i * 7, dtype=torch.int16) for i in range(30)} | {"s": torch.tensor(3.5)}
    for chunk_bytes in (1, 2, 63, 64, 65, 10_000_000):
        rdmaload.save(state, memory_url, chunk_bytes=chunk_bytes)
        loaded = rdmaload.load(memory_url)
        assert {name: t.tolist() for name, t in loaded.items()} == {name: t.tolist() for name, t in state.items()}


def test_a_repository_with_a_second_copy_of_the_weights(place: Place, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "m", {"a": ("F32", [10]), "b": ("F32", [20])}, files=2)
    write_safetensors(checkpoint.directory / "consolidated.safetensors", {"other": ("F32", [5])})
    state = rdmaload.load(place(checkpoint.directory))
    assert set(state) == {"a", "b"}


def test_a_name_in_two_files_is_refused_with_both(place: Place, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "one.safetensors", {"a": ("F32", [10])})
    write_safetensors(tmp_path / "two.safetensors", {"a": ("F32", [10])})
    with pytest.raises(FormatError, match=r"tensor a is in one\.safetensors and in two\.safetensors"):
        rdmaload.load(place(tmp_path))


def test_a_model_without_weight_files_says_so(place: Place, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    url = place(tmp_path)
    with pytest.raises(NotFoundError, match="no weight files"):
        rdmaload.load(url)
    with rdmaload.open(url) as opened:  # its files can be had all the same
        assert [file.path for file in opened.files] == ["pytorch_model.bin"]


def test_an_empty_checkpoint_is_an_empty_dict(place: Place, tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    url = place(tmp_path)
    stats = LoadStats()
    assert rdmaload.load(url, stats=stats) == {}
    assert (stats.bytes, stats.read_bytes) == (0, 0)
    assert list(rdmaload.weight_iterator(url)) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file"),
        (b"1234567", "no safetensors file"),
        (b"\xff" * 8 + b"{}", "no safetensors file"),
        ((2).to_bytes(8, "little") + b"{", "no safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "safetensors"),
        ((2).to_bytes(8, "little") + b"{}more", "safetensors"),
    ],
)
def test_a_damaged_weight_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        rdmaload.load(tmp_path)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}},  # shape and range differ
        {"a": {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}},  # past the end
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},  # a gap
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},  # an overlap
        },
    ],
)
def test_a_lying_header_is_refused(tmp_path: Path, header: dict[str, object]) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        rdmaload.load(tmp_path)


def test_a_file_that_shrinks_after_opening_is_an_error_not_zeros(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "m", {"a": ("F32", [100_000])})
    with rdmaload.open(checkpoint.directory, retry_timeout=0.05) as opened:
        os.truncate(checkpoint.weight_files[0], 1000)
        with pytest.raises(IntegrityError, match="truncated"):
            opened.load()
        checkpoint.weight_files[0].unlink()
    with rdmaload.open(make_checkpoint(tmp_path / "n", {"a": ("F32", [100])}).directory) as opened:
        (tmp_path / "n" / "model.safetensors").unlink()
        with pytest.raises(NotFoundError, match=r"model\.safetensors"):
            opened.load()


# ---- servers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("connections", [1, 3])
def test_both_protocols_and_any_number_of_connections(
    redis_url: str, tiny_checkpoint: Checkpoint, protocol: int, connections: int
) -> None:
    rdmaload.save(tiny_checkpoint.directory, redis_url, protocol=protocol)
    stats = LoadStats()
    state = rdmaload.load(redis_url, protocol=protocol, connections=connections, stats=stats)
    assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
    assert (stats.path, stats.connections) == ("resp-tcp", connections)


def test_a_few_bytes_in_flight_are_enough(redis_url: str, tiny_checkpoint: Checkpoint) -> None:
    rdmaload.save(tiny_checkpoint.directory, redis_url)
    state = rdmaload.load(redis_url, bytes_in_flight=1, connections=2)
    assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes


@pytest.mark.parametrize("protocol", [2, 3])
def test_passwords_users_and_databases(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    with RedisServer(password="p@ss w/rd", users=["alice on >wonder ~* +@all"]) as server:
        host = f"{server.host}:{server.port}"
        save_url = f"redis://:p%40ss%20w%2Frd@{host}/m?db=1"
        rdmaload.save(tiny_checkpoint.directory, save_url)
        (tmp_path / "secret").write_text("wonder\n")
        monkeypatch.setenv("MODEL_STORE_PASSWORD", "wonder")
        for url in (
            save_url,
            f"redis://alice:wonder@{host}/m?db=1",
            f"redis://alice@{host}/m?db=1&password_file={tmp_path / 'secret'}",
            f"redis://alice@{host}/m?db=1&password_env=MODEL_STORE_PASSWORD",
            f"valkey://alice:wonder@{host}/m?db=1",
        ):
            state = rdmaload.load(url, protocol=protocol)
            assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
        for url in (f"redis://alice:wrong@{host}/m?db=1", f"redis://{host}/m?db=1"):
            with pytest.raises(AuthenticationError) as caught:
                rdmaload.load(url, protocol=protocol)
            assert "wrong" not in str(caught.value).replace("WRONGPASS", "")
        with pytest.raises(NotFoundError, match="no model at"):  # another database
            rdmaload.load(f"redis://alice:wonder@{host}/m", protocol=protocol)


def test_a_password_that_changes_after_opening(tiny_checkpoint: Checkpoint) -> None:
    # The connections of the native transport log in by themselves.
    with RedisServer(password="before") as server:
        rdmaload.save(tiny_checkpoint.directory, server.url("m"))
        with rdmaload.open(server.url("m")) as opened:
            with server.client() as client:
                client.config_set("requirepass", "after")
            with pytest.raises(AuthenticationError, match="AUTH") as caught:
                opened.load()
            assert "before" not in str(caught.value)


def test_a_user_who_may_not_read(tiny_checkpoint: Checkpoint) -> None:
    with RedisServer(users=["bob on >pw ~m/manifest ~m/chunks/*/index +@all"]) as server:
        rdmaload.save(tiny_checkpoint.directory, server.url("m"))
        with (
            rdmaload.open(f"redis://bob:pw@{server.host}:{server.port}/m") as opened,
            pytest.raises(AuthenticationError, match=r"m/chunks/\w+/\d+/\d+.*NOPERM"),
        ):
            opened.load()


@pytest.mark.parametrize("host", ["::1", "localhost"])
def test_addresses(tiny_checkpoint: Checkpoint, host: str) -> None:
    bind = "127.0.0.1" if host == "localhost" else host
    if bind == "::1":
        try:
            socket.create_server((bind, 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("no IPv6 on this machine")
    try:
        server = RedisServer(host=bind)
    except ServerError as err:
        pytest.skip(str(err).splitlines()[0])
    with server:
        url = f"redis://{f'[{host}]' if ':' in host else host}:{server.port}/m"
        rdmaload.save(tiny_checkpoint.directory, url)
        assert compare(rdmaload.load(url), tiny_checkpoint.directory) == tiny_checkpoint.bytes


# ---- ranks -----------------------------------------------------------------------------------------------------------


def shard(rank: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((1000,), float(rank)), f"only.{rank}": torch.arange(rank + 5)}


@pytest.fixture
def sharded(memory_url: str) -> str:
    for rank in range(3):
        rdmaload.save(shard(rank), memory_url, rank=rank, world_size=3, save_id="job-1", chunk_bytes=512)
    return memory_url


def test_each_rank_gets_its_own_tensors(sharded: str) -> None:
    with rdmaload.open(sharded) as opened:
        assert (opened.kind, opened.world_size) == ("sharded", 3)
        for rank in range(3):
            assert set(opened.rank_tensors(rank)) == set(shard(rank))
            state = opened.load(rank=rank)
            assert_same({name: state[name] for name in shard(rank)}, shard(rank))
            assert {name for name, _ in opened.weight_iterator(rank)} == set(shard(rank))


def test_no_rank_of_several_is_a_mismatch(sharded: str) -> None:
    with rdmaload.open(sharded) as opened:
        for call in (
            opened.load,
            opened.weight_iterator,  # from the call, not from the first next()
            lambda: opened.load_into({}),
            lambda: opened.tensors,
        ):
            with pytest.raises(LayoutMismatchError, match="sharded over 3 ranks"):
                call()
        for rank in (-1, 3):
            with pytest.raises(LayoutMismatchError, match=f"no rank {rank}"):
                opened.load(rank=rank)


def test_one_shard_needs_no_rank(memory_url: str) -> None:
    rdmaload.save(shard(0), memory_url, rank=0, world_size=1)
    for rank in (None, 0):
        assert set(rdmaload.load(memory_url, rank=rank)) == set(shard(0))
    with pytest.raises(LayoutMismatchError, match="no rank 1"):
        rdmaload.load(memory_url, rank=1)


def test_a_checkpoint_gives_all_to_every_rank(place: Place, tiny_checkpoint: Checkpoint) -> None:
    url = place(tiny_checkpoint.directory)
    for rank in (0, 7):
        assert compare(rdmaload.load(url, rank=rank), tiny_checkpoint.directory) == tiny_checkpoint.bytes


def test_a_directory_of_shards(sharded: str, tmp_path: Path) -> None:
    rdmaload.save(sharded, tmp_path / "copy")
    with rdmaload.open(tmp_path / "copy") as opened:
        assert (opened.kind, opened.world_size) == ("sharded", 3)
        with pytest.raises(LayoutMismatchError, match="sharded over 3 ranks"):
            opened.load()
        for rank in range(3):
            state = opened.load(rank=rank)
            assert_same({name: state[name] for name in shard(rank)}, shard(rank))


def test_a_rank_reads_only_its_files(redis_server: RedisServer, redis_url: str, model: str) -> None:
    for rank in range(2):
        rdmaload.save(shard(rank), redis_url, rank=rank, world_size=2, save_id="job")
    with rdmaload.open(redis_url) as opened, redis_server.client() as client:
        for file in opened.files:
            if file.rank == 1:
                assert client.delete(f"{model}/chunks/{opened.generation}/{file.number}/0") == 1
        assert set(opened.load(rank=0)) == set(shard(0))
        with pytest.raises(NotFoundError, match="evicted"):
            opened.load(rank=1)


# ---- filters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, "abcd"),
        ("a", None, "a"),
        (["a", "c"], None, "ac"),
        ("[ab]", None, "ab"),
        ("A", None, ""),  # case matters
        (None, "a", "bcd"),
        ("*", ["b", "c"], "ad"),
        ("nothing*", None, ""),
        ([], None, ""),
        (None, [], "abcd"),
    ],
)
def test_filters(place: Place, tmp_path: Path, include: object, exclude: object, expected: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "m", {name: ("U8", [100]) for name in "abcd"}, files=2)
    url = place(checkpoint.directory)
    stats = LoadStats()
    state = rdmaload.load(url, include=include, exclude=exclude, stats=stats)
    assert "".join(state) == expected
    full = rdmaload.load(url)
    assert_same(state, {name: full[name] for name in expected})
    assert stats.bytes == 100 * len(expected)


def test_filters_act_before_anything_is_read(place: Place, tmp_path: Path) -> None:
    tensors = {f"layer.{i}": ("F32", [500_000]) for i in range(8)}  # 2 MB each, 16 MB in all
    checkpoint = make_checkpoint(tmp_path / "m", tensors, files=2)
    url = place(checkpoint.directory)
    stats = LoadStats()
    rdmaload.load(url, include="layer.5", stats=stats)
    assert stats.bytes == 2_000_000
    # Whole chunks at both ends where there are chunks, the bytes alone where there are none.
    most = 2_000_000 + (0 if url.startswith("/") else 2 * 2**20)
    assert 2_000_000 <= stats.read_bytes <= most


def test_a_filtered_load_does_not_need_the_other_files(
    redis_server: RedisServer, redis_url: str, model: str, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "m", {"a": ("F32", [1000]), "b": ("F32", [1000])}, files=2)
    rdmaload.save(checkpoint.directory, redis_url)
    with rdmaload.open(redis_url) as opened, redis_server.client() as client:
        second = next(file for file in opened.files if file.path == "model-00002-of-00002.safetensors")
        client.delete(f"{model}/chunks/{opened.generation}/{second.number}/0")
        assert set(opened.load(include="a")) == {"a"}
        assert set(opened.load(exclude="b")) == {"a"}
        with pytest.raises(NotFoundError):
            opened.load()


def test_a_name_and_a_pattern_may_look_alike() -> None:
    # What has wildcards is a pattern, also when a tensor is called so; the others only match themselves.
    source = {name: torch.zeros(1) for name in ("a[0]", "a0", "b", "B")}
    rdmaload.save(source, "memory://literal/m")
    with rdmaload.open("memory://literal/m") as opened:
        assert set(opened.load(include=["a[0]", "b"])) == {"a0", "b"}
        assert set(opened.load(include="a[[]0]")) == {"a[0]"}
        assert set(opened.load(include=["b", "a*"], exclude=["b", "a[[]*"])) == {"a0"}
        assert set(opened.load(exclude=["b", "B"])) == {"a[0]", "a0"}
        assert set(opened.load(include=["b", "B"], exclude="[B]")) == {"b"}


@pytest.mark.parametrize("verify", ["auto", "off"])
def test_a_filter_picks_pieces_of_chunks(redis_url: str, tmp_path: Path, verify: str) -> None:
    # Many small tensors in each chunk, every third wanted: unselected bytes go nowhere.
    checkpoint = make_checkpoint(tmp_path / "m", {f"{i:03}": ("U8", [i % 50]) for i in range(300)})
    rdmaload.save(checkpoint.directory, redis_url, chunk_bytes=1000)
    state = rdmaload.load(redis_url, include=[f"{i:03}" for i in range(0, 300, 3)], verify=verify)
    expected = load_files(checkpoint)
    assert_same(state, {f"{i:03}": expected[f"{i:03}"] for i in range(0, 300, 3)})


# ---- tied tensors ----------------------------------------------------------------------------------------------------


def test_tied_names_are_one_tensor(memory_url: str) -> None:
    embedding = torch.randn(100, 8)
    rdmaload.save({"embed": embedding, "between": torch.zeros(3), "head": embedding}, memory_url)
    stats = LoadStats()
    state = rdmaload.load(memory_url, stats=stats)
    assert set(state) == {"embed", "between", "head"}
    assert torch.equal(state["head"], embedding)
    assert state["head"] is state["embed"]
    assert stats.bytes == embedding.nbytes + 12
    with rdmaload.open(memory_url) as opened:
        assert set(opened.tensors) == {"embed", "between", "head"}
        assert {name for name, _ in opened.weight_iterator()} == {"embed", "between", "head"}
        only = opened.load(include="head")
        assert set(only) == {"head"}
        assert torch.equal(only["head"], embedding)
        half = rdmaload.load(memory_url, dtype=torch.float16)
        assert half["head"] is half["embed"]


# ---- memory that the caller owns -------------------------------------------------------------------------------------


def test_weights_stay_when_everything_else_is_gone(place: Place, tmp_path: Path) -> None:
    shapes = {f"layer.{i}": ("BF16", [50 + i, 1000]) for i in range(20)}
    first = make_checkpoint(tmp_path / "first", shapes, seed=1)
    second = make_checkpoint(tmp_path / "second", shapes, seed=2)
    url = place(first.directory)
    opened = rdmaload.open(url)
    state = opened.load()
    streamed = dict(opened.weight_iterator(window_bytes=300_000))
    opened.close()
    gone = weakref.ref(opened)
    del opened
    gc.collect()
    assert gone() is None
    # The same shapes again, in the memory that a buffer of ours would be in.
    other_url = place(second.directory)
    other = rdmaload.load(other_url)
    dict(rdmaload.weight_iterator(other_url, window_bytes=300_000))
    for name, tensor in rdmaload.weight_iterator(other_url, window_bytes=300_000, borrow=True):
        assert name in other
        del tensor
    for kept in (state, streamed):
        assert compare(kept, first.directory) == first.bytes
        assert_owned(kept)
    assert compare(other, second.directory) == second.bytes


def test_writing_to_one_tensor_changes_no_other(memory_url: str) -> None:
    rdmaload.save({name: torch.full((100,), 1.0) for name in "abc"}, memory_url)
    state = rdmaload.load(memory_url)
    again = rdmaload.load(memory_url)
    state["b"].fill_(7)
    assert all(bool((tensor == (7 if name == "b" else 1)).all()) for name, tensor in state.items())
    assert all(bool((tensor == 1).all()) for tensor in again.values())
    assert not any(tensor.requires_grad for tensor in state.values())


def test_torch_save_of_one_tensor_is_its_size(place: Place, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    state = rdmaload.load(place(tiny_checkpoint.directory))
    for name, tensor in state.items():
        file = io.BytesIO()
        torch.save(tensor, file)
        assert tensor.nbytes < file.tell() < tensor.nbytes + 4096, name
        file.seek(0)
        assert raw(torch.load(file)) == raw(tensor)
    save_file(state, tmp_path / "again.safetensors")  # which refuses tensors that share memory


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def sparse_checkpoint(directory: Path, count: int, tensor_bytes: int) -> Path:
    """Tensors of zeros in a file that takes no place on the disk."""
    header = {
        f"t{i:03}": {
            "dtype": "U8",
            "shape": [tensor_bytes],
            "data_offsets": [i * tensor_bytes, (i + 1) * tensor_bytes],
        }
        for i in range(count)
    }
    text = json.dumps(header).encode()
    directory.mkdir()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + count * tensor_bytes)
    return directory


def test_freeing_tensors_gives_memory_back(tmp_path: Path) -> None:
    root = sparse_checkpoint(tmp_path / "sparse", 20, 32 * MIB)
    gc.collect()
    before = resident_bytes()
    state = rdmaload.load(root)
    assert resident_bytes() - before > 600 * MIB
    # An arena holds at most 256 MiB: one tensor that is kept keeps no more than that.
    kept = {"t010": state.pop("t010")}
    state.clear()
    assert resident_bytes() - before < (256 + 40) * MIB
    assert kept["t010"].sum() == 0
    kept.clear()
    assert resident_bytes() - before < 40 * MIB


def test_a_failed_load_gives_its_memory_back(tmp_path: Path) -> None:
    root = sparse_checkpoint(tmp_path / "sparse", 8, 32 * MIB)
    before = resident_bytes()
    with rdmaload.open(root) as opened:
        os.truncate(root / "model.safetensors", 200 * MIB)
        with pytest.raises(IntegrityError):
            opened.load()
    assert resident_bytes() - before < 40 * MIB


def test_arenas_are_bounded_and_a_larger_tensor_lies_alone() -> None:
    text = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [200 * MIB], "data_offsets": [0, 200 * MIB]},
            "b": {"dtype": "U8", "shape": [300 * MIB], "data_offsets": [200 * MIB, 500 * MIB]},
            "c": {"dtype": "U8", "shape": [1], "data_offsets": [500 * MIB, 500 * MIB + 1]},
            "d": {"dtype": "U8", "shape": [200 * MIB], "data_offsets": [500 * MIB + 1, 700 * MIB + 1]},
        }
    ).encode()
    size = 8 + len(text) + 700 * MIB + 1
    index = _core.TensorIndex()
    index.add_file(0, "f", size, text)
    layout = _core.StoreLayout([("f", size, 0)], 0, False, b"")
    plan = _core.plan_into_arenas(index, layout, range(4), _core.PlanLimits())
    assert plan.region_bytes == [200 * MIB, 300 * MIB, 64 + 200 * MIB]
    assert [placement[1:] for placement in plan.placements()] == [(0, 0), (1, 0), (2, 0), (2, 64)]


def test_a_plan_gives_the_tensors_whose_types_it_is_told_and_leaves_others_and_empty_ones_to_python() -> None:
    text = json.dumps(
        {
            "a": {"dtype": "I16", "shape": [2, 3], "data_offsets": [0, 12]},
            "b": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [12, 16]},
            "c": {"dtype": "I16", "shape": [0, 3], "data_offsets": [16, 16]},
        }
    ).encode()
    size = 8 + len(text) + 16
    index = _core.TensorIndex()
    index.add_file(0, "f", size, text)
    layout = _core.StoreLayout([("f", size, 0)], 0, False, b"")
    plan = _core.plan_into_arenas(index, layout, range(3), _core.PlanLimits())
    arenas = [_core.HostArena(nbytes) for nbytes in plan.region_bytes]
    memoryview(arenas[0])[:12] = bytes(range(12))
    rows = list(plan.exports(index, arenas, {"I16": (0, 16), "no such type": (1, 1)}))
    assert [row[:3] for row in rows] == list(plan.placements())
    assert [row[3] for row in rows] == ["a", "b", "c"]
    assert [row[4] is None for row in rows] == [False, True, True]
    del arenas
    tensor = torch.utils.dlpack.from_dlpack(rows[0][4])
    assert tensor.shape == (2, 3)
    assert tensor.reshape(-1).view(torch.uint8).tolist() == list(range(12))
    with pytest.raises(IndexError):
        next(plan.exports(index, [], {"I16": (0, 16)}))


# ---- options ---------------------------------------------------------------------------------------------------------


def test_verify_require_refuses_a_store_without_checksums(place: Place, tiny_checkpoint: Checkpoint) -> None:
    url = place(tiny_checkpoint.directory)
    if url.startswith("/"):
        with pytest.raises(IntegrityError, match="no checksums"):
            rdmaload.load(url, verify="require")
        return
    stats = LoadStats()
    state = rdmaload.load(url, verify="require", stats=stats)
    assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
    assert stats.verified_bytes == stats.read_bytes


def test_verify_off_is_counted(place: Place, tiny_checkpoint: Checkpoint) -> None:
    stats = LoadStats()
    state = rdmaload.load(place(tiny_checkpoint.directory), verify="off", stats=stats)
    assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
    assert (stats.verified_bytes, stats.unverified_bytes) == (0, stats.read_bytes)


def test_a_generation_of_plain_files_is_not_supported(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(NotSupportedError, match="no generations") as caught:
        rdmaload.open(tiny_checkpoint.directory, generation="0" * 32)
    assert caught.value.url == str(tiny_checkpoint.directory)


def test_the_manifest_can_be_pinned_by_its_sha256(memory_url: str) -> None:
    rdmaload.save({"a": torch.ones(1)}, memory_url)
    with connector_for(memory_url) as connector:
        assert isinstance(connector, KeyValueConnector)
        digest = hashlib.sha256(connector.get("m/manifest") or b"").hexdigest()
    assert set(rdmaload.load(memory_url, manifest_sha256=digest)) == {"a"}
    with pytest.raises(IntegrityError, match="manifest_sha256"):
        rdmaload.load(memory_url, manifest_sha256="0" * 64)


def test_a_load_above_max_host_bytes_is_refused_before_it_begins(redis_url: str, tiny_checkpoint: Checkpoint) -> None:
    rdmaload.save(tiny_checkpoint.directory, redis_url)
    with rdmaload.open(redis_url, max_host_bytes=1_000_000) as opened:
        for call in (opened.load, lambda: opened.load(dtype=torch.float32)):
            stats = opened.stats
            with pytest.raises(MemoryLimitError, match="max_host_bytes is 1000000"):
                call()
            assert opened.stats.read_bytes == 0
            assert opened.stats is not stats
        assert set(opened.load(include="model.norm.*")) == {"model.norm.weight"}
        assert compare(dict(opened.weight_iterator()), tiny_checkpoint.directory) == tiny_checkpoint.bytes


@pytest.mark.parametrize("dtype", ["float32", torch.int8, torch.Tensor])
def test_what_is_no_floating_point_dtype_is_refused(tiny_checkpoint: Checkpoint, dtype: object) -> None:
    with pytest.raises(TypeError, match=r"dtype=.*torch\.bfloat16"):
        rdmaload.load(tiny_checkpoint.directory, dtype=dtype)  # type: ignore[arg-type]


def test_the_meta_device_is_refused(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(rdmaload.DeviceError, match=r"Model\.tensors"):
        rdmaload.load(tiny_checkpoint.directory, device="meta")


def test_dtype_converts_floating_point_tensors(place: Place, tmp_path: Path) -> None:
    stored = {"f": torch.randn(10), "i": torch.arange(3), "b": torch.ones(2, dtype=torch.bfloat16)}
    save_file(stored, tmp_path / "a.safetensors")
    expected = load_file(tmp_path / "a.safetensors")
    state = rdmaload.load(place(tmp_path), dtype=torch.float16)
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "f": torch.float16,
        "i": torch.int64,
        "b": torch.float16,
    }
    assert torch.equal(state["f"], expected["f"].to(torch.float16))
    assert_owned(state)


@pytest.mark.parametrize("call", ["load", "iterate", "convert", "filtered"])
def test_progress_grows_to_its_total(memory_url: str, tiny_checkpoint: Checkpoint, call: str) -> None:
    rdmaload.save(tiny_checkpoint.directory, memory_url)
    seen: list[Progress] = []
    with rdmaload.open(memory_url) as opened:
        if call == "iterate":
            list(opened.weight_iterator(window_bytes=500_000, progress=seen.append))
        elif call == "filtered":
            list(opened.weight_iterator(include="*norm*", window_bytes=1000, progress=seen.append))
        else:
            opened.load(progress=seen.append, dtype=torch.float32 if call == "convert" else None)
    assert {progress.operation for progress in seen} == {"load"}
    assert len({progress.bytes_total for progress in seen}) == 1
    done = [progress.bytes_done for progress in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].bytes_total
    files = len(tiny_checkpoint.weight_files)  # each has a norm
    assert {progress.files_total for progress in seen} == {files}
    assert seen[-1].files_done == files


def test_an_error_in_a_progress_callback_ends_the_load(redis_url: str, tiny_checkpoint: Checkpoint) -> None:
    def fail(progress: Progress) -> None:
        raise ZeroDivisionError

    rdmaload.save(tiny_checkpoint.directory, redis_url)
    with rdmaload.open(redis_url) as opened:
        with pytest.raises(ZeroDivisionError):
            opened.load(progress=fail)
        assert compare(opened.load(), tiny_checkpoint.directory) == tiny_checkpoint.bytes


# ---- the object ------------------------------------------------------------------------------------------------------


def test_what_an_opened_model_says(redis_url: str, tiny_checkpoint: Checkpoint) -> None:
    saved = rdmaload.save(tiny_checkpoint.directory, redis_url)
    with rdmaload.open(redis_url) as opened:
        assert opened.url == redis_url
        assert (opened.kind, opened.world_size, opened.generation) == ("checkpoint", 1, saved.generation)
        assert opened.manifest is not None
        assert {file.path: file.size for file in opened.files} == {
            path.name: path.stat().st_size for path in tiny_checkpoint.directory.iterdir()
        }
        assert {name: (spec.dtype, spec.shape, spec.nbytes) for name, spec in opened.tensors.items()} == {
            name: (spec.dtype, spec.shape, spec.bytes) for name, spec in tiny_checkpoint.tensors.items()
        }
        assert repr(opened) == f"<Model {redis_url} checkpoint, {len(opened.files)} files>"
        stats = LoadStats()
        opened.load(stats=stats)
        assert opened.stats is stats
    assert repr(opened) == f"<Model {redis_url} closed>"


def test_secrets_show_nowhere(tiny_checkpoint: Checkpoint) -> None:
    with RedisServer(password="hunter2") as server:
        rdmaload.save(tiny_checkpoint.directory, server.url("m"))
        with rdmaload.open(server.url("m")) as opened:
            opened.load()
            shown = [repr(opened), opened.url, repr(opened.stats), repr(opened._connector), str(vars(opened))]
        server.kill()
        with pytest.raises(RdmaloadError) as caught:
            rdmaload.load(server.url("m"), connect_timeout=0.05, retry_timeout=0.05)
        shown += [str(caught.value), repr(caught.value), str(caught.value.url)]
        assert not [text for text in shown if "hunter2" in text]


def test_close_is_idempotent_and_use_after_it_is_one_clear_error(place: Place, tiny_checkpoint: Checkpoint) -> None:
    url = place(tiny_checkpoint.directory)
    opened = rdmaload.open(url)
    state = opened.load()
    opened.close()
    opened.close()
    for call in (
        opened.load,
        opened.weight_iterator,
        opened.verify,
        opened.pull_files,
        lambda: opened.load_into({}),
        lambda: opened.tensors,
        opened.__enter__,
    ):
        with pytest.raises(UnavailableError, match="is closed: open it again"):
            call()
    assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes


def test_threads_share_a_model(place: Place, tiny_checkpoint: Checkpoint) -> None:
    failures: list[BaseException] = []
    with rdmaload.open(place(tiny_checkpoint.directory)) as opened:

        def work(number: int) -> None:
            try:
                state = opened.load() if number % 2 else dict(opened.weight_iterator(window_bytes=500_000))
                assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_verify_reads_everything_and_keeps_nothing(place: Place, tiny_checkpoint: Checkpoint) -> None:
    seen: list[Progress] = []
    with rdmaload.open(place(tiny_checkpoint.directory)) as opened:
        stats = opened.verify(progress=seen.append)
        assert stats.bytes == stats.read_bytes == tiny_checkpoint.file_bytes
        checked = 0 if opened.generation is None else stats.bytes
        assert (stats.verified_bytes, stats.unverified_bytes) == (checked, stats.bytes - checked)
    assert seen[-1].bytes_done == seen[-1].bytes_total == tiny_checkpoint.file_bytes
    assert seen[-1].operation == "verify"


def test_verify_finds_one_wrong_byte_of_a_plain_file(
    redis_server: RedisServer, redis_url: str, model: str, tiny_checkpoint: Checkpoint
) -> None:
    rdmaload.save(tiny_checkpoint.directory, redis_url)
    with rdmaload.open(redis_url) as opened, redis_server.client() as client:
        file = next(file for file in opened.files if file.path == "config.json")
        key = f"{model}/chunks/{opened.generation}/{file.number}/0"
        client.setrange(key, 10, b"\0")
        with pytest.raises(IntegrityError, match=key) as caught:
            opened.verify()
        assert caught.value.key == key
        opened.load()  # no tensor is touched by it


def test_a_model_that_is_dropped_unclosed_gives_its_connections_back(
    redis_url: str, tiny_checkpoint: Checkpoint
) -> None:
    def sockets() -> int:
        count = 0
        for entry in Path("/proc/self/fd").iterdir():
            try:
                count += os.readlink(entry).startswith("socket:")
            except OSError:
                continue
        return count

    rdmaload.save(tiny_checkpoint.directory, redis_url)
    gc.collect()
    before = sockets()
    opened = rdmaload.open(redis_url)
    opened.load()
    assert sockets() > before
    del opened
    deadline = time.monotonic() + 5
    while sockets() > before and time.monotonic() < deadline:
        gc.collect()
    assert sockets() <= before


def test_a_connector_iterates_and_pulls_by_itself(memory_url: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    rdmaload.save(tiny_checkpoint.directory, memory_url)
    with connector_for(memory_url) as connector:
        state = dict(connector.weight_iterator(window_bytes=1_000_000))
        assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
        connector.pull_files(tmp_path / "files", allow_pattern="*.json")
        assert (tmp_path / "files" / "config.json").exists()
        assert set(connector.weight_iterator(include="model.norm.*")) != set()  # still open


@pytest.mark.parametrize("wrong", ["connection", "nothing", "windowbytes"])
def test_an_unknown_option_is_refused_by_name(tiny_checkpoint: Checkpoint, wrong: str) -> None:
    with pytest.raises(rdmaload.UrlError, match=f"unknown option {wrong}"):
        rdmaload.load(tiny_checkpoint.directory, **{wrong: 3})


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(
    device: str, tiny_checkpoint: Checkpoint
) -> None:
    with rdmaload.open(tiny_checkpoint.directory) as opened:
        with pytest.raises(rdmaload.DeviceError, match="device="):
            opened.load(device=device)
        with pytest.raises(rdmaload.DeviceError, match="device="):
            opened.weight_iterator(device=device)
        assert opened.stats.read_bytes == 0


def test_a_conversion_counts_as_a_copy(tmp_path: Path) -> None:
    stored = {"f": torch.randn(10), "h": torch.ones(3, dtype=torch.float16), "i": torch.arange(3)}
    rdmaload.save(stored, tmp_path)
    stats = rdmaload.LoadStats()
    rdmaload.load(tmp_path, dtype=torch.float16, stats=stats)
    assert stats.copied_bytes == 10 * 2  # only "f" becomes another tensor


def test_a_load_makes_few_objects_for_the_collector(tmp_path: Path) -> None:
    """A full collection, which enough new objects set off, takes longer than reading 20,000 tensors."""
    count = 3_000
    many_tensors(tmp_path / "model", count)
    with rdmaload.open(str(tmp_path / "model")) as model:
        runs = 0

        def count_runs(phase: str, info: dict[str, int]) -> None:
            nonlocal runs
            runs += phase == "start"

        before = gc.get_threshold()
        gc.collect()
        gc.callbacks.append(count_runs)
        gc.set_threshold(100, 1_000_000, 1_000_000)  # each run stands for 100 objects that stayed
        try:
            state = model.load()
        finally:
            gc.set_threshold(*before)
            gc.callbacks.remove(count_runs)
    assert len(state) == count
    assert runs * 100 < 2.5 * count  # the tensor itself and its entry in the index

"""save(): every source to every destination, byte for byte, or a clear error and nothing published."""

from __future__ import annotations

import _thread
import logging
import os
import random
import threading
import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rdmaload import state_dict
from rdmaload._save import save
from rdmaload.connectors import FileConnector, FileInfo, KeyValueConnector, connector_for, registry
from rdmaload.connectors.memory import MemoryConnector
from rdmaload.errors import (
    AlreadyExistsError,
    FormatError,
    IntegrityError,
    LoadTimeoutError,
    NotFoundError,
    NotSupportedError,
    UnavailableError,
    UrlError,
)
from rdmaload.journal import JournalEntry, SaveKeys
from rdmaload.stats import Progress
from tests.support.fault_proxy import FaultProxy
from tests.support.faults import Stall
from tests.support.servers import RedisServer
from tests.support.stores import ScriptedConnector, keys_of, read_index, read_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    (root / "sub").mkdir(parents=True)
    torch.manual_seed(0)
    save_file({"a": torch.randn(5000), "b": torch.ones(3)}, root / "model.safetensors")
    (root / "config.json").write_text('{"model_type": "test"}')
    (root / "sub" / "tokenizer.model").write_bytes(random.Random(1).randbytes(3333))
    (root / "empty").touch()
    return root


@pytest.fixture
def url(model: str) -> str:
    """A model in a store of its own."""
    return f"memory://{model}/m"


def files_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def stored(url: str) -> dict[str, bytes] | None:
    with connector_for(url) as connector:
        assert isinstance(connector, KeyValueConnector)
        return read_model(connector)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, url: str) -> Callable[..., str]:
    """The url of the model in a memory store whose operations run through a script."""

    def use(script: Callable[[str, str, Callable[[], object]], object]) -> str:
        cls = type("_Connector", (ScriptedConnector,), {"script": staticmethod(script)})
        monkeypatch.setitem(registry._registered, "scripted", cls)
        return url.replace("memory", "scripted", 1)

    return use


# ---- what goes in comes out --------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [64, 1000, 4096, None])
def test_a_directory_byte_for_byte(source: Path, url: str, chunk_bytes: int | None) -> None:
    stats = save(source, url, chunk_bytes=chunk_bytes)
    files = files_of(source)
    assert stored(url) == files
    assert stats.published
    assert stats.skipped_bytes == 0
    assert (stats.files, stats.bytes) == (4, sum(map(len, files.values())))
    with connector_for(url) as connector:
        found = read_index(connector)
        assert found is not None
        manifest, index = found
        assert (stats.generation, stats.chunks) == (manifest.generation, index.total_chunks)
        assert index.chunk_bytes == (chunk_bytes or 2**20 - 4096)
        assert {file.path for file in index.files if file.header} == {"model.safetensors"}
        # Manifest, index and chunks are all that is left.
        assert len(keys_of(connector)) == 3 + index.total_chunks
        assert connector.members("rdmaload:models") >= {connector.model}
    assert set(stats.stages) == {"plan", "read", "checksum", "send", "publish"}
    assert stats.path == "memory"
    assert stats.seconds > 0


def test_a_directory_through_a_server(source: Path, redis_url: str) -> None:
    stats = save(source, redis_url, chunk_bytes=1000)
    assert stored(redis_url) == files_of(source)
    assert stats.path == "resp-tcp"
    # Again, over the old one.
    (source / "config.json").write_text("{}")
    save(source, redis_url)
    assert stored(redis_url) == files_of(source)


def test_state_dict_files_open_with_safetensors(url: str, tmp_path: Path) -> None:
    state = {
        "matrix": torch.randn(100, 50),
        "transposed": torch.randn(100, 50).t(),
        "bf16": torch.randn(77).to(torch.bfloat16),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 5),
        "fp8": torch.randn(9).to(torch.float8_e4m3fn),
    }
    save(state, url, chunk_bytes=1000)
    content = stored(url)
    assert content is not None
    path = tmp_path / "model.safetensors"
    path.write_bytes(content["model.safetensors"])
    loaded = load_file(path)
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(
            loaded[name].contiguous().view(-1).view(torch.uint8),
            tensor.contiguous().view(-1).view(torch.uint8),
        )


def test_tied_entries_and_ranks_are_kept_and_copied(url: str) -> None:
    weight = torch.randn(300)
    for rank in (0, 1):
        save({"a": weight, "b": weight}, url, rank=rank, world_size=2, save_id="s", chunk_bytes=500)
    save(url, f"{url}-copy", chunk_bytes=700)
    found = []
    for place in (url, f"{url}-copy"):
        with connector_for(place) as connector:
            result = read_index(connector)
            assert result is not None
            manifest, index = result
            found.append(
                (
                    manifest.kind,
                    manifest.world_size,
                    [(file.path, file.rank, file.tied, file.header) for file in index.files],
                )
            )
    assert found[0] == found[1]
    assert found[0][:2] == ("sharded", 2)
    assert [entry[1:3] for entry in found[0][2]] == [(0, {"b": "a"}), (1, {"b": "a"})]
    assert stored(url) == stored(f"{url}-copy")


def test_layout_and_identity_are_copied(source: Path, url: str) -> None:
    from dataclasses import replace

    save(source, url)
    with connector_for(url) as connector:
        found = read_index(connector)
        assert found is not None
        marked = replace(found[0], layout={"tp": 2}, identity={"engine": "x"})
        connector.set(f"{connector.model}/manifest", marked.encode())
    save(url, f"{url}-copy")
    with connector_for(f"{url}-copy") as connector:
        found = read_index(connector)
        assert found is not None
        assert (found[0].layout, found[0].identity) == ({"tp": 2}, {"engine": "x"})


def test_a_module(url: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.BatchNorm1d(20))
    save(module, url)
    content = stored(url)
    assert content is not None
    assert list(content) == ["model.safetensors"]


def test_many_files_of_a_state_dict(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_dict, "_FILE_BYTES", 3000)
    save({f"t{number}": torch.randn(500) for number in range(4)}, url, chunk_bytes=1000)
    content = stored(url)
    assert content is not None
    assert len(content) == 5
    with connector_for(url) as connector:
        found = read_index(connector)
        assert found is not None
        assert sum(file.header is not None for file in found[1].files) == 4


@pytest.mark.parametrize(("first", "second"), [(1000, None), (1000, 700), (700, 5000), (999, 999)])
def test_a_model_copied_between_stores(source: Path, url: str, redis_url: str, first: int, second: int | None) -> None:
    save(source, url, chunk_bytes=first)
    save(url, redis_url, chunk_bytes=second)
    assert stored(redis_url) == files_of(source)
    with connector_for(redis_url) as connector:
        found = read_index(connector)
        assert found is not None
        assert found[1].chunk_bytes == (second or first)


def test_a_damaged_source_is_not_copied(source: Path, url: str) -> None:
    save(source, url, chunk_bytes=1000)
    with connector_for(url) as connector:
        key = next(key for key in connector.list(f"{connector.model}/chunks") if key.endswith("/0"))
        value = connector.get(key)
        assert value
        connector.set(key, bytes([value[0] ^ 1]) + value[1:])
    with pytest.raises(IntegrityError, match="checksum"):
        save(url, f"{url}-copy")
    assert stored(f"{url}-copy") is None


def test_a_copy_may_be_resumed_under_its_save_id(source: Path, url: str) -> None:
    save(source, url, chunk_bytes=1000)
    with connector_for(f"{url}-copy") as connector:
        keys = SaveKeys(connector.model, "copy")
        # An attempt that sent everything and died just before its part: undo the last steps.
        connector.set(keys.generation, b"a" * 32)
    copied = save(url, f"{url}-copy", save_id="copy")
    assert copied.generation == "a" * 32
    assert stored(f"{url}-copy") == files_of(source)


def test_into_a_directory_and_back(source: Path, url: str, tmp_path: Path) -> None:
    save(source, url, chunk_bytes=1000)
    target = tmp_path / "target"
    stats = save(url, target)
    assert files_of(target) == files_of(source)
    assert stats.published
    assert stats.files == 4
    assert stats.path == "file-buffered"
    save(target, f"{url}-again")
    assert stored(f"{url}-again") == files_of(source)
    save(source, tmp_path / "other")
    assert files_of(tmp_path / "other") == files_of(source)


def test_a_directory_gets_its_list_and_config_last_and_loses_old_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    monkeypatch.setattr(state_dict, "_FILE_BYTES", 3000)
    save({f"t{number}": torch.randn(500) for number in range(3)}, target)
    (target / "notes.txt").write_text("mine")
    assert len(list(target.glob("*.safetensors"))) == 3
    order: list[str] = []
    from rdmaload.connectors.local import LocalConnector

    write = LocalConnector.write

    def spy(self: LocalConnector, path: str, *rest: object) -> None:
        write(self, path, *rest)  # type: ignore[arg-type]
        order.append(path)

    monkeypatch.setattr(LocalConnector, "write", spy)
    save({f"t{number}": torch.randn(500) for number in range(2)}, target)
    assert order[-1] == "model.safetensors.index.json"
    assert len(order) == 3
    save({"t": torch.randn(3)}, target)
    assert files_of(target).keys() == {"model.safetensors", "notes.txt"}
    with safe_open(target / "model.safetensors", "pt") as file:
        assert list(file.keys()) == ["t"]


def test_ranks_into_one_directory(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "model-rank-5-part-0.safetensors").write_bytes(b"old")
    (target / "model-rank-1-part-7.safetensors").write_bytes(b"old")
    for rank in (1, 0):
        save({"a": torch.full((2,), rank)}, target, rank=rank, world_size=2, save_id="s")
    assert files_of(target).keys() == {f"model-rank-{n}-part-0.safetensors" for n in (0, 1)}


def test_a_failed_write_into_a_directory_leaves_the_old_file(source: Path, url: str, tmp_path: Path) -> None:
    save(source, url, chunk_bytes=1000)
    target = tmp_path / "target"
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"old")
    with connector_for(url) as connector:
        for key in list(connector.list(f"{connector.model}/chunks")):
            if key.endswith("/7"):
                connector.delete(key)
    with pytest.raises(NotFoundError, match="evicted"):
        save(url, target)
    assert (target / "model.safetensors").read_bytes() == b"old"
    assert not (target / "config.json").exists()


# ---- overwrite, arguments ----------------------------------------------------------------------


def test_without_overwrite_an_existing_model_stays(source: Path, url: str, tmp_path: Path) -> None:
    save(source, url, overwrite=False)
    before = stored(url)
    with connector_for(url) as connector:
        keys = keys_of(connector)
        with pytest.raises(AlreadyExistsError, match="overwrite"):
            save({"a": torch.ones(1)}, url, overwrite=False)
        assert keys_of(connector) == keys  # nothing was sent
        assert stored(url) == before
        connector.set(f"{connector.model}/manifest", b"damaged")
        with pytest.raises(AlreadyExistsError):
            save({"a": torch.ones(1)}, url, overwrite=False)
        save(source, url)  # a damaged model may be replaced
        assert stored(url) == before
    save(source, tmp_path / "target", overwrite=False)
    with pytest.raises(AlreadyExistsError, match="overwrite"):
        save({"a": torch.ones(1)}, tmp_path / "target", overwrite=False)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank": 0},
        {"world_size": 2},
        {"rank": 2, "world_size": 2, "save_id": "s"},
        {"rank": -1, "world_size": 2, "save_id": "s"},
        {"rank": 0, "world_size": 2},
        {"save_id": ""},
        {"save_id": "a/b"},
        {"save_id": "x" * 129},
        {"chunk_bytes": 0},
        {"no_such_option": 1},
    ],
)
def test_wrong_arguments(url: str, arguments: dict[str, object]) -> None:
    with pytest.raises(UrlError):
        save({"a": torch.ones(1)}, url, **arguments)  # type: ignore[arg-type]
    assert stored(url) is None


def test_wrong_sources(source: Path, url: str) -> None:
    with pytest.raises(TypeError, match="int"):
        save(3, url)  # type: ignore[arg-type]
    with pytest.raises(NotSupportedError, match="other"):
        save({"a": torch.ones(1)}, url, layout="other")  # type: ignore[arg-type]
    with pytest.raises(NotFoundError):
        save(f"{url}-missing", url)
    with pytest.raises(NotFoundError):
        save("/no/such/directory", url)
    with pytest.raises(UrlError, match="both"):
        save(source, str(source))
    save(source, url)
    with pytest.raises(ValueError, match="rank"):
        save(url, f"{url}-copy", rank=0, world_size=1)


def test_a_store_with_small_values_gets_small_chunks(source: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(MemoryConnector):
        max_value_bytes = 3000

    monkeypatch.setitem(registry._registered, "small", Small)
    save(source, url.replace("memory", "small", 1))
    assert stored(url) == files_of(source)


# ---- failures ----------------------------------------------------------------------------------


def test_a_source_that_changes_during_the_save(source: Path, scripted: Callable[..., str], url: str) -> None:
    changed = threading.Event()

    def script(kind: str, key: str, effect: Callable[[], object]) -> object:
        if kind == "set" and "/chunks/" in key and not changed.is_set():
            changed.set()
            with (source / "model.safetensors").open("r+b") as file:
                file.seek(-4, 2)
                file.write(b"abcd")
        return effect()

    with pytest.raises(IntegrityError, match="changed while it was being saved"):
        save(source, scripted(script), chunk_bytes=1000)
    assert stored(url) is None
    save(source, url)
    assert stored(url) == files_of(source)


def test_a_file_that_changes_after_it_was_sent(source: Path, scripted: Callable[..., str], url: str) -> None:
    def script(kind: str, key: str, effect: Callable[[], object]) -> object:
        if "/journal/" in key and kind == "set":
            # Everything of a file is in the store; the model is not complete yet. The other thread may be reading this
            # one: then it finds it cut.
            (source / "config.json").write_text("changed")
        return effect()

    with pytest.raises(IntegrityError, match=r"changed while it was being saved|cut while it was saved"):
        save(source, scripted(script), chunk_bytes=1000, connections=1)
    assert stored(url) is None


@pytest.mark.parametrize("to_files", [False, True])
def test_a_truncated_weight_file_is_refused_before_anything_is_sent(
    source: Path, url: str, tmp_path: Path, to_files: bool
) -> None:
    os.truncate(source / "model.safetensors", 10_000)
    target = tmp_path / "target"
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        save(source, target if to_files else url)
    assert not target.exists() or not list(target.iterdir())
    with connector_for(url) as connector:
        assert isinstance(connector, KeyValueConnector)
        assert not keys_of(connector)


def test_one_tensor_in_two_files_is_refused(source: Path, url: str) -> None:
    save_file({"b": torch.ones(3)}, source / "more.safetensors")
    with pytest.raises(FormatError, match=r"tensor b is in model\.safetensors and in more\.safetensors"):
        save(source, url)
    assert stored(url) is None


def test_timeout_ends_a_save_into_a_server_that_stopped_answering(
    source: Path, redis_server: RedisServer, model: str
) -> None:
    with FaultProxy(redis_server.host, redis_server.port, Stall(after=2000)) as proxy:
        started = time.monotonic()
        with pytest.raises(LoadTimeoutError, match="timeout=1 s"):
            save(source, proxy.url(model), chunk_bytes=100, timeout=1, inactivity_timeout=60)
        assert time.monotonic() - started < 20


def test_ctrl_c_ends_a_save_into_a_server_that_stopped_answering(
    source: Path, redis_server: RedisServer, model: str
) -> None:
    def stop(progress: Progress) -> None:
        if proxy.wait_for_fault(0):
            raise KeyboardInterrupt

    with FaultProxy(redis_server.host, redis_server.port, Stall(after=2000)) as proxy:
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            save(source, proxy.url(model), chunk_bytes=100, progress=stop, inactivity_timeout=60)
        assert time.monotonic() - started < 20


def test_buffers_are_no_larger_than_the_largest_file(source: Path, url: str) -> None:
    tracemalloc.start()
    try:
        save(source, url, chunk_bytes=64 << 20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20


class CutFiles(FileConnector):
    """Files that are shorter than their listing says."""

    def list_files(self) -> list[FileInfo]:
        return [FileInfo("data.bin", 5000)]

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        return max(0, min(len(buffer), 4000 - offset))

    def write(self, path: str, size: int, blocks: object) -> None:
        raise NotImplementedError

    def delete(self, path: str) -> bool:
        raise NotImplementedError


def test_a_file_that_ends_early_is_not_saved(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registered, "cut", CutFiles)
    with pytest.raises(IntegrityError, match="ends at byte 4000 of 5000"):
        save("cut://store/m", url, chunk_bytes=3000)
    assert stored(url) is None
    with pytest.raises(IntegrityError, match="ends at byte 4000 of 5000"):
        save("cut://store/m", tmp_path / "target")
    assert not (tmp_path / "target" / "data.bin").exists()


@pytest.mark.parametrize("part", ["/claims/", "/chunks/", "/journal/", "/parts/", "/manifest"])
def test_the_first_error_stops_all_threads(source: Path, scripted: Callable[..., str], url: str, part: str) -> None:
    failed = threading.Event()
    after: list[str] = []

    def script(kind: str, key: str, effect: Callable[[], object]) -> object:
        if kind == "set" and part in key:
            failed.set()
            raise UnavailableError("the store is gone", key=key)
        if failed.is_set() and kind == "set" and "/chunks/" in key:
            after.append(key)
        return effect()

    with pytest.raises(UnavailableError, match="the store is gone"):
        save(source, scripted(script), chunk_bytes=100, connections=4)
    assert len(after) <= 2 * 8  # what was under way, not the 230 chunks
    assert stored(url) is None
    assert not [thread for thread in threading.enumerate() if "rdmaload" in thread.name]
    save(source, url)
    assert stored(url) == files_of(source)


def test_an_interrupt_stops_all_threads(source: Path, scripted: Callable[..., str], url: str) -> None:
    started = threading.Event()

    def script(kind: str, key: str, effect: Callable[[], object]) -> object:
        if kind == "set" and "/chunks/" in key:
            if not started.is_set():
                started.set()
                _thread.interrupt_main()
            threading.Event().wait(0.02)
        return effect()

    with pytest.raises(KeyboardInterrupt):
        save(source, scripted(script), chunk_bytes=100)
    assert not [thread for thread in threading.enumerate() if "rdmaload" in thread.name]
    assert stored(url) is None


def slow(kind: str, key: str, effect: Callable[[], object]) -> object:
    if kind == "set" and "/chunks/" in key:
        threading.Event().wait(0.01)
    return effect()


def test_a_timeout_and_a_failing_callback_end_the_save(source: Path, scripted: Callable[..., str], url: str) -> None:
    with pytest.raises(LoadTimeoutError, match=r"timeout=0\.3"):
        save(source, scripted(slow), chunk_bytes=100, timeout=0.3)

    def stop(progress: Progress) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        save(source, scripted(slow), chunk_bytes=100, progress=stop)
    assert stored(url) is None


def test_progress_grows_to_the_end(source: Path, scripted: Callable[..., str]) -> None:
    seen: list[Progress] = []
    stats = save(source, scripted(slow), chunk_bytes=100, progress=seen.append)
    assert len(seen) > 2
    assert [p.bytes_done for p in seen] == sorted(p.bytes_done for p in seen)
    assert seen[-1].bytes_done == seen[-1].bytes_total == stats.bytes
    assert seen[-1].files_done == seen[-1].files_total == 4
    assert {p.operation for p in seen} == {"save"}


def test_the_server_warns_are_logged(
    source: Path, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(MemoryConnector, "publish_warning", lambda self, needed=0: [f"needs {needed}"])
    with caplog.at_level(logging.WARNING, "rdmaload"):
        stats = save(source, url)
    assert f"needs {stats.bytes}" in caplog.text


def test_memory_is_bounded_by_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    class Discarding(MemoryConnector):
        def set(self, key: str, buffer: object, *, if_absent: bool = False) -> bool:
            if "/chunks/" in key and not key.endswith("/index"):
                buffer = b"x"
            return super().set(key, buffer, if_absent=if_absent)  # type: ignore[arg-type]

    monkeypatch.setitem(registry._registered, "discarding", Discarding)
    big = tmp_path / "big"
    big.mkdir()
    (big / "data.bin").write_bytes(bytes(64 * 2**20))
    save(big, url.replace("memory", "discarding", 1))  # imports and caches
    tracemalloc.start()
    try:
        save(big, url.replace("memory", "discarding", 1) + "2")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20 + 2 * 2**20  # four threads with a chunk each, and change


# ---- hostile and damaged leftovers -------------------------------------------------------------


@given(st.binary(max_size=300))
def test_any_bytes_are_no_journal_entry(value: bytes) -> None:
    assert JournalEntry.decode(value) is None


def test_a_journal_entry_is_itself_or_nothing() -> None:
    entry = JournalEntry("a/b", 250, "1:2", 7, 100, bytes(12))
    value = entry.encode()
    assert JournalEntry.decode(value) == entry
    for place in range(len(value)):
        for bit in (1, 0x80):
            damaged = bytearray(value)
            damaged[place] ^= bit
            assert JournalEntry.decode(bytes(damaged)) is None
    for change in ({"crcs": bytes(8)}, {"number": -1}, {"size": True}, {"path": "../x"}):
        wrong = JournalEntry(**{**entry.__dict__, **change})
        assert JournalEntry.decode(wrong.encode()) is None


def sent_but_unpublished(source: Path, url: str, scripted: Callable[..., str], **arguments: object) -> None:
    """An attempt that has sent every file and dies before its part."""

    def script(kind: str, key: str, effect: Callable[[], object]) -> object:
        if "/parts/" in key:
            raise KeyboardInterrupt
        return effect()

    with pytest.raises(KeyboardInterrupt):
        save(source, scripted(script), chunk_bytes=1000, **arguments)  # type: ignore[arg-type]


def test_everything_sent_is_skipped(source: Path, url: str, scripted: Callable[..., str]) -> None:
    sent_but_unpublished(source, url, scripted)
    stats = save(source, url, chunk_bytes=1000)
    assert stats.skipped_bytes == stats.bytes
    assert stats.chunks == 0
    assert stored(url) == files_of(source)


@pytest.mark.parametrize("value", [b"", b"garbage", b'{"path":"config.json"}\n00000000\n', None])
def test_a_damaged_journal_is_ignored(
    source: Path, url: str, scripted: Callable[..., str], value: bytes | None
) -> None:
    sent_but_unpublished(source, url, scripted)
    with connector_for(url) as connector:
        entries = [key for key in connector.list(connector.model) if "/journal/" in key]
        assert len(entries) == 4
        good = connector.get(entries[0])
        for key in entries:
            # None: the entry of another file under this name
            connector.set(key, good if value is None else value)
    stats = save(source, url, chunk_bytes=1000)
    assert stats.chunks > 0
    assert stored(url) == files_of(source)


@pytest.mark.parametrize("which", [min, max])
def test_a_journal_of_chunks_that_are_gone_is_ignored(
    source: Path, url: str, scripted: Callable[..., str], which: Callable[[list[int]], int]
) -> None:
    sent_but_unpublished(source, url, scripted)
    with connector_for(url) as connector:
        chunks: dict[str, list[int]] = {}
        for key in connector.list(f"{connector.model}/chunks/"):
            file, _, chunk = key.rpartition("/")
            chunks.setdefault(file, []).append(int(chunk))
        for file, numbers in chunks.items():
            assert connector.delete(f"{file}/{which(numbers)}")
    stats = save(source, url, chunk_bytes=1000)
    assert stats.skipped_bytes == 0
    assert stored(url) == files_of(source)


def test_a_changed_file_of_the_same_size_is_sent_anew(source: Path, url: str, scripted: Callable[..., str]) -> None:
    sent_but_unpublished(source, url, scripted, save_id="mine")
    content = bytearray((source / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (source / "model.safetensors").write_bytes(content)
    stats = save(source, url, chunk_bytes=1000, save_id="mine")
    assert stats.skipped_bytes == stats.bytes - len(content)
    assert stored(url) == files_of(source)


def test_another_chunk_size_is_another_save(source: Path, url: str, scripted: Callable[..., str]) -> None:
    for save_id in (None, "mine"):
        sent_but_unpublished(source, url, scripted, save_id=save_id)
        assert save(source, url, chunk_bytes=900, save_id=save_id).skipped_bytes == 0
        assert stored(url) == files_of(source)


@pytest.mark.parametrize("value", [b"", b"garbage", b"\xff" * 40, b"A" * 32, b"1" * 33])
def test_a_hostile_generation_is_refused(source: Path, url: str, value: bytes) -> None:
    with connector_for(url) as connector:
        key = SaveKeys(connector.model, "mine").generation
        connector.set(key, value)
    with pytest.raises(FormatError) as caught:
        save(source, url, save_id="mine")
    assert caught.value.key == key


def damage(kind: str, value: bytes) -> bytes:
    if kind == "bit":
        return value[:-3] + bytes([value[-3] ^ 1]) + value[-2:]
    if kind == "cut":
        return value[: len(value) // 2]
    if kind == "longer":
        return value + b"x"
    return {"empty": b"", "garbage": b"\n\n\xff" * 100, "lines": b"{}\n00000000\n"}[kind]


@pytest.mark.parametrize("kind", ["bit", "cut", "longer", "empty", "garbage", "lines"])
def test_a_damaged_part_of_another_rank_is_a_clear_error(url: str, kind: str) -> None:
    arguments: Mapping[str, object] = {"world_size": 2, "save_id": "s"}
    save({"a": torch.ones(9)}, url, rank=0, **arguments)  # type: ignore[arg-type]
    with connector_for(url) as connector:
        (key,) = [key for key in connector.list(connector.model) if key.endswith("/parts/0")]
        value = connector.get(key)
        assert value is not None
        connector.set(key, damage(kind, value))
    with pytest.raises((FormatError, IntegrityError), match="parts/0") as caught:
        save({"b": torch.ones(9)}, url, rank=1, **arguments)  # type: ignore[arg-type]
    assert caught.value.key == key
    assert stored(url) is None
    # The rank that was damaged is repeated: all is well.
    assert save({"a": torch.ones(9)}, url, rank=0, **arguments).published  # type: ignore[arg-type]


def test_a_hostile_index_in_the_way_is_a_clear_error(source: Path, url: str) -> None:
    with connector_for(url) as connector:
        keys = SaveKeys(connector.model, "mine")
        connector.set(keys.generation, b"a" * 32)
        connector.set(f"{connector.model}/chunks/{'a' * 32}/index", b"garbage")
    with pytest.raises(FormatError):
        save(source, url, save_id="mine")
    assert stored(url) is None

"""Progress that can be believed: never backwards, the end only when all is verified, files and rates as they are."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import rdmaload
from rdmaload import Progress
from rdmaload.connectors.memory import MemoryConnector, forget_store
from rdmaload.errors import IntegrityError
from rdmaload.meter import Meter
from tests.support.checkpoints import Checkpoint, make_checkpoint
from tests.support.fault_proxy import FaultProxy
from tests.support.faults import Close
from tests.support.servers import RedisServer


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def memory_url(request: pytest.FixtureRequest) -> Iterator[str]:
    store = re.sub("[^a-z]+", "-", request.node.name)
    yield f"memory://{store}/m"
    forget_store(store)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return make_checkpoint(tmp_path / "m", {f"t{i:02}": ("U8", [10_000]) for i in range(12)}, files=3)


def check(seen: list[Progress]) -> None:
    """What holds for every operation that has ended well."""
    for field in ("bytes_done", "files_done", "seconds", "skipped_bytes"):
        values = [getattr(one, field) for one in seen]
        assert values == sorted(values), field
    assert len({(one.bytes_total, one.files_total, one.operation) for one in seen}) == 1
    last = seen[-1]
    assert (last.bytes_done, last.files_done) == (last.bytes_total, last.files_total)
    assert last.seconds_left == 0
    assert all(one.bytes_done < one.bytes_total for one in seen[:-1] if one.stage != "publish")


def test_the_rate_is_of_the_last_seconds_and_says_how_long_it_takes() -> None:
    clock, seen = Clock(), list[Progress]()
    meter = Meter("load", seen.append, bytes_total=1000, files_total=2, clock=clock)
    for done in (100, 200, 300):
        clock.now += 1
        meter.update(done, 0)
    assert [one.rate for one in seen] == pytest.approx([100, 100, 100])
    assert seen[-1].seconds_left == pytest.approx(7)
    for _ in range(10):  # it stands still
        clock.now += 1
        meter.update(300, 1)
    assert seen[-1].rate < 5
    assert seen[-1].gb_per_s == pytest.approx(300 / 13 / 1e9)
    for done in range(310, 500, 10):  # and goes on, a tenth as fast
        clock.now += 1
        meter.update(done, 1)
    assert seen[-1].rate == pytest.approx(10, rel=0.1)


def test_nothing_goes_backwards_and_the_end_is_said_by_finish_alone() -> None:
    seen: list[Progress] = []
    meter = Meter("save", seen.append, bytes_total=1000, files_total=3, stage="send")
    meter.update(500, 2)
    meter.update(100, 0)  # another attempt, from the start
    meter.update(1000, 3)
    meter.update(2000, 9)
    assert [(one.bytes_done, one.files_done) for one in seen] == [(500, 2), (500, 2)]
    meter.enter("publish")
    assert (seen[-1].stage, seen[-1].bytes_done) == ("publish", 500)
    meter.finish()
    check(seen)


def test_what_was_there_already_counts_for_no_rate() -> None:
    clock, seen = Clock(), list[Progress]()
    meter = Meter("save", seen.append, bytes_total=10_000, files_total=2, clock=clock)
    clock.now += 1
    meter.update(9000, 1, skipped_bytes=8500)
    assert seen[-1].rate == pytest.approx(500)
    assert seen[-1].seconds_left == pytest.approx(2)
    assert seen[-1].gb_per_s == pytest.approx(500 / 1e9)


def test_seconds_left_is_unknown_while_nothing_moves() -> None:
    assert Progress("load", 0, 100, 0, 1, 5.0).seconds_left is None
    assert Progress("load", 0, 0, 0, 0, 0.0).seconds_left == 0


def gate(monkeypatch: pytest.MonkeyPatch, held: str) -> threading.Event:
    """Chunks whose key ends so are given only after the event."""
    opened, real = threading.Event(), MemoryConnector.get_into

    def get_into(self: MemoryConnector, key: str, buffer: memoryview) -> int:
        if key.endswith(held):
            assert opened.wait(30)
        return real(self, key, buffer)

    monkeypatch.setattr(MemoryConnector, "get_into", get_into)
    return opened


@pytest.mark.parametrize("into", ["new memory", "tensors", "other types"])
def test_files_of_a_load_are_counted_as_they_are_done(
    into: str, memory_url: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    rdmaload.save(checkpoint.directory, memory_url, chunk_bytes=5000)
    seen: list[Progress] = []
    with rdmaload.open(memory_url) as model:
        held = max(file.number for file in model.files if file.path.endswith(".safetensors"))
        opened = gate(monkeypatch, f"/{held}/1")

        def look(progress: Progress) -> None:
            seen.append(progress)
            if progress.files_done == 2:
                opened.set()

        if into == "new memory":
            model.load(progress=look)
        else:
            dtype = torch.uint8 if into == "tensors" else torch.int32
            targets = {name: torch.empty(spec.shape, dtype=dtype) for name, spec in model.tensors.items()}
            # The last file's tensors take a part of their own.
            model.load_into(targets, cast=into != "tensors", progress=look)
    check(seen)
    assert opened.is_set()  # or it would stand there still
    assert seen[-1].files_total == 3


def test_an_iteration_counts_files_and_is_done_when_its_consumer_is(memory_url: str, checkpoint: Checkpoint) -> None:
    rdmaload.save(checkpoint.directory, memory_url, chunk_bytes=5000)
    seen: list[Progress] = []
    with rdmaload.open(memory_url) as model:
        tensors = model.weight_iterator(window_bytes=25_000, progress=seen.append)
        names = [next(tensors)[0] for _ in range(12)]
        assert names == sorted(names)
        assert seen[-1].bytes_done < 120_000  # the last tensor is still in use
        assert seen[-1].files_done == 2
        assert next(tensors, None) is None
    check(seen)
    assert sorted({one.files_done for one in seen}) == [0, 1, 2, 3]


def test_what_is_given_up_or_fails_is_never_all_done(memory_url: str, checkpoint: Checkpoint) -> None:
    rdmaload.save(checkpoint.directory, memory_url, chunk_bytes=5000)
    seen: list[Progress] = []
    with rdmaload.open(memory_url) as model:
        next(model.weight_iterator(progress=seen.append))
        connector = model._connector
        assert isinstance(connector, MemoryConnector)
        key = f"{connector.model}/chunks/{model.generation}/{model.files[-1].number}/0"
        value = bytearray(connector.get(key) or b"")
        value[0] ^= 1
        connector.set(key, value)
        with pytest.raises(IntegrityError):
            model.verify(progress=seen.append)
    assert all(one.bytes_done < one.bytes_total for one in seen)


def test_a_selection_counts_what_is_wanted_of_the_files_that_it_is_in(memory_url: str, checkpoint: Checkpoint) -> None:
    rdmaload.save(checkpoint.directory, memory_url, chunk_bytes=50_000)
    seen: list[Progress] = []
    rdmaload.load(memory_url, include=["t00", "t11"], progress=seen.append)
    check(seen)
    assert (seen[-1].bytes_total, seen[-1].files_total) == (20_000, 2)  # and not the chunks around them


@pytest.mark.parametrize("operation", ["pull", "verify"])
def test_files_that_are_pulled_or_verified(
    operation: str, memory_url: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    rdmaload.save(checkpoint.directory, memory_url, chunk_bytes=5000)
    seen: list[Progress] = []
    with rdmaload.open(memory_url) as model:
        if operation == "pull":
            model.pull_files(tmp_path / "out", allow_pattern="*", progress=seen.append)
        else:
            model.verify(progress=seen.append)
        assert seen[-1].files_total == len(model.files)
    check(seen)
    assert len({one.files_done for one in seen}) > 2


@pytest.mark.parametrize("layout", ["rdmaload", "sglang"])
def test_a_save_sends_then_publishes(layout: str, checkpoint: Checkpoint, memory_url: str) -> None:
    seen: list[Progress] = []
    rdmaload.save(checkpoint.directory, memory_url, layout=layout, progress=seen.append)  # type: ignore[arg-type]
    check(seen)
    stages = [one.stage for one in seen]
    assert stages[-1] == ("publish" if layout == "rdmaload" else "send")


def test_a_save_that_goes_on_says_what_was_there(
    checkpoint: Checkpoint, memory_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MemoryConnector.set
    sent: list[str] = []

    def failing(self: MemoryConnector, key: str, buffer: bytes, *, if_absent: bool = False) -> bool:
        if "/chunks/" in key:
            sent.append(key)
            if len(sent) > 18:
                raise OSError("enough")
        return real(self, key, buffer, if_absent=if_absent)

    monkeypatch.setattr(MemoryConnector, "set", failing)
    with pytest.raises(OSError, match="enough"):
        rdmaload.save(checkpoint.directory, memory_url, chunk_bytes=5000)
    monkeypatch.setattr(MemoryConnector, "set", real)
    seen: list[Progress] = []
    stats = rdmaload.save(checkpoint.directory, memory_url, chunk_bytes=5000, progress=seen.append)
    check(seen)
    assert 0 < stats.skipped_bytes == seen[-1].skipped_bytes


def test_retries_of_a_save_are_counted(checkpoint: Checkpoint, redis_server: RedisServer, model: str) -> None:
    with FaultProxy(redis_server.host, redis_server.port, Close(after=40, first_connections=2)) as proxy:
        stats = rdmaload.save(checkpoint.directory, proxy.url(model), chunk_bytes=5000, connections=1)
    assert stats.retries >= 1
    assert stats.to_json()["retries"] == stats.retries
    assert rdmaload.save(checkpoint.directory, redis_server.url(model)).retries == 0

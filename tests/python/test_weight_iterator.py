"""Streaming: order, a window that really bounds what is read ahead, borrowed memory, and every way to stop."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import rdmaload
from rdmaload.connectors import registry
from rdmaload.connectors.memory import MemoryConnector, forget_store
from rdmaload.errors import IntegrityError, MemoryLimitError, UnavailableError
from rdmaload.reader import Batch
from rdmaload.stats import LoadStats
from tests.support.checkpoints import Checkpoint, compare, make_checkpoint

CHUNK = 1000


class CountingConnector(MemoryConnector):
    """Counts the bytes of chunks that were asked for, and can hold readers at a gate."""

    asked_bytes = 0
    lock = threading.Lock()
    gate = threading.Event()
    entered = threading.Event()
    permits: threading.Semaphore | None = None  # one for each read, where there are any
    fail_after_bytes: int | None = None

    def get_into(self, key: str, buffer: memoryview) -> int:
        cls = type(self)
        cls.entered.set()
        assert cls.gate.wait(20)
        assert cls.permits is None or cls.permits.acquire(timeout=20)
        with cls.lock:
            cls.asked_bytes += len(buffer)
            failing = cls.fail_after_bytes is not None and cls.asked_bytes > cls.fail_after_bytes
        if failing:
            raise IntegrityError(f"{key} is damaged")
        return super().get_into(key, buffer)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[CountingConnector]:
    """A fresh class per test, registered as counting://."""
    cls = type("Counting", (CountingConnector,), {"lock": threading.Lock(), "gate": threading.Event()})
    cls.entered = threading.Event()
    cls.gate.set()
    monkeypatch.setitem(registry._registered, "counting", cls)
    return cls


@pytest.fixture
def store(model: str) -> Iterator[str]:
    """The name of a memory store: memory://{store}/m and counting://{store}/m are one model."""
    yield model
    forget_store(model)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """100 tensors of 10,000 bytes in 4 files, of exactly ten chunks each and a header."""
    tensors = {f"layer.{i:02}": ("U8", [10_000]) for i in range(100)}
    return make_checkpoint(tmp_path / "m", tensors, files=4)


@pytest.fixture
def url(store: str, checkpoint: Checkpoint, counting: type[CountingConnector]) -> str:
    rdmaload.save(checkpoint.directory, f"memory://{store}/m", chunk_bytes=CHUNK)
    return f"counting://{store}/m"


def settled(counting: type[CountingConnector]) -> int:
    """The bytes asked for, once no more are for a while."""
    deadline = time.monotonic() + 10
    last, since = counting.asked_bytes, time.monotonic()
    while time.monotonic() - since < 0.15:
        assert time.monotonic() < deadline, "it reads on and on"
        if counting.asked_bytes != last:
            last, since = counting.asked_bytes, time.monotonic()
        threading.Event().wait(0.005)
    return last


def loader_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        gc.collect()


def test_the_order_is_file_then_offset(store: str, tmp_path: Path) -> None:
    names = ["z", "a", "m", "b", "y", "c"]
    checkpoint = make_checkpoint(tmp_path / "m", {name: ("U8", [1000]) for name in names}, files=2)
    rdmaload.save(checkpoint.directory, f"memory://{store}/m", chunk_bytes=300)
    for place in (f"memory://{store}/m", checkpoint.directory):
        for window in (1, 1000, 2500, 1 << 30):
            assert [name for name, _ in rdmaload.weight_iterator(place, window_bytes=window)] == names
        assert list(rdmaload.load(place)) == names


@pytest.mark.parametrize("borrow", [False, True])
@pytest.mark.parametrize("window", [1, 999, 25_000, 10_000_000])
def test_every_window_gives_the_same_bytes(url: str, checkpoint: Checkpoint, window: int, borrow: bool) -> None:
    stats = LoadStats()
    state = {
        name: tensor.clone() if borrow else tensor
        for name, tensor in rdmaload.weight_iterator(url, window_bytes=window, borrow=borrow, stats=stats)
    }
    assert compare(state, checkpoint.directory) == checkpoint.bytes
    assert stats.bytes == checkpoint.bytes
    assert stats.verified_bytes == stats.read_bytes >= checkpoint.bytes


@pytest.mark.parametrize("borrow", [False, True])
def test_the_window_bounds_what_is_read_ahead(
    url: str, checkpoint: Checkpoint, counting: type[CountingConnector], borrow: bool
) -> None:
    window = 80_000
    # Runs of two tensors (a quarter of the window): at most one chunk too many at each end of each run.
    extra = 2 * CHUNK * (window // 20_000 + 1)
    with rdmaload.open(url) as opened:
        iterator = opened.weight_iterator(window_bytes=window, borrow=borrow)
        assert settled(counting) == 0  # nothing before the first next()
        yielded = 0
        for number, (_, tensor) in enumerate(iterator):
            yielded += tensor.nbytes
            del tensor
            if number in (0, 1, 2, 30, 99):
                asked = settled(counting)
                reads = asked - (yielded + 2 * CHUNK * (yielded // 20_000 + 1))
                assert reads <= window + extra, f"{reads} bytes read ahead after {number}"
                if number < 90:
                    assert asked > yielded, "nothing is read ahead"
        assert yielded == checkpoint.bytes


def test_a_tensor_above_the_window_is_read_alone(store: str, tmp_path: Path, counting: type[CountingConnector]) -> None:
    tensors = {"a": ("U8", [100]), "large": ("U8", [500_000]), "b": ("U8", [100]), "c": ("U8", [500_000])}
    checkpoint = make_checkpoint(tmp_path / "m", tensors)
    rdmaload.save(checkpoint.directory, f"memory://{store}/m", chunk_bytes=CHUNK)
    state = {}
    for name, tensor in rdmaload.weight_iterator(f"counting://{store}/m", window_bytes=1000):
        state[name] = tensor
        if name == "large":
            assert settled(counting) < 510_000  # "c" waits
    assert compare(state, checkpoint.directory) == checkpoint.bytes


def test_yielded_tensors_are_the_callers(url: str, checkpoint: Checkpoint) -> None:
    kept = dict(rdmaload.weight_iterator(url, window_bytes=30_000))
    for tensor in kept.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.data_ptr() % 64 == 0
    assert len({tensor.data_ptr() for tensor in kept.values()}) == len(kept)
    assert compare(kept, checkpoint.directory) == checkpoint.bytes


def test_borrowed_memory_is_used_again(url: str) -> None:
    def places(borrow: bool) -> set[int]:
        kept = []  # so that fresh memory really is fresh
        found = set()
        for _, tensor in rdmaload.weight_iterator(url, window_bytes=40_000, borrow=borrow):
            found.add(tensor.data_ptr())
            kept.append(tensor)
        return found

    assert len(places(borrow=False)) == 100
    # A window of four runs, and one that is made ready before the first is given back.
    assert len(places(borrow=True)) <= 5


def test_window_bytes_is_an_option_too(url: str, counting: type[CountingConnector]) -> None:
    with rdmaload.open(url, window_bytes=20_000) as opened:
        next(opened.weight_iterator())
        assert settled(counting) <= 20_000 + 10 * CHUNK


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_nothing_is_refused(url: str, window: int) -> None:
    with rdmaload.open(url) as opened, pytest.raises(ValueError, match="window_bytes must be positive"):
        opened.weight_iterator(window_bytes=window)


def test_max_host_bytes_bounds_the_window(url: str, checkpoint: Checkpoint, counting: type[CountingConnector]) -> None:
    with rdmaload.open(url, max_host_bytes=20_000) as opened:
        iterator = opened.weight_iterator()
        next(iterator)
        assert settled(counting) <= 20_000 + 10 * CHUNK
        assert len(list(iterator)) == len(checkpoint.tensors) - 1
    with rdmaload.open(url, max_host_bytes=9_999) as opened, pytest.raises(MemoryLimitError, match="9999"):
        next(opened.weight_iterator())


def test_an_abandoned_iterator_stops_reading(
    url: str, counting: type[CountingConnector], checkpoint: Checkpoint
) -> None:
    with rdmaload.open(url) as opened:
        iterator = opened.weight_iterator(window_bytes=80_000)
        next(iterator)
        del iterator
        gc.collect()
        asked = settled(counting)
        assert asked < checkpoint.bytes / 2
        # The model is as good as before.
        assert compare(opened.load(), checkpoint.directory) == checkpoint.bytes


def test_abandoning_the_function_leaves_no_thread_and_no_connection(redis_url: str, checkpoint: Checkpoint) -> None:
    rdmaload.save(checkpoint.directory, redis_url, chunk_bytes=CHUNK)
    dict(rdmaload.weight_iterator(redis_url))  # what torch and redis-py start once
    gc.collect()
    before = loader_threads()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    iterator = rdmaload.weight_iterator(redis_url, window_bytes=80_000)
    next(iterator)
    assert loader_threads() > before
    del iterator
    wait_for(lambda: loader_threads() <= before, "threads are left")
    wait_for(lambda: len(list(Path("/proc/self/fd").iterdir())) <= descriptors, "descriptors are left")


def test_what_is_queued_when_the_iterator_is_closed_is_never_read(
    url: str, counting: type[CountingConnector], monkeypatch: pytest.MonkeyPatch
) -> None:
    counting.permits = permits = threading.Semaphore(0)
    with rdmaload.open(url) as opened:
        batches: list[Batch] = []  # held, so that closing does not wait for the readers, which wait for permits

        def start(*arguments: object, **keywords: object) -> Batch:
            batches.append(original(*arguments, **keywords))
            return batches[-1]

        original = opened._reader.start
        monkeypatch.setattr(opened._reader, "start", start)
        iterator = opened.weight_iterator(window_bytes=400_000)  # runs of ten tensors, four of them ahead
        first = threading.Thread(target=lambda: next(iterator))
        first.start()
        while first.is_alive():
            permits.release()
            first.join(0.001)
        before = settled(counting)
        iterator.close()
        permits.release(10_000)
        assert settled(counting) <= before + 2 * CHUNK  # what its two readers had in hand
        assert len(batches) == 4


@pytest.mark.parametrize("store_kind", ["counting", "redis", "directory"])
def test_closing_the_model_meanwhile_is_one_clear_error(
    request: pytest.FixtureRequest, url: str, checkpoint: Checkpoint, store_kind: str
) -> None:
    place = url
    if store_kind == "redis":
        place = request.getfixturevalue("redis_url")
        rdmaload.save(checkpoint.directory, place, chunk_bytes=CHUNK)
    elif store_kind == "directory":
        place = str(checkpoint.directory)
    opened = rdmaload.open(place)
    iterator = opened.weight_iterator(window_bytes=40_000)
    seen = [next(iterator)]
    opened.close()
    with pytest.raises(UnavailableError, match="is closed: open it again"):
        seen.extend(iterator)
    assert len(seen) <= 4  # what was ready may still come, whole
    expected = rdmaload.load(checkpoint.directory)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in seen)
    with pytest.raises(StopIteration):
        next(iterator)


def test_closing_the_model_in_another_thread_ends_a_load(
    url: str, counting: type[CountingConnector], checkpoint: Checkpoint
) -> None:
    failures: list[BaseException] = []
    opened = rdmaload.open(url)
    counting.gate.clear()

    def load() -> None:
        try:
            opened.load()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=load)
    thread.start()
    assert counting.entered.wait(10)
    closer = threading.Thread(target=opened.close)
    closer.start()
    counting.gate.set()
    closer.join(10)
    thread.join(10)
    assert not thread.is_alive()
    assert not closer.is_alive()
    (failure,) = failures
    assert isinstance(failure, UnavailableError)
    assert "closed" in str(failure)
    assert settled(counting) < checkpoint.bytes / 2


def test_a_failure_ahead_comes_in_its_place(url: str, counting: type[CountingConnector]) -> None:
    counting.fail_after_bytes = 300_000
    seen = []
    with rdmaload.open(url, max_integrity_attempts=1) as opened:
        iterator = opened.weight_iterator(window_bytes=100_000)
        with pytest.raises(IntegrityError, match="is damaged") as caught:
            seen.extend(name for name, _ in iterator)
        assert caught.value.key is not None
        assert seen == [f"layer.{i:02}" for i in range(len(seen))]
        assert 15 <= len(seen) <= 30  # all that had arrived before
        with pytest.raises(StopIteration):
            next(iterator)
        counting.fail_after_bytes = None
        assert len(list(opened.weight_iterator())) == 100


def test_two_iterators_of_one_model_at_once(url: str, checkpoint: Checkpoint) -> None:
    with rdmaload.open(url) as opened:
        pairs = zip(opened.weight_iterator(window_bytes=30_000), opened.weight_iterator(include="*"), strict=True)
        for (name, tensor), (other_name, other) in pairs:
            assert name == other_name
            assert torch.equal(tensor, other)
            assert tensor.data_ptr() != other.data_ptr()


def test_filters_and_an_empty_selection(url: str, counting: type[CountingConnector]) -> None:
    with rdmaload.open(url) as opened:
        assert list(opened.weight_iterator(include="nothing")) == []
        assert counting.asked_bytes == 0
        assert [name for name, _ in opened.weight_iterator(include="layer.5?", exclude="*[1-9]")] == ["layer.50"]
        assert counting.asked_bytes <= 10_000 + 2 * CHUNK

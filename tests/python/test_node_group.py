"""Reading once per node: every member gets every byte, the store is read once, and whoever dies is told of."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import rdmaload
from rdmaload import NodeGroup
from rdmaload.connectors import registry
from rdmaload.connectors.memory import MemoryConnector, forget_store
from rdmaload.errors import IntegrityError, UnavailableError
from rdmaload.stats import LoadStats
from tests.support.checkpoints import Checkpoint, all_dtypes, compare, make_checkpoint
from tests.support.servers import RedisServer

CHUNK = 1000
ROOT = Path(__file__).resolve().parents[2]


class CountingConnector(MemoryConnector):
    """Counts the bytes of chunks that were asked for; fails from some byte on."""

    lock = threading.Lock()
    asked_bytes = 0
    fail_after_bytes: int | None = None

    def get_into(self, key: str, buffer: memoryview) -> int:
        cls = type(self)
        with cls.lock:
            cls.asked_bytes += len(buffer)
            failing = cls.fail_after_bytes is not None and cls.asked_bytes > cls.fail_after_bytes
        if failing:
            raise IntegrityError(f"{key} is damaged")
        return super().get_into(key, buffer)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[CountingConnector]:
    """A fresh class per test, registered as counting://."""
    cls = type("Counting", (CountingConnector,), {"lock": threading.Lock()})
    monkeypatch.setitem(registry._registered, "counting", cls)
    return cls


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """100 tensors of 10,000 bytes in 4 files, and an empty one."""
    tensors = {f"layer.{i:02}": ("U8", [10_000]) for i in range(100)}
    return make_checkpoint(tmp_path / "m", tensors | {"empty": ("F32", [0, 3])}, files=4)


@pytest.fixture
def url(model: str, checkpoint: Checkpoint, counting: type[CountingConnector]) -> Iterator[str]:
    rdmaload.save(checkpoint.directory, f"memory://{model}/m", chunk_bytes=CHUNK)
    yield f"counting://{model}/m"
    forget_store(model)


def read_by(url: str, name: str, member: int, size: int, **opts: object) -> dict[str, torch.Tensor]:
    group = NodeGroup(name, member, size, join_seconds=20)
    return dict(rdmaload.weight_iterator(url, node=group, **opts))


def test_every_member_gets_every_tensor_and_the_store_is_read_once(
    url: str, checkpoint: Checkpoint, counting: type[CountingConnector], model: str
) -> None:
    stats = [LoadStats() for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        states = list(threads.map(lambda i: read_by(url, model, i, 3, stats=stats[i], window_bytes=80_000), range(3)))
    for state in states:
        compare(state, checkpoint.directory)
    paths = sorted(one.path for one in stats)
    assert paths == ["node-shared", "node-shared", "python"]
    # Chunks on the border of two parts are read for both, as without a group.
    assert 1_000_000 <= counting.asked_bytes < 1.2 * 1_000_000
    assert [one.bytes for one in stats] == [1_000_000] * 3
    assert all(one.verified_bytes >= 1_000_000 for one in stats)
    assert len({one.generation for one in stats}) == 1
    assert stats[0].generation is not None


def test_all_dtypes_arrive_as_without_a_group(tmp_path: Path, model: str) -> None:
    checkpoint = all_dtypes(tmp_path / "all")
    with ThreadPoolExecutor(2) as threads:
        states = list(threads.map(lambda i: read_by(str(checkpoint.directory), model, i, 2), range(2)))
    alone = rdmaload.load(checkpoint.directory)
    for state in states:
        assert list(state) == list(alone)
        for name, tensor in state.items():
            assert (tensor.dtype, tensor.shape) == (alone[name].dtype, alone[name].shape)
            assert tensor.untyped_storage().nbytes() == alone[name].untyped_storage().nbytes()
        compare(state, checkpoint.directory)


def test_what_one_member_writes_no_other_sees(url: str, checkpoint: Checkpoint, model: str) -> None:
    writes = threading.Barrier(2, timeout=20)

    def member(number: int) -> dict[str, torch.Tensor]:
        state = {}
        for name, tensor in rdmaload.weight_iterator(
            url, node=NodeGroup(model, number, 2, join_seconds=20), window_bytes=50_000
        ):
            if number == 0:
                tensor.fill_(255)  # before the other looks
            writes.wait()
            state[name] = tensor
        return state

    with ThreadPoolExecutor(2) as threads:
        spoiled, clean = threads.map(member, range(2))
    compare(clean, checkpoint.directory)
    assert all(bool((tensor == 255).all()) for name, tensor in spoiled.items() if name != "empty")


def test_a_slow_member_bounds_what_is_read_ahead(
    url: str, checkpoint: Checkpoint, counting: type[CountingConnector], model: str
) -> None:
    go_on = threading.Event()
    first = threading.Event()

    def slow() -> dict[str, torch.Tensor]:
        tensors = rdmaload.weight_iterator(url, node=NodeGroup(model, 1, 2, join_seconds=20), window_bytes=100_000)
        state = dict([next(tensors)])
        first.set()
        assert go_on.wait(20)
        return state | dict(tensors)

    with ThreadPoolExecutor(2) as threads:
        eager = threads.submit(read_by, url, model, 0, 2, window_bytes=100_000)
        dawdling = threads.submit(slow)
        assert first.wait(20)
        before = -1
        while before != counting.asked_bytes:  # until no more is read
            before = counting.asked_bytes
            time.sleep(0.3)
        assert before <= 100_000 + 8 * CHUNK
        assert not eager.done()
        go_on.set()
        compare(eager.result(20), checkpoint.directory)
        compare(dawdling.result(20), checkpoint.directory)


def test_a_tensor_above_the_window_is_read_alone(tmp_path: Path, model: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "m", {"a": ("U8", [100]), "big": ("U8", [90_000]), "z": ("U8", [7])})
    with ThreadPoolExecutor(2) as threads:
        states = threads.map(lambda i: read_by(str(checkpoint.directory), model, i, 2, window_bytes=1000), range(2))
    for state in states:
        compare(state, checkpoint.directory)


def test_an_error_of_the_store_reaches_every_member(url: str, counting: type[CountingConnector], model: str) -> None:
    counting.fail_after_bytes = 500_000

    def member(number: int) -> BaseException:
        with pytest.raises(IntegrityError, match="damaged") as caught:
            read_by(url, model, number, 3, window_bytes=50_000, max_integrity_attempts=1)
        return caught.value

    with ThreadPoolExecutor(3) as threads:
        errors = list(threads.map(member, range(3)))
    assert len({str(error) for error in errors}) == 1
    assert all(isinstance(error, IntegrityError) and error.key is not None for error in errors)


def test_a_member_that_has_enough_does_not_stop_the_others(url: str, checkpoint: Checkpoint, model: str) -> None:
    reads = threading.Event()

    def reader() -> dict[str, torch.Tensor]:
        reads.set()
        return read_by(url, model, 0, 3, window_bytes=50_000)

    def leaver() -> int:
        tensors = rdmaload.weight_iterator(url, node=NodeGroup(model, 1, 3, join_seconds=20), window_bytes=50_000)
        taken = sum(1 for _ in zip(range(3), tensors, strict=False))
        tensors.close()  # type: ignore[attr-defined]
        return taken

    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(reader)
        assert reads.wait(20)
        wait_until(lambda: sockets_named("@rdmaload-") > 0)
        leaving = threads.submit(leaver)
        last = threads.submit(read_by, url, model, 2, 3, window_bytes=50_000)
        assert leaving.result(20) == 3
        compare(first.result(20), checkpoint.directory)
        compare(last.result(20), checkpoint.directory)


def test_an_incomplete_group_reads_without_one_and_says_so(
    url: str, checkpoint: Checkpoint, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    stats = LoadStats()
    group = NodeGroup(model, 1, 2, join_seconds=0.2)
    compare(dict(rdmaload.weight_iterator(url, node=group, stats=stats)), checkpoint.directory)
    assert "1 of the 2 members" in str(stats.fallback_reason)
    assert "1 of the 2 members" in caplog.text
    assert stats.path == "python"


def test_groups_of_other_selections_do_not_mix(url: str, checkpoint: Checkpoint, model: str) -> None:
    with ThreadPoolExecutor(4) as threads:
        odd = [threads.submit(read_by, url, model, i, 2, include="layer.*1") for i in range(2)]
        even = [threads.submit(read_by, url, model, i, 2, include="layer.*2") for i in range(2)]
        for future in odd:
            assert set(future.result(20)) == {f"layer.{i}1" for i in range(10)}
        for future in even:
            assert set(future.result(20)) == {f"layer.{i}2" for i in range(10)}


def test_members_that_opened_other_generations_do_not_mix(
    url: str, checkpoint: Checkpoint, model: str, tmp_path: Path
) -> None:
    names = {f"layer.{i:02}": ("U8", [10_000]) for i in range(100)} | {"empty": ("F32", [0, 3])}
    newer = make_checkpoint(tmp_path / "newer", names, files=4, seed=1)
    with rdmaload.open(url) as before:
        rdmaload.save(newer.directory, url.replace("counting", "memory"), chunk_bytes=CHUNK)
        with rdmaload.open(url) as after, ThreadPoolExecutor(2) as threads:
            old, new = threads.map(
                lambda i: dict((before, after)[i].weight_iterator(node=NodeGroup(model, i, 2, join_seconds=0.5))),
                range(2),
            )
    compare(old, checkpoint.directory)
    compare(new, newer.directory)


def test_two_groups_of_one_name_come_one_after_the_other(url: str, checkpoint: Checkpoint, model: str) -> None:
    with ThreadPoolExecutor(4) as threads:
        states = [threads.submit(read_by, url, model, i % 2, 2, window_bytes=50_000) for i in range(4)]
        for state in states:
            compare(state.result(30), checkpoint.directory)


def test_a_group_of_one_is_an_ordinary_load(url: str, checkpoint: Checkpoint, model: str) -> None:
    compare(read_by(url, model, 0, 1), checkpoint.directory)


@pytest.mark.parametrize("arguments", [("g", 2, 2), ("g", -1, 2), ("g", 0, 0)])
def test_impossible_members_are_refused(arguments: tuple[str, int, int]) -> None:
    with pytest.raises(ValueError, match="member"):
        NodeGroup(*arguments)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sockets_named(part: str) -> int:
    """Abstract ones have an @ before the name: a server's socket file may be called much the same."""
    return sum(part in line for line in Path("/proc/net/unix").read_text().splitlines())


_MEMBER = """
    import hashlib, sys
    import rdmaload
    url, name, member, size, stop_at = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    digest = hashlib.sha256()
    group = rdmaload.NodeGroup(name, member, size)
    stats = rdmaload.LoadStats()
    try:
        for count, (tensor_name, tensor) in enumerate(
            rdmaload.weight_iterator(url, node=group, window_bytes=200_000, stats=stats)
        ):
            if count == stop_at:
                print("at", flush=True)
                sys.stdin.readline()
            digest.update(tensor_name.encode() + tensor.numpy().tobytes())
    except rdmaload.RdmaloadError as error:
        print(type(error).__name__, error, flush=True)
        sys.exit(1)
    print(digest.hexdigest(), stats.path, flush=True)
"""


def start_member(url: str, name: str, member: int, size: int, stop_at: int = -1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_MEMBER), url, name, str(member), str(size), str(stop_at)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'python'}:{ROOT}"},
    )


def gets_of(server: RedisServer) -> int:
    found = server.client().info("commandstats").get("cmdstat_get", {"calls": 0})
    return int(found["calls"])


def test_two_processes_fetch_each_chunk_from_redis_once(
    redis_server: RedisServer, checkpoint: Checkpoint, model: str
) -> None:
    url = redis_server.url(model)
    rdmaload.save(checkpoint.directory, url, chunk_bytes=10_000)
    before = gets_of(redis_server)
    alone = rdmaload.LoadStats()
    dict(rdmaload.weight_iterator(url, window_bytes=200_000, stats=alone))
    for_one = gets_of(redis_server) - before
    members = [start_member(url, model, number, 2) for number in range(2)]
    outputs = [member.communicate(timeout=60)[0].split() for member in members]
    for_two = gets_of(redis_server) - before - for_one
    assert outputs[0][0] == outputs[1][0]
    assert sorted(output[1] for output in outputs) == ["node-shared", "resp-tcp"]
    opening = 2  # manifest and index, which every process reads
    assert for_two <= for_one + opening
    assert sockets_named("@rdmaload-") == 0


@pytest.mark.parametrize("victim", ["reader", "other"])
def test_a_killed_member_fails_the_others_clearly_and_leaves_nothing(
    redis_server: RedisServer, checkpoint: Checkpoint, model: str, victim: str
) -> None:
    url = redis_server.url(model)
    rdmaload.save(checkpoint.directory, url, chunk_bytes=10_000)
    first = start_member(url, model, 0, 3, stop_at=5)
    wait_until(lambda: sockets_named("@rdmaload-") > 0)  # it is the one that reads
    others = [start_member(url, model, number, 3, stop_at=5) for number in (1, 2)]
    members = [first, *others]
    for member in members:
        assert member.stdout is not None
        assert member.stdout.readline() == "at\n"
    killed = first if victim == "reader" else others[0]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for member in members:
        if member is not killed:
            output, _ = member.communicate("\n", timeout=60)
            assert output.startswith("UnavailableError"), output
            assert f"member {members.index(killed)} of node group" in output
            assert "has ended" in output
            assert member.returncode == 1
    killed.communicate()
    assert sockets_named("@rdmaload-") == 0


def test_tensors_stay_valid_when_everybody_else_has_gone(url: str, checkpoint: Checkpoint, model: str) -> None:
    with ThreadPoolExecutor(2) as threads:
        kept = [threads.submit(read_by, url, model, i, 2, window_bytes=50_000) for i in range(2)]
        state = kept[0].result(20)
        del kept
    gc.collect()
    compare(state, checkpoint.directory)


def test_a_group_that_stops_early_is_told_why(url: str, model: str) -> None:
    begun = threading.Event()

    def reader() -> None:
        tensors = rdmaload.weight_iterator(url, node=NodeGroup(model, 0, 2, join_seconds=20), window_bytes=50_000)
        begun.set()
        next(tensors)
        tensors.close()  # type: ignore[attr-defined]

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(reader)
        assert begun.wait(20)
        wait_until(lambda: sockets_named("@rdmaload-") > 0)
        with pytest.raises(UnavailableError, match=r"member 0 of node group .* stopped before the end"):
            read_by(url, model, 1, 2, window_bytes=50_000)
        first.result(20)

"""Ten thousand small loads, hundreds by every other way and two hundred with faults leave nothing behind.

Counts (descriptors, threads, objects, half-closed connections) must be exactly what they were. Memory is sampled
once in a hundred loads after a warm-up, and the medians of the first and the last third are compared: a leak of a
kilobyte per load is seen.
"""

from __future__ import annotations

import itertools
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import rdmaload
from rdmaload.errors import RdmaloadError
from tests.support import faults, resp
from tests.support.certificates import Authority
from tests.support.fault_proxy import FaultProxy
from tests.support.footprint import Footprint, anonymous_bytes, growth_bytes
from tests.support.servers import RedisServer

LOADS = 10_000
WARM_UP = 1_000
SAMPLE_EVERY = 100
FAULTY_LOADS = 200
# Between the medians lie 6,000 loads: 700 bytes of each are seen. The allocator's own noise was under 0.5 MiB.
MAX_GROWTH_BYTES = 4 << 20
# Between the medians of the faulty loads lie 100 of them.
MAX_FAULTY_GROWTH_BYTES = 4 << 20
# Of each other way: 200 loads lie between the medians, so that 5 KiB of each are seen.
OTHER_LOADS = 400
OTHER_WARM_UP = 100
OTHER_SAMPLE_EVERY = 10
MAX_OTHER_GROWTH_BYTES = 1 << 20

STATE = {
    "a": torch.arange(1000, dtype=torch.float32),
    "b": torch.arange(77, dtype=torch.int16),
    "c": torch.ones(3, 5, dtype=torch.bfloat16),
}
CHUNK = 1000  # so that a load is a handful of reads
# Long enough for a loaded machine to get over what passes, short enough for two hundred of what does not.
PATIENT = {"connect_timeout": 5.0, "inactivity_timeout": 5.0, "retry_timeout": 10.0}
HASTY = {"connect_timeout": 0.15, "inactivity_timeout": 0.1, "retry_timeout": 0.15}
CHUNK_KEY = "*/chunks/*/*/*"


def check(state: dict[str, torch.Tensor]) -> None:
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        rdmaload.save(STATE, server.url("m"), chunk_bytes=CHUNK)
        yield server


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_small_loads_leave_nothing_behind(server: RedisServer, tmp_path: Path) -> None:
    url = server.url("m")
    save_file(STATE, tmp_path / "model.safetensors")
    memory = "memory://soak/m"
    rdmaload.save(STATE, memory)
    targets = {name: torch.empty_like(tensor) for name, tensor in STATE.items()}

    def load_into() -> dict[str, torch.Tensor]:
        for target in targets.values():
            target.zero_()
        rdmaload.load_into(targets, tmp_path)
        return targets

    with rdmaload.open(url) as opened:
        loads: list[Callable[[], dict[str, torch.Tensor]]] = [
            lambda: rdmaload.load(url),
            opened.load,
            lambda: dict(opened.weight_iterator(window_bytes=3000)),
            lambda: rdmaload.load(tmp_path),
            opened.load,
            lambda: rdmaload.load(memory),
            lambda: dict(rdmaload.weight_iterator(url, window_bytes=3000, connections=1)),
            opened.load,
            load_into,
            lambda: opened.load(include="*", dtype=None),
        ]
        samples = []
        before = None
        for number, load in enumerate(itertools.islice(itertools.cycle(loads), LOADS), 1):
            check(load())
            if number == WARM_UP:
                before = Footprint.of_process()
            elif number > WARM_UP and number % SAMPLE_EVERY == 0:
                samples.append(anonymous_bytes())
        assert before is not None
        assert Footprint.settled(before).beyond(before) == []
    assert len(samples) == (LOADS - WARM_UP) // SAMPLE_EVERY
    assert growth_bytes(samples) < MAX_GROWTH_BYTES, [sample >> 10 for sample in samples]
    rdmaload.remove(memory)


@pytest.fixture(params=["tls", "unix", "direct", "sglang"])
def place(request: pytest.FixtureRequest, authority: Authority, tmp_path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A url, and what to open it with."""
    if request.param == "direct":
        save_file(STATE, tmp_path / "model.safetensors")
        yield str(tmp_path), {"file_io": "direct"}
        return
    ways: dict[str, dict[str, Any]] = {
        "tls": {"tls": authority, "tls_clients": True},
        "unix": {"unix": True},
        "sglang": {},
    }
    with RedisServer(**ways[request.param]) as server:
        layout = "sglang" if request.param == "sglang" else "rdmaload"
        rdmaload.save(STATE, server.url("m"), layout=layout, chunk_bytes=None if layout == "sglang" else CHUNK)
        yield server.url("m"), {}


PATHS = {"tls": "resp-tls", "unix": "resp-unix", "direct": "file-direct", "sglang": "resp-tcp"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_hundreds_of_loads_by_every_other_way_leave_nothing_behind(
    place: tuple[str, dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    url, options = place
    stats = rdmaload.LoadStats()
    with rdmaload.open(url, **options) as opened:
        loads: list[Callable[[], dict[str, torch.Tensor]]] = [
            lambda: rdmaload.load(url, **options),
            lambda: opened.load(stats=stats),
            lambda: dict(opened.weight_iterator(window_bytes=3000)),
            lambda: dict(rdmaload.weight_iterator(url, window_bytes=3000, connections=1, **options)),
        ]
        samples = []
        before = None
        for number, load in enumerate(itertools.islice(itertools.cycle(loads), OTHER_LOADS), 1):
            check(load())
            if number == OTHER_WARM_UP:
                before = Footprint.of_process()
            elif number > OTHER_WARM_UP and number % OTHER_SAMPLE_EVERY == 0:
                samples.append(anonymous_bytes())
        assert before is not None
        assert Footprint.settled(before).beyond(before) == []
    way = request.node.callspec.params["place"]
    # A file system without O_DIRECT says so; what is loaded then is the page cache's business.
    assert stats.path == PATHS[way] or (way == "direct" and stats.fallback_reason is not None)
    assert len(samples) == (OTHER_LOADS - OTHER_WARM_UP) // OTHER_SAMPLE_EVERY
    assert growth_bytes(samples) < MAX_OTHER_GROWTH_BYTES, [sample >> 10 for sample in samples]


FAULTS: dict[str, tuple[faults.Fault, ...]] = {
    "nothing": (),
    "refuse": (),
    "reset at once": (faults.Reset(after=0),),
    "reset once in a value": (faults.Reset(after=2500, first_connections=2),),
    "close in a value": (faults.Close(after=2500),),
    "stall": (faults.Stall(after=2500),),
    "stall at once": (faults.Stall(after=0),),
    "a flipped bit": (faults.FlipBulkBit(key=CHUNK_KEY, index=1, offset=77, bit=3),),
    "a bit that stays flipped": (faults.FlipBulkBit(key=CHUNK_KEY, offset=77, bit=3, repeat="always"),),
    "loading": (faults.Replace(key=CHUNK_KEY, reply=resp.error("LOADING Redis is loading")),),
    "no permission": (faults.Replace(key=CHUNK_KEY, reply=resp.error("NOPERM no"), repeat="always"),),
    "not RESP": (faults.Replace(key=CHUNK_KEY, reply=b"HTTP/1.1 400 Bad Request\r\n\r\n", repeat="always"),),
    "a longer value": (faults.Replace(key=CHUNK_KEY, reply=faults.longer_bulk, repeat="always"),),
    "no manifest": (faults.Replace(key="*/manifest", reply=resp.nil(), repeat="always"),),
    "a slow server": (faults.Delay(seconds=0.002),),
}
PASSING = {"nothing", "reset once in a value", "close in a value", "a flipped bit", "loading", "a slow server"}
# Each connection gets a bit further; whether that is in time is the machine's affair.
EITHER = {"stall"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hundred_loads_with_faults_leave_nothing_behind(server: RedisServer) -> None:
    outcomes: Counter[tuple[str, str]] = Counter()

    def load(name: str) -> None:
        mode = "refuse" if name == "refuse" else "forward"
        with FaultProxy(server.host, server.port, *FAULTS[name], mode=mode) as proxy:
            try:
                check(rdmaload.load(proxy.url("m"), **(PATIENT if name in PASSING else HASTY)))
                outcomes[name, "loaded"] += 1
            except RdmaloadError as error:
                outcomes[name, type(error).__name__] += 1

    for name in FAULTS:
        load(name)
    before = Footprint.of_process()
    samples = []
    for number, name in enumerate(itertools.islice(itertools.cycle(FAULTS), FAULTY_LOADS), 1):
        load(name)
        if number % len(FAULTS) == 0:
            samples.append(anonymous_bytes())
    assert Footprint.settled(before).beyond(before) == []
    assert growth_bytes(samples) < MAX_FAULTY_GROWTH_BYTES, [sample >> 10 for sample in samples]
    # The faults did happen, and the loads that could get over them did.
    assert outcomes.total() == FAULTY_LOADS + len(FAULTS)
    for (name, outcome), count in outcomes.items():
        assert name in EITHER or (outcome == "loaded") == (name in PASSING), (name, outcome, count)


# ---- the measure sees a leak -----------------------------------------------------------------------------------------


def test_nothing_is_beyond_what_there_was() -> None:
    before = Footprint.of_process()
    assert Footprint.settled(before).beyond(before) == []


def test_a_leaked_descriptor_thread_object_and_half_closed_connection_are_seen() -> None:
    def leaks(kind: str) -> list[str]:
        found = Footprint.of_process().beyond(before)
        assert any(text.startswith(kind) for text in found), found
        return found

    before = Footprint.of_process()
    with open("/dev/null"):
        assert leaks("descriptors") == [f"descriptors: {before.descriptors} before, {before.descriptors + 1} now"]
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    leaks("threads")
    end.set()
    thread.join()
    stats = rdmaload.LoadStats()
    leaks("rdmaload.stats.LoadStats: 1 more")
    del stats
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        listener.accept()[0].close()
        assert client.recv(1) == b""  # the peer's end has arrived
        leaks("close_wait: 0 before, 1 now")
    assert Footprint.settled(before).beyond(before) == []


def test_a_leak_of_a_kilobyte_per_load_is_growth() -> None:
    kept = []
    samples = []
    for number in range(1, LOADS - WARM_UP + 1):
        kept.append(bytearray(number.to_bytes(2, "little") * 512))
        if number % (10 * SAMPLE_EVERY) == 0:
            samples.append(anonymous_bytes())
    assert growth_bytes(samples) > MAX_GROWTH_BYTES
    kept.clear()
    with pytest.raises(ValueError, match="no thirds"):
        growth_bytes([1, 2])

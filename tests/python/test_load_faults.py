"""Loads from a server that fails in every way that servers and networks do: right bytes, or one clear error in time."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import rdmaload
from rdmaload._core import crc32c
from rdmaload.errors import (
    AuthenticationError,
    FormatError,
    IntegrityError,
    LoadTimeoutError,
    NotFoundError,
    NotSupportedError,
    RdmaloadError,
    StaleGenerationError,
    UnavailableError,
    UrlError,
)
from rdmaload.index import Index, IndexFile
from rdmaload.manifest import Manifest
from rdmaload.stats import LoadStats
from tests.support import faults, resp
from tests.support.checkpoints import Checkpoint, compare
from tests.support.fault_proxy import FaultProxy
from tests.support.scripted_server import ScriptedServer, answers_from
from tests.support.servers import RedisServer

CHUNK = 50_000
FEW = 4 * CHUNK  # bytes in flight, so that no proxy holds the rest of the model when the server dies
CHUNK_KEY = "*/chunks/*/*/*"
CHUNK_OF = r"[\w-]+/chunks/[0-9a-f]{32}/\d+/\d+"

# Long enough for a loaded machine to do the right thing, short enough for a test of what must fail.
PATIENT = {"connect_timeout": 5.0, "inactivity_timeout": 5.0, "retry_timeout": 10.0}
HASTY = {"connect_timeout": 0.3, "inactivity_timeout": 0.3, "retry_timeout": 0.5}
# No failure takes longer than this, whatever the machine does besides.
PROMPTLY = 15.0


class Stored:
    """A checkpoint in the session's server, to be loaded through proxies."""

    def __init__(self, server: RedisServer, model: str, checkpoint: Checkpoint) -> None:
        self.server = server
        self.model = model
        self.checkpoint = checkpoint
        rdmaload.save(checkpoint.directory, server.url(model), chunk_bytes=CHUNK)

    def proxy(self, *faults: faults.Fault, mode: str = "forward") -> FaultProxy:
        return FaultProxy(self.server.host, self.server.port, *faults, mode=mode)

    def check(self, state: dict[str, torch.Tensor]) -> None:
        assert compare(state, self.checkpoint.directory) == self.checkpoint.bytes


@pytest.fixture
def stored(redis_server: RedisServer, model: str, tiny_checkpoint: Checkpoint) -> Stored:
    return Stored(redis_server, model, tiny_checkpoint)


@pytest.fixture(params=["load", "iterate"])
def loading(request: pytest.FixtureRequest) -> Callable[[rdmaload.Model, LoadStats], dict[str, torch.Tensor]]:
    """Both ways to get a whole model."""

    def load(model: rdmaload.Model, stats: LoadStats) -> dict[str, torch.Tensor]:
        if request.param == "load":
            return model.load(stats=stats)
        return dict(model.weight_iterator(window_bytes=300_000, stats=stats))

    return load


Loading = Callable[[rdmaload.Model, LoadStats], dict[str, torch.Tensor]]


def failure_of(call: Callable[[], object], kind: type[BaseException]) -> BaseException:
    """The error of `call`, which must come before long and leave no doubt where it happened."""
    begin = time.monotonic()
    with pytest.raises(kind) as caught:
        call()
    assert time.monotonic() - begin < PROMPTLY
    return caught.value


# ---- faults that pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        faults.Reset(after=300_000, first_connections=4),
        faults.Close(after=300_000, first_connections=4),
        faults.Reset(after=0, first_connections=3),
        faults.Close(after=5, first_connections=3),
        faults.Reset(after=3, first_connections=2),  # in a header
        faults.Close(after=CHUNK + 60, first_connections=4),  # after one value
        faults.Delay(seconds=0.01),
        faults.FlipBulkBit(key=CHUNK_KEY, index=1, offset=4321, bit=5),
        faults.FlipBulkBit(key=CHUNK_KEY, min_bytes=CHUNK, index=0, offset=CHUNK - 1, bit=7),
        faults.Replace(key=CHUNK_KEY, index=1, reply=resp.error("LOADING Redis is loading the dataset in memory")),
        faults.Replace(key=CHUNK_KEY, index=1, reply=resp.error("OOM command not allowed")),
        faults.Replace(key=CHUNK_KEY, index=0, reply=resp.error("BUSY Redis is busy running a script")),
        faults.Replace(key=CHUNK_KEY, index=0, reply=resp.error("ERR max number of clients reached")),
        faults.Replace(key=CHUNK_KEY, index=2, reply=faults.longer_bulk),
        faults.Replace(key=CHUNK_KEY, index=2, reply=faults.shorter_bulk),
        faults.Replace(key=CHUNK_KEY, index=1, reply=resp.bulk(b"")),
        faults.Replace(key=CHUNK_KEY, index=1, reply=resp.integer(7)),
        faults.Replace(key=CHUNK_KEY, index=1, reply=resp.simple("OK")),
        faults.Replace(key=CHUNK_KEY, index=1, reply=resp.array([resp.bulk(b"x")])),
        faults.Replace(key=CHUNK_KEY, index=1, reply=b"\x00\x01garbage\r\n"),
        faults.Replace(key=CHUNK_KEY, index=1, reply=b"$99999999999999999999\r\n"),
        faults.Replace(key=CHUNK_KEY, index=1, reply=b"$-7\r\n"),
        faults.Replace(key=CHUNK_KEY, index=1, reply=b"$%d\r\n" % CHUNK + b"x" * (CHUNK + 2)),  # no CRLF at the end
    ],
    ids=lambda fault: re.sub(r"\W+", "-", str(fault))[:60],
)
@pytest.mark.parametrize("connections", [1, 3])
def test_a_fault_that_passes_changes_nothing(
    stored: Stored, loading: Loading, fault: faults.Fault, connections: int
) -> None:
    stats = LoadStats()
    with rdmaload.open(stored.server.url(stored.model)) as direct:
        generation = direct.generation
    with stored.proxy() as proxy:
        # Opened through a healthy connection: these are about reading weights.
        with rdmaload.open(proxy.url(stored.model), connections=connections, **PATIENT) as opened:
            proxy.set_faults(*_from_now(proxy, fault))
            stored.check(loading(opened, stats))
            assert opened.generation == generation
        assert proxy.fired > 0
    if not isinstance(fault, faults.Delay):
        assert stats.retries >= 1
    assert stats.verified_bytes == stats.read_bytes
    assert stats.unverified_bytes == 0


def _from_now(proxy: FaultProxy, fault: faults.Fault) -> list[faults.Fault]:
    """`first_connections` counted from here, as opening the model took some connections."""
    if fault.first_connections is None:
        return [fault]
    return [dataclasses.replace(fault, first_connections=fault.first_connections + proxy.connections)]


def test_a_stall_in_the_middle_of_a_value_is_read_again_elsewhere(stored: Stored, loading: Loading) -> None:
    options = {**PATIENT, "inactivity_timeout": 0.3}
    for after in (0, 4, CHUNK // 2):
        stats = LoadStats()
        with stored.proxy() as proxy, rdmaload.open(proxy.url(stored.model), **options) as opened:
            proxy.set_faults(faults.Stall(after=after, first_connections=proxy.connections + 1))
            stored.check(loading(opened, stats))
            assert proxy.fired == 1
            assert stats.retries >= 1


def test_a_server_that_trickles_is_not_a_stall(stored: Stored) -> None:
    # Slower than the time-out in all, but never silent.
    with stored.proxy(faults.Throttle(bytes_per_second=2.5e6)) as proxy:
        stats = LoadStats()
        state = rdmaload.load(proxy.url(stored.model, "inactivity_timeout=0.5"), stats=stats)
        stored.check(state)
        assert stats.retries == 0


def test_what_arrived_before_a_fault_is_not_read_again(stored: Stored) -> None:
    with stored.proxy() as proxy:
        with rdmaload.open(proxy.url(stored.model), connections=1, **PATIENT) as opened:
            before = proxy.bytes_to_client
            # In the middle of the file, one connection at a time, one chunk in flight.
            proxy.set_faults(faults.Reset(after=10 * CHUNK, first_connections=proxy.connections + 1))
            stored.check(opened.load())
        # At most what was in flight comes twice.
        assert proxy.bytes_to_client - before < stored.checkpoint.file_bytes + 2 * CHUNK + 16 * 2**20
        assert proxy.connections <= 4


def test_a_small_pipeline_repeats_little(stored: Stored) -> None:
    with stored.proxy() as proxy:
        with rdmaload.open(proxy.url(stored.model), connections=1, bytes_in_flight=CHUNK, **PATIENT) as opened:
            before = proxy.bytes_to_client
            proxy.set_faults(faults.Reset(after=10 * CHUNK + 100, first_connections=proxy.connections + 1))
            stats = LoadStats()
            stored.check(opened.load(stats=stats))
        assert proxy.bytes_to_client - before < stats.read_bytes * 1.02 + 3 * CHUNK


# ---- faults that stay ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["refuse", "never_accept"])
def test_a_server_that_cannot_be_reached_to_open(stored: Stored, mode: str) -> None:
    with stored.proxy(mode=mode) as proxy:
        error = failure_of(
            lambda: rdmaload.open(proxy.url(stored.model), **HASTY),
            UnavailableError if mode == "refuse" else RdmaloadError,
        )
        assert isinstance(error, (UnavailableError, LoadTimeoutError))
        assert f"{proxy.host}:{proxy.port}" in str(error)


@pytest.mark.parametrize(("mode", "message"), [("refuse", "refused"), ("never_accept", "connect")])
def test_a_server_that_is_gone_when_the_weights_are_read(
    stored: Stored, loading: Loading, mode: str, message: str
) -> None:
    with stored.proxy() as proxy, rdmaload.open(proxy.url(stored.model), **HASTY) as opened:
        proxy.set_mode(mode)
        error = failure_of(lambda: loading(opened, LoadStats()), RdmaloadError)
        assert isinstance(error, (UnavailableError, LoadTimeoutError))
        assert re.search(message, str(error))
        assert re.search(r"attempt [1-9]", str(error))
        assert error.url == opened.url
        assert re.fullmatch(CHUNK_OF, error.key or "")
        # And it comes back.
        proxy.set_mode("forward")
        stored.check(loading(opened, LoadStats()))


@pytest.mark.parametrize("after", [0, 4, CHUNK // 2])
def test_a_stall_on_every_connection_is_a_timeout(stored: Stored, loading: Loading, after: int) -> None:
    with stored.proxy() as proxy, rdmaload.open(proxy.url(stored.model), **HASTY) as opened:
        proxy.set_faults(faults.Stall(after=after))
        error = failure_of(lambda: loading(opened, LoadStats()), LoadTimeoutError)
        assert "inactivity_timeout" in str(error)
        assert re.search(CHUNK_OF, str(error))


@pytest.mark.parametrize("fault", [faults.Reset(after=1000), faults.Close(after=1000)])
def test_connections_that_always_die_in_a_value(stored: Stored, loading: Loading, fault: faults.Fault) -> None:
    with stored.proxy() as proxy, rdmaload.open(proxy.url(stored.model), **HASTY) as opened:
        proxy.set_faults(fault)
        error = failure_of(lambda: loading(opened, LoadStats()), UnavailableError)
        assert re.search(r"attempt \d+", str(error))


def test_a_bit_that_always_flips_names_the_chunk(stored: Stored, loading: Loading) -> None:
    fault = faults.FlipBulkBit(key="*/chunks/*/*/2", min_bytes=CHUNK, offset=100, bit=1, repeat="always")
    with stored.proxy() as proxy, rdmaload.open(proxy.url(stored.model), **PATIENT) as opened:
        proxy.set_faults(fault)
        stats = LoadStats()
        error = failure_of(lambda: loading(opened, stats), IntegrityError)
        assert re.search(rf"chunk 2 \('{CHUNK_OF}'\) has CRC32C 0x[0-9a-f]{{8}}, the index says 0x", str(error))
        assert "save the model again" in str(error)
        assert "attempt 3" in str(error)
        assert re.fullmatch(CHUNK_OF, error.key or "")
        assert error.key.endswith("/2")
        assert error.url == proxy.url(stored.model)
        assert stats.retries >= 2
        assert proxy.fired >= 3


def test_max_integrity_attempts_is_how_often_a_chunk_is_read(stored: Stored) -> None:
    for attempts in (1, 4):
        fault = faults.FlipBulkBit(key="*/chunks/*/*/3", min_bytes=CHUNK, repeat="always")
        with (
            stored.proxy() as proxy,
            rdmaload.open(proxy.url(stored.model), connections=1, max_integrity_attempts=attempts, **PATIENT) as opened,
        ):
            proxy.set_faults(fault)
            keys = [name for name, spec in opened.tensors.items() if spec.file.startswith("model-00001")]
            error = failure_of(functools.partial(opened.load, include=keys), IntegrityError)
            assert f"attempt {attempts})" in str(error)
            assert proxy.fired == attempts


def test_verify_off_lets_a_flipped_bit_pass_and_says_that_nothing_was_verified(stored: Stored) -> None:
    # What the checksum is for: without it the bit arrives.
    fault = faults.FlipBulkBit(key=CHUNK_KEY, min_bytes=CHUNK, index=2, offset=77)
    with stored.proxy() as proxy, rdmaload.open(proxy.url(stored.model), verify="off", **PATIENT) as opened:
        proxy.set_faults(fault)
        stats = LoadStats()
        state = opened.load(stats=stats)
        assert proxy.fired == 1
    assert (stats.verified_bytes, stats.unverified_bytes, stats.retries) == (0, stats.read_bytes, 0)
    with pytest.raises(AssertionError):
        stored.check(state)


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (resp.error("NOAUTH Authentication required."), AuthenticationError, "NOAUTH"),
        (resp.error("NOPERM this user has no permissions"), AuthenticationError, "ACL"),
        (resp.error("MOVED 3999 10.0.0.9:6381"), NotSupportedError, r"redis\+cluster"),
        (resp.error("ASK 3999 10.0.0.9:6381"), NotSupportedError, "cluster"),
        (resp.error("WRONGTYPE Operation against a key"), FormatError, "WRONGTYPE"),
        (resp.error("ERR unknown command 'GET'"), NotSupportedError, "unknown command"),
        (resp.error("LOADING Redis is loading the dataset in memory"), UnavailableError, "LOADING"),
        (resp.error("OOM command not allowed when used memory > 'maxmemory'."), UnavailableError, "maxmemory"),
        (faults.longer_bulk, IntegrityError, "bytes, expected"),
        (faults.shorter_bulk, IntegrityError, "bytes, expected"),
        (resp.bulk(b""), IntegrityError, "0 bytes, expected"),
        (resp.integer(1), FormatError, "no value"),
        (resp.simple("OK"), FormatError, "no value"),
        (b"$99999999999999999999\r\n", FormatError, ""),
        (b"\x00\xff garbage\r\n", FormatError, ""),
        (resp.nil(), NotFoundError, "evicted"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[:30],
)
def test_a_reply_that_stays_wrong(
    stored: Stored, reply: bytes | Callable[[bytes], bytes], kind: type[RdmaloadError], message: str
) -> None:
    fault = faults.Replace(key="*/chunks/*/*/1", reply=reply, repeat="always")
    options = {**HASTY, "inactivity_timeout": 5.0}
    with stored.proxy() as proxy, rdmaload.open(proxy.url(stored.model), **options) as opened:
        proxy.set_faults(fault)
        stats = LoadStats()
        error = failure_of(lambda: opened.load(stats=stats), kind)
        assert type(error) is kind
        assert re.search(message, str(error))
        assert re.fullmatch(CHUNK_OF, error.key or "")
        assert opened.url in str(error)
        # What cannot pass is not tried again.
        if kind in (AuthenticationError, NotSupportedError, NotFoundError):
            assert stats.retries == 0
    stored.check(rdmaload.load(stored.server.url(stored.model)))


@pytest.mark.parametrize(
    ("key", "kind"),
    [("*/manifest", IntegrityError), ("*/index", IntegrityError)],
)
def test_a_bit_that_flips_while_opening(stored: Stored, key: str, kind: type[RdmaloadError]) -> None:
    fault = faults.FlipBulkBit(key=key, offset=60, repeat="always")
    with stored.proxy(fault) as proxy:
        error = failure_of(lambda: rdmaload.open(proxy.url(stored.model), **HASTY), kind)
        assert (error.key or "").endswith(key[1:])
        assert error.url == proxy.url(stored.model)


def test_loading_while_opening_passes_or_times_out(stored: Stored) -> None:
    loading_error = resp.error("LOADING Redis is loading the dataset in memory")
    with stored.proxy(faults.Replace(key="*/manifest", reply=loading_error)) as proxy:
        stored.check(rdmaload.load(proxy.url(stored.model), **PATIENT))
        assert proxy.fired == 1
    with stored.proxy(faults.Replace(key="*/manifest", reply=loading_error, repeat="always")) as proxy:
        failure_of(lambda: rdmaload.open(proxy.url(stored.model), **HASTY), UnavailableError)


# ---- deadlines and cancellation --------------------------------------------------------------------------------------


def test_the_whole_load_has_a_timeout(stored: Stored) -> None:
    with stored.proxy() as proxy, rdmaload.open(proxy.url(stored.model), timeout=0.4, **PATIENT) as opened:
        proxy.set_faults(faults.Throttle(bytes_per_second=200_000))  # 6 s and more in all
        error = failure_of(opened.load, LoadTimeoutError)
        assert re.search(r"timeout=0\.4 s .*\d+ of \d+ bytes had arrived", str(error))
    stored.check(rdmaload.load(stored.server.url(stored.model)))


def test_the_whole_iteration_has_a_timeout(stored: Stored) -> None:
    with stored.proxy() as proxy, rdmaload.open(proxy.url(stored.model), timeout=0.5, **PATIENT) as opened:
        # 3 s and more in all, but no part alone comes near the limit.
        proxy.set_faults(faults.Throttle(bytes_per_second=400_000))
        error = failure_of(lambda: list(opened.weight_iterator(window_bytes=20_000)), LoadTimeoutError)
        assert "timeout=0.5 s" in str(error)


LOAD_UNTIL_INTERRUPTED = """
import sys, rdmaload
model = rdmaload.open(sys.argv[1], inactivity_timeout=60, retry_timeout=60)
print("opened", flush=True)
try:
    if sys.argv[2] == "load":
        model.load()
    elif sys.argv[2] == "iterate":
        list(model.weight_iterator())
    else:
        import torch
        model.load_into({name: torch.zeros(spec.shape, dtype=torch.bfloat16) for name, spec in model.tensors.items()})
except KeyboardInterrupt:
    print("interrupted", flush=True)
    model.close()
    sys.exit(130)
print("not interrupted")
"""


@pytest.mark.parametrize("how", ["load", "iterate", "into"])
def test_control_c_ends_a_load_promptly(stored: Stored, how: str) -> None:
    with stored.proxy(faults.Stall(after=700_000)) as proxy:
        command = [sys.executable, "-c", LOAD_UNTIL_INTERRUPTED, proxy.url(stored.model), how]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "opened\n"
            assert proxy.wait_for_fault(30)
            begin = time.monotonic()
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=30)
            assert time.monotonic() - begin < 10
            assert (output, process.returncode) == ("interrupted\n", 130), errors
        finally:
            process.kill()
            process.communicate()


# ---- servers that go away and come back ------------------------------------------------------------------------------


class _DuringLoad:
    """A load in a thread, through a proxy that lets only some bytes pass before something happens."""

    def __init__(self, opened: rdmaload.Model, stats: LoadStats) -> None:
        self.state: dict[str, torch.Tensor] | None = None
        self.failure: BaseException | None = None
        self._opened = opened
        self._stats = stats
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.state = self._opened.load(stats=self._stats)
        except BaseException as failure:
            self.failure = failure

    def result(self) -> dict[str, torch.Tensor]:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the load hangs"
        if self.failure is not None:
            raise self.failure
        assert self.state is not None
        return self.state


@pytest.fixture
def persistent() -> Iterator[RedisServer]:
    """A server that keeps its data through a restart."""
    with RedisServer(args=["--appendonly", "yes", "--appendfsync", "always"]) as server:
        yield server


def test_a_server_killed_and_restarted_in_the_middle_of_a_load(
    persistent: RedisServer, tiny_checkpoint: Checkpoint
) -> None:
    rdmaload.save(tiny_checkpoint.directory, persistent.url("m"), chunk_bytes=CHUNK)
    slow = faults.Throttle(bytes_per_second=1e6)
    with FaultProxy(persistent.host, persistent.port) as proxy:
        stats = LoadStats()
        with rdmaload.open(proxy.url("m"), bytes_in_flight=FEW, **{**PATIENT, "retry_timeout": 40.0}) as opened:
            before = proxy.bytes_to_client
            proxy.set_faults(slow)
            load = _DuringLoad(opened, stats)
            assert proxy.wait_for_bytes(before + 500_000)
            persistent.kill()
            proxy.set_faults()
            persistent.restart()
            assert compare(load.result(), tiny_checkpoint.directory) == tiny_checkpoint.bytes
        assert stats.retries >= 1


def test_a_server_that_comes_back_empty(tiny_checkpoint: Checkpoint) -> None:
    with RedisServer() as server, FaultProxy(server.host, server.port) as proxy:
        rdmaload.save(tiny_checkpoint.directory, server.url("m"), chunk_bytes=CHUNK)
        with rdmaload.open(proxy.url("m"), bytes_in_flight=FEW, **PATIENT) as opened:
            before = proxy.bytes_to_client
            proxy.set_faults(faults.Throttle(bytes_per_second=1e6))
            load = _DuringLoad(opened, LoadStats())
            assert proxy.wait_for_bytes(before + 500_000)
            server.kill()
            proxy.set_faults()
            server.restart()
            with pytest.raises(StaleGenerationError, match=r"was removed .*open the model again"):
                load.result()


def test_a_server_that_comes_back_with_the_model_saved_anew(tiny_checkpoint: Checkpoint) -> None:
    with RedisServer() as server, FaultProxy(server.host, server.port) as proxy:
        rdmaload.save(tiny_checkpoint.directory, server.url("m"), chunk_bytes=CHUNK)
        with rdmaload.open(proxy.url("m"), bytes_in_flight=FEW, **PATIENT) as opened:
            before = proxy.bytes_to_client
            proxy.set_faults(faults.Throttle(bytes_per_second=1e6))
            load = _DuringLoad(opened, LoadStats())
            assert proxy.wait_for_bytes(before + 500_000)
            # Nobody gets through until the server holds the model again.
            proxy.set_mode("refuse")
            server.restart()
            saved = rdmaload.save(tiny_checkpoint.directory, server.url("m"), chunk_bytes=CHUNK)
            proxy.set_faults()
            proxy.set_mode("forward")
            with pytest.raises(StaleGenerationError, match=f"replaced by generation {saved.generation}"):
                load.result()
        assert compare(rdmaload.load(proxy.url("m")), tiny_checkpoint.directory) == tiny_checkpoint.bytes


def test_a_server_that_stays_away_is_an_error_within_the_deadline(tiny_checkpoint: Checkpoint) -> None:
    with RedisServer() as server, FaultProxy(server.host, server.port) as proxy:
        rdmaload.save(tiny_checkpoint.directory, server.url("m"), chunk_bytes=CHUNK)
        with rdmaload.open(proxy.url("m"), bytes_in_flight=FEW, **HASTY) as opened:
            before = proxy.bytes_to_client
            proxy.set_faults(faults.Throttle(bytes_per_second=1e6))
            load = _DuringLoad(opened, LoadStats())
            assert proxy.wait_for_bytes(before + 500_000)
            server.kill()
            failure_of(load.result, UnavailableError)


# ---- chunks that are gone, generations that change -------------------------------------------------------------------


def chunk_key(opened: rdmaload.Model, model: str, chunk: int = 3) -> str:
    file = next(file for file in opened.files if file.path.startswith("model-00001"))
    return f"{model}/chunks/{opened.generation}/{file.number}/{chunk}"


@pytest.mark.parametrize("verify", ["auto", "off"])
def test_an_evicted_chunk(stored: Stored, loading: Loading, verify: str) -> None:
    with rdmaload.open(stored.server.url(stored.model), verify=verify) as opened, stored.server.client() as client:
        key = chunk_key(opened, stored.model)
        assert client.delete(key) == 1
        stats = LoadStats()
        error = failure_of(lambda: loading(opened, stats), NotFoundError)
        assert re.search(f"'{key}' is gone although the manifest still names.*noeviction", str(error))
        assert (error.key, error.url) == (key, opened.url)
        assert stats.retries == 0


def test_a_model_that_is_replaced_and_pruned_while_it_is_read(stored: Stored, loading: Loading) -> None:
    url = stored.server.url(stored.model)
    with rdmaload.open(url) as opened:
        saved = rdmaload.save(stored.checkpoint.directory, url)
        stored.check(loading(opened, LoadStats()))  # replaced: what is open goes on
        rdmaload.prune(url, force=True)
        error = failure_of(lambda: loading(opened, LoadStats()), StaleGenerationError)
        assert re.search(
            f"generation {opened.generation} was replaced by generation {saved.generation} and pruned.*open the model",
            str(error),
        )
        assert isinstance(error, LookupError)
    with rdmaload.open(url) as again:
        stored.check(loading(again, LoadStats()))


def test_a_model_that_is_removed_while_it_is_read(stored: Stored) -> None:
    url = stored.server.url(stored.model)
    with rdmaload.open(url) as opened:
        rdmaload.remove(url)
        error = failure_of(opened.load, StaleGenerationError)
        assert "was removed" in str(error)
    with pytest.raises(NotFoundError, match="there is no model at"):
        rdmaload.open(url)


def test_a_manifest_that_cannot_be_read_to_say_why(stored: Stored) -> None:
    with rdmaload.open(stored.server.url(stored.model)) as opened, stored.server.client() as client:
        client.delete(chunk_key(opened, stored.model))
        client.set(f"{stored.model}/manifest", b"not a manifest")
        error = failure_of(opened.load, NotFoundError)
        assert "cannot be read to say why" in str(error)


def test_an_index_that_is_gone(stored: Stored) -> None:
    url = stored.server.url(stored.model)
    with rdmaload.open(url) as opened:
        generation = opened.generation
    with stored.server.client() as client:
        client.delete(f"{stored.model}/chunks/{generation}/index")
    error = failure_of(lambda: rdmaload.open(url), NotFoundError)
    assert (error.key or "").endswith("/index")
    assert "save the model again" in str(error)


def test_a_save_between_two_ranks_opens(stored: Stored) -> None:
    url = stored.server.url(stored.model)
    with rdmaload.open(url) as rank0:
        pinned = rank0.generation
        other = {name: torch.zeros(3) for name in ("a", "b")}
        rdmaload.save(other, url)
        # Rank 1 starts later and reads what rank 0 reads, not what is published now.
        with rdmaload.open(f"{url}?generation={pinned}") as rank1:
            assert rank1.generation == pinned
            stored.check(rank1.load())
        stored.check(rank0.load())
        with rdmaload.open(url) as unpinned:
            assert set(unpinned.load()) == {"a", "b"}
        rdmaload.prune(url, force=True)
        error = failure_of(lambda: rdmaload.open(f"{url}?generation={pinned}"), StaleGenerationError)
        assert pinned in str(error)
        assert "has replaced it" in str(error)


def test_a_generation_that_is_pinned_and_published(stored: Stored) -> None:
    url = stored.server.url(stored.model)
    with rdmaload.open(url) as opened:
        generation = opened.generation
    stored.check(rdmaload.load(url, generation=generation))
    failure_of(lambda: rdmaload.open(url, generation="0" * 32), StaleGenerationError)
    with pytest.raises(UrlError, match="generation"):
        rdmaload.open(url, generation="latest")


def test_the_wrong_database_and_the_wrong_port(stored: Stored) -> None:
    url = stored.server.url(stored.model)
    with pytest.raises(NotFoundError, match="there is no model at") as caught:
        rdmaload.open(url, db=5)
    assert caught.value.key == f"{stored.model}/manifest"
    with pytest.raises(UrlError, match="no such database"):
        rdmaload.open(url, db=99)
    with ScriptedServer(lambda words: b"HTTP/1.1 400 Bad Request\r\n\r\n") as server:
        failure_of(lambda: rdmaload.open(server.url("m"), **HASTY), RdmaloadError)


# ---- hostile values --------------------------------------------------------------------------------------------------


HEADER = json.dumps({"w": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}}).encode()


def index_of(*files: IndexFile, chunk_bytes: int = 256, crcs: bytes | None = None) -> bytes:
    chunks = sum(file.chunk_count(chunk_bytes) for file in files)
    return Index.of(files, chunk_bytes=chunk_bytes, crcs=bytes(4 * chunks) if crcs is None else crcs).encode()


def manifest_for(index: bytes, **changed: object) -> bytes:
    fields = {
        "generation": "a" * 32,
        "files": 1,
        "bytes": 8 + len(HEADER) + 400,
        "writer": "rdmaload 9",
    }
    return Manifest.of(index, **{**fields, **changed}).encode()  # type: ignore[arg-type]


def weight_file(header: bytes, size: int | None = None, **fields: object) -> IndexFile:
    whole = 8 + len(header) + 400 if size is None else size
    return IndexFile("model.safetensors", whole, 0, header=header, **fields)  # type: ignore[arg-type]


def entry(**changed: object) -> bytes:
    return json.dumps({"w": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]} | changed}).encode()


def attempt(values: dict[str, bytes]) -> BaseException:
    """What a whole use of these values raises."""

    def use() -> None:
        with rdmaload.open(server.url("m"), **HASTY) as opened:
            opened.load()

    with ScriptedServer(answers_from(values)) as server:
        begin = time.monotonic()
        with pytest.raises(RdmaloadError) as caught:
            use()
        assert time.monotonic() - begin < PROMPTLY
        assert caught.value.url == server.url("m")
        assert server.url("m") in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (b"", FormatError),
        (b"{}\n00000000\n", IntegrityError),
        (b"\x80\x04K\x01.", FormatError),  # a pickle
        (b"[" * 100_000 + b"\n%08x\n" % crc32c(b"[" * 100_000 + b"\n"), FormatError),
        (b"{}\n%08x\n" % crc32c(b"{}\n"), FormatError),
        (b"x" * 3_000_000, FormatError),
        (manifest_for(bytes(16))[:-3], FormatError),
    ],
    ids=range(7),
)
def test_hostile_manifests(value: bytes, kind: type[RdmaloadError]) -> None:
    assert type(attempt({"m/manifest": value})) is kind


@pytest.mark.parametrize(
    ("index", "kind"),
    [
        (b"short", FormatError),
        (b"RDMALOAD\x01\0\0\0\xff\xff\xff\xff" + bytes(100), FormatError),
        (b"RDMALOAD\x02\0\0\0\x02\0\0\0{}", NotSupportedError),
        (b"RDMALOAD\x01\0\0\0\x02\0\0\0{}", FormatError),
        (b"RDMALOAD\x01\0\0\0\x02\0\0\0[]" + b"[" * 1000, FormatError),
    ],
    ids=range(5),
)
def test_hostile_indexes_with_a_matching_manifest(index: bytes, kind: type[RdmaloadError]) -> None:
    generation = "a" * 32
    padded = index.ljust(16, b"\0")
    values = {"m/manifest": manifest_for(padded), f"m/chunks/{generation}/index": padded}
    assert type(attempt(values)) is kind


@pytest.mark.parametrize(
    "path", ["../../etc/cron.d/x", "/etc/passwd", "a/../../b", "a//b", "a\0b", "", ".", "./a", "a" * 5000]
)
def test_hostile_paths(path: str, tmp_path: Path) -> None:
    good = index_of(IndexFile("PLACEHOLDER", 4, 0))
    meta_bytes = int.from_bytes(good[12:16], "little")
    meta = good[16 : 16 + meta_bytes].replace(b'"PLACEHOLDER"', json.dumps(path).encode())
    index = good[:12] + len(meta).to_bytes(4, "little") + meta + good[16 + meta_bytes :]
    values = {
        "m/manifest": manifest_for(index, bytes=4),
        f"m/chunks/{'a' * 32}/index": index,
        f"m/chunks/{'a' * 32}/0/0": b"evil",
    }
    with ScriptedServer(answers_from(values)) as server, pytest.raises(FormatError, match="path"):
        rdmaload.pull_files(server.url("m"), tmp_path / "deep" / "deeper" / "target", allow_pattern="*", **HASTY)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "header",
    [
        b"{ ",
        b"[]",
        b"null",
        b"{}",  # 400 bytes that belong to nobody
        entry(dtype="F31"),
        entry(dtype=7),
        entry(shape=[100, 2]),
        entry(shape=[-100]),
        entry(shape=["100"]),
        entry(shape=[2**62, 2**62]),
        entry(shape=[1] * 10_000),
        entry(data_offsets=[0, 401]),
        entry(data_offsets=[4, 404]),
        entry(data_offsets=[0, 2**63]),
        entry(data_offsets=[400, 0]),
        entry(data_offsets=[0]),
        b'{"w":' * 200 + b"1" + b"}" * 200,
        HEADER[:-1] + b',"w":' + HEADER[5:],
        b"\xff\xfe" + HEADER,
        HEADER + b"x",
    ],
    ids=range(20),
)
def test_hostile_headers(header: bytes) -> None:
    index = index_of(weight_file(header))
    values = {"m/manifest": manifest_for(index), f"m/chunks/{'a' * 32}/index": index}
    error = attempt(values)
    assert isinstance(error, (FormatError, NotSupportedError))


def test_a_model_of_a_petabyte_that_is_not_there_takes_no_memory() -> None:
    count = 2**40
    header = json.dumps({"w": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    # 2^22 chunks of the largest size would be checksums of 16 MB; the file fits 2^20 of them into the index.
    file = IndexFile("model.safetensors", 8 + len(header) + 4 * count, 0, header=header)
    index = index_of(file, chunk_bytes=512 * 2**20)
    values = {"m/manifest": manifest_for(index, bytes=file.size), f"m/chunks/{'a' * 32}/index": index}
    with ScriptedServer(answers_from(values)) as server, rdmaload.open(server.url("m"), **HASTY) as opened:
        with pytest.raises(rdmaload.MemoryLimitError, match="include="):
            opened.load()
        with pytest.raises(rdmaload.MemoryLimitError):
            next(opened.weight_iterator())


def test_a_tied_name_that_stands_for_nothing() -> None:
    index = index_of(weight_file(HEADER, tied={"x": "nothing"}))
    values = {"m/manifest": manifest_for(index), f"m/chunks/{'a' * 32}/index": index}
    assert isinstance(attempt(values), FormatError)


def test_a_sharded_manifest_with_a_checkpoints_files_gives_each_rank_all() -> None:
    index = index_of(weight_file(HEADER))
    manifest = manifest_for(index, kind="sharded", world_size=2)
    values = {"m/manifest": manifest, f"m/chunks/{'a' * 32}/index": index}
    with ScriptedServer(answers_from(values)) as server, rdmaload.open(server.url("m"), **HASTY) as opened:
        assert set(opened.rank_tensors(1)) == {"w"}


def test_values_that_match_load(tmp_path: Path) -> None:
    """The values above are refused for what is wrong with them, not for the rest."""
    content = (len(HEADER)).to_bytes(8, "little") + HEADER + bytes(range(200)) * 2
    chunks = [content[start : start + 256] for start in range(0, len(content), 256)]
    crcs = b"".join(crc32c(chunk).to_bytes(4, "little") for chunk in chunks)
    index = index_of(weight_file(HEADER), crcs=crcs)
    values = {"m/manifest": manifest_for(index), f"m/chunks/{'a' * 32}/index": index}
    values |= {f"m/chunks/{'a' * 32}/0/{number}": chunk for number, chunk in enumerate(chunks)}
    with ScriptedServer(answers_from(values)) as server:
        state = rdmaload.load(server.url("m"), **HASTY)
        assert state["w"].view(torch.uint8).numpy().tobytes() == bytes(range(200)) * 2
        digest = hashlib.sha256(values["m/manifest"]).hexdigest()
        assert set(rdmaload.load(server.url("m"), manifest_sha256=digest, **HASTY)) == {"w"}

"""The test support itself: a fault that does not happen would make every test of it pass."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from benchmarks import machine, paired, sglang_way
from tests.support import checkpoints, faults, resp
from tests.support.fault_proxy import FaultProxy
from tests.support.scripted_server import ScriptedServer, answers_from
from tests.support.servers import RedisServer, ServerError

VALUE = bytes(range(256)) * 4000


@pytest.fixture
def key(redis_server: RedisServer, model: str) -> str:
    with redis_server.client() as client:
        client.set(f"{model}/0", VALUE)
    return f"{model}/0"


def _proxy(server: RedisServer, *rules: faults.Fault, mode: str = "forward") -> FaultProxy:
    return FaultProxy(server.host, server.port, *rules, mode=mode)


def _client(proxy: FaultProxy | ScriptedServer, timeout: float = 10) -> redis.Redis:
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    return redis.Redis(proxy.host, proxy.port, protocol=2, socket_timeout=timeout, retry=Retry(NoBackoff(), 0))


def _read(proxy: FaultProxy | ScriptedServer, key: str, timeout: float = 10) -> tuple[bytes, str]:
    """All bytes that one GET on a plain socket brings, and how the connection ended."""
    with socket.create_connection((proxy.host, proxy.port), timeout=timeout) as plain:
        plain.sendall(b"GET %b\r\n" % key.encode())
        data = bytearray()
        while len(data) < len(resp.bulk(VALUE)):
            try:
                block = plain.recv(1 << 16)
            except ConnectionResetError:
                return bytes(data), "reset"
            except TimeoutError:
                return bytes(data), "silent"
            if not block:
                return bytes(data), "closed"
            data += block
        return bytes(data), "open"


# Servers


def test_a_server_answers_as_soon_as_it_is_made_and_is_gone_when_stopped() -> None:
    server = RedisServer(maxmemory="50mb", maxmemory_policy="allkeys-lru")
    with server.client() as client:
        assert client.config_get("maxmemory") == {"maxmemory": str(50 << 20)}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lru"}
    server.stop()
    server.stop()
    assert not server.running
    assert not server.directory.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((server.host, server.port))


def test_a_restarted_server_is_empty_and_at_the_same_address() -> None:
    with RedisServer() as server, server.client() as client:
        client.set("a", "1")
        port = server.port
        server.kill()
        with pytest.raises(redis.ConnectionError):
            client.get("a")
        server.restart()
        assert server.port == port
        assert client.get("a") is None


def test_passwords_and_users_are_asked_for() -> None:
    with RedisServer(password="p:/@ 1", users=["alice on >secret ~* +get"]) as server:
        assert server.url("m", db=1) == f"redis://:p%3A%2F%40%201@127.0.0.1:{server.port}/m?db=1"
        with server.client() as client:
            assert client.set("a", "1")
        with server.client(username="alice", password="secret") as alice:
            assert alice.get("a") == b"1"
            with pytest.raises(redis.exceptions.NoPermissionError):
                alice.set("a", "2")
        with (
            redis.Redis(server.host, server.port) as nobody,
            pytest.raises(redis.AuthenticationError),
        ):
            nobody.get("a")


def test_a_server_on_a_unix_socket() -> None:
    with RedisServer(unix=True) as server, server.client() as client:
        assert client.ping()
        assert server.url("a/b") == f"redis+unix://{server.path}?model=a%2Fb"


def test_a_missing_program_names_its_package() -> None:
    with pytest.raises(ServerError, match="apt-get install redis-server"):
        RedisServer(executable="redis-server-that-is-not-there")


def test_a_server_that_cannot_start_shows_its_log() -> None:
    with pytest.raises(ServerError, match=r"(?s)exited with 1.*no-such-option"):
        RedisServer(args=["--no-such-option", "1"])


# The proxy


def test_the_proxy_without_faults_changes_nothing_and_counts(redis_server: RedisServer, key: str) -> None:
    with _proxy(redis_server) as proxy, _client(proxy) as client:
        assert client.get(key) == VALUE
        assert proxy.connections == 1
        assert proxy.bytes_to_client >= len(VALUE)
        assert proxy.bytes_to_server > 0
        assert proxy.fired == 0


def test_large_pipelines_pass_in_both_directions(redis_server: RedisServer, model: str) -> None:
    rule = faults.Replace(index=10**9, reply=b"")  # never applied, but every reply is parsed
    for rules in ((), (rule,)):
        with _proxy(redis_server, *rules) as proxy, _client(proxy) as client:
            pipeline = client.pipeline(transaction=False)
            for number in range(200):
                pipeline.set(f"{model}/{number}", VALUE[:100_000])
                pipeline.get(f"{model}/{number}")
            assert pipeline.execute()[1::2] == [VALUE[:100_000]] * 200


def test_a_refusing_proxy_can_open_later_on_the_same_port(redis_server: RedisServer, key: str) -> None:
    with _proxy(redis_server, mode="refuse") as proxy:
        with pytest.raises(ConnectionRefusedError):
            _read(proxy, key)
        proxy.set_mode("forward")
        assert _read(proxy, key) == (resp.bulk(VALUE), "open")
        proxy.set_mode("refuse")
        with pytest.raises(ConnectionRefusedError):
            _read(proxy, key)


def test_a_proxy_that_never_accepts_leaves_connecting_undecided(redis_server: RedisServer) -> None:
    with _proxy(redis_server, mode="never_accept") as proxy, pytest.raises(TimeoutError):
        socket.create_connection((proxy.host, proxy.port), timeout=0.3)


@pytest.mark.parametrize("after", [0, 1, 300_000])
@pytest.mark.parametrize(
    ("fault", "ending"),
    [(faults.Stall, "silent"), (faults.Reset, "reset"), (faults.Close, "closed")],
)
def test_a_connection_ends_after_exactly_so_many_bytes(
    redis_server: RedisServer, key: str, after: int, fault: type[faults.ByteFault], ending: str
) -> None:
    with _proxy(redis_server, fault(after=after, first_connections=1)) as proxy:
        assert _read(proxy, key, 0.5) == (resp.bulk(VALUE)[:after], ending)
        assert proxy.wait_for_fault(1)
        assert _read(proxy, key) == (resp.bulk(VALUE), "open")
        assert proxy.fired == 1
        assert proxy.connections == 2


def test_a_fault_in_the_middle_of_a_reply_to_a_client_of_redis(redis_server: RedisServer, key: str) -> None:
    with (
        _proxy(redis_server, faults.Reset(after=500_000, first_connections=1)) as proxy,
        _client(proxy) as client,
    ):
        with pytest.raises(redis.ConnectionError):
            client.get(key)
        assert client.get(key) == VALUE


def test_one_bit_flips_at_an_offset(redis_server: RedisServer, key: str) -> None:
    whole = resp.bulk(VALUE)
    flipped = bytearray(whole)
    flipped[70_000] ^= 8
    changed = bytes(flipped)
    with _proxy(redis_server, faults.FlipBit(offset=70_000, bit=3)) as proxy:
        assert _read(proxy, key) == (changed, "open")
        assert _read(proxy, key) == (whole, "open")
    with _proxy(redis_server, faults.FlipBit(offset=70_000, bit=3, repeat="always")) as proxy:
        assert _read(proxy, key) == (changed, "open")
        assert _read(proxy, key) == (changed, "open")


@pytest.mark.parametrize(
    ("repeat", "good"),
    [
        ("once", [True, False, True, True, True, True]),
        ("connection", [True, False, True, True, False, True]),
        ("always", [True, False, False, True, False, False]),
    ],
)
def test_one_bit_flips_in_chosen_values(
    redis_server: RedisServer, key: str, repeat: faults.Repeat, good: list[bool]
) -> None:
    fault = faults.FlipBulkBit(index=1, offset=5, min_bytes=1000, key="*/0", repeat=repeat)
    seen = []
    with _proxy(redis_server, fault) as proxy:
        for _ in range(2):
            with _client(proxy) as client:
                for _ in range(3):
                    client.get("absent")
                    seen.append(client.get(key) == VALUE)
        assert proxy.fired == good.count(False)
        assert [b"GET", key.encode()] in proxy.commands
    assert seen == good


@pytest.mark.parametrize(
    "reply",
    [
        b"$5\r\nhello\r\n",
        b"-LOADING Redis is loading the dataset in memory\r\n",
        b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
        b"-NOAUTH Authentication required.\r\n",
        b"-MOVED 3999 127.0.0.1:6381\r\n",
        b":1\r\n",
        b"$-1\r\n",
        b"\x00\xff garbage",
        b"$99999999999999999999\r\n",
    ],
)
def test_a_reply_is_replaced(redis_server: RedisServer, key: str, reply: bytes) -> None:
    with (
        _proxy(redis_server, faults.Replace(reply=reply, min_bytes=1000)) as proxy,
        socket.create_connection((proxy.host, proxy.port), timeout=10) as plain,
    ):
        plain.sendall(b"PING\r\nGET %b\r\nPING\r\n" % key.encode())
        expected = b"+PONG\r\n" + reply + b"+PONG\r\n"
        data = b""
        while len(data) < len(expected):
            data += plain.recv(1 << 16)
        assert data == expected


def test_a_value_changes_its_size(redis_server: RedisServer, key: str) -> None:
    longer = faults.Replace(reply=faults.longer_bulk, min_bytes=1000)
    shorter = faults.Replace(reply=faults.shorter_bulk, min_bytes=1000, index=1)
    with _proxy(redis_server, longer, shorter) as proxy, _client(proxy) as client:
        assert client.get(key) == VALUE + b"\0"
        assert client.get(key) == VALUE[:-1]
        assert client.get(key) == VALUE


def test_delay_and_throttle_take_their_time(redis_server: RedisServer, key: str) -> None:
    for fault in (faults.Delay(seconds=0.2), faults.Throttle(bytes_per_second=5e6)):
        with _proxy(redis_server, fault) as proxy:
            start = time.monotonic()
            assert _read(proxy, key)[1] == "open"
            assert time.monotonic() - start > 0.19  # 1,024,000 bytes at 5 MB/s


def test_closing_the_proxy_ends_what_is_open(redis_server: RedisServer, key: str) -> None:
    proxy = _proxy(redis_server, faults.Stall(after=10))
    with socket.create_connection((proxy.host, proxy.port), timeout=10) as plain:
        plain.sendall(b"GET %b\r\n" % key.encode())
        assert proxy.wait_for_bytes(10)
        proxy.close()
        proxy.close()
        data = b"x"
        received = b""
        while data:
            try:
                data = plain.recv(100)
            except ConnectionResetError:
                break
            received += data
        assert received == resp.bulk(VALUE)[:10]


def test_a_dead_server_behind_the_proxy_is_a_reset_and_a_new_one_is_reached() -> None:
    with RedisServer() as server, _proxy(server) as proxy, _client(proxy) as client:
        assert client.ping()
        server.kill()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        server.restart()
        assert client.ping()


# The scripted server


def test_a_scripted_server_says_what_it_is_told() -> None:
    with ScriptedServer(answers_from({"a": b"1"})) as server, _client(server) as client:
        assert client.get("a") == b"1"
        assert client.get("b") is None
        assert client.exists("a") == 1
        with pytest.raises(redis.ResponseError, match="unknown command"):
            client.incr("a")
        assert [b"GET", b"a"] in server.commands


def test_a_scripted_server_can_stop_in_a_value_or_close() -> None:
    with ScriptedServer(lambda words: b"$5\r\nhel" if words[1] == b"half" else None) as server:
        assert _read(server, "half", 0.2) == (b"$5\r\nhel", "silent")
        assert _read(server, "none") == (b"", "closed")


def test_a_mistake_in_a_script_reaches_the_test() -> None:
    def answer(words: list[bytes]) -> bytes:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), ScriptedServer(answer) as server:
        assert _read(server, "a")[0] == b""


# RESP


@pytest.mark.parametrize(
    "reply",
    [
        resp.simple("OK"),
        resp.error("ERR no"),
        resp.integer(-3),
        resp.nil(),
        resp.bulk(b"a\r\nb"),
        resp.array([resp.integer(1), resp.bulk(b""), resp.array([])]),
        b"*-1\r\n",
        b"%1\r\n+a\r\n:1\r\n",
        b"|1\r\n+ttl\r\n:3\r\n$1\r\nx\r\n",
        b"_\r\n",
        b"#t\r\n",
        b",1.5\r\n",
        b"=7\r\ntxt:abc\r\n",
        b">2\r\n+a\r\n+b\r\n",
    ],
)
def test_a_reply_ends_where_it_ends(reply: bytes) -> None:
    for length in range(len(reply)):
        assert resp.reply_end(reply[:length]) is None
    assert resp.reply_end(reply + b"+more\r\n") == len(reply)
    assert resp.reply_end(b"+OK\r\n" + reply, 5) == 5 + len(reply)


# Checkpoints


def test_checkpoints_are_what_safetensors_reads(
    tiny_checkpoint: checkpoints.Checkpoint, all_dtypes_checkpoint: checkpoints.Checkpoint
) -> None:
    from safetensors import safe_open

    for checkpoint in (tiny_checkpoint, all_dtypes_checkpoint):
        names = set()
        for path in checkpoint.weight_files:
            with safe_open(path, "numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    piece = opened.get_slice(name)
                    spec = checkpoint.tensors[name]
                    assert (piece.get_dtype(), tuple(piece.get_shape())) == (spec.dtype, spec.shape)
                    names.add(name)
        assert names == set(checkpoint.tensors)


def test_compare_finds_one_changed_byte_a_missing_tensor_and_one_too_many(
    tiny_checkpoint: checkpoints.Checkpoint,
) -> None:
    import torch
    from safetensors.torch import load_file

    def load() -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = {}
        for path in tiny_checkpoint.weight_files:
            state.update({name: tensor.clone() for name, tensor in load_file(path).items()})
        return state

    state = load()
    assert checkpoints.compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
    state["model.norm.weight"].view(torch.uint8)[-1] ^= 1
    with pytest.raises(checkpoints.Mismatch, match=r"model\.norm\.weight"):
        checkpoints.compare(state, tiny_checkpoint.directory)
    state = load()
    del state["model.norm.weight"]
    with pytest.raises(checkpoints.Mismatch, match="was not loaded"):
        checkpoints.compare(state, tiny_checkpoint.directory)
    state = load() | {"more": torch.zeros(1)}
    with pytest.raises(checkpoints.Mismatch, match="in no file: more"):
        checkpoints.compare(state, tiny_checkpoint.directory)


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    first, second = (checkpoints.llama_like(tmp_path / name, 1e5, files=2, seed=3) for name in ("a", "b"))
    other = checkpoints.llama_like(tmp_path / "c", 1e5, files=2, seed=4)
    for path in first.directory.iterdir():
        assert path.read_bytes() == (second.directory / path.name).read_bytes()
    assert first.weight_files[0].read_bytes() != other.weight_files[0].read_bytes()


def test_given_bytes_are_written(tmp_path: Path) -> None:
    data = {"a": struct.pack("<2f", 1, 2)}
    checkpoints.write_safetensors(tmp_path / "a.safetensors", {"a": ("F32", [2])}, data=data)
    spec, found = checkpoints.read_safetensors(tmp_path / "a.safetensors")["a"]
    assert spec == checkpoints.TensorSpec("F32", (2,))
    assert found == data["a"]


# Measuring


def test_a_measured_run_has_its_own_process_and_its_failures_are_told() -> None:
    pid = os.getpid()
    answer = paired.in_child(lambda: {"own": os.getpid() != pid})
    assert answer == {"own": True}
    with pytest.raises(paired.TrialFailed, match="ZeroDivisionError"):
        paired.in_child(lambda: {"never": 1 // 0})
    with pytest.raises(paired.TrialFailed, match="exit code 7"):
        paired.in_child(lambda: os._exit(7))
    with pytest.raises(paired.TrialFailed, match=r"more than 0\.1 seconds"):
        paired.in_child(lambda: {"late": threading.Event().wait(60)}, limit=0.1)


def test_a_comparison_finds_the_faster_way_and_checks_both() -> None:
    def check(answer: object) -> None:
        assert answer == b"right"

    def way(name: str, seconds: float, answer: bytes = b"right") -> paired.Way:
        def run() -> bytes:
            time.sleep(seconds)
            return answer

        return paired.Way(name, run, check=check, server_pid=os.getppid)

    found: Any = paired.compare(way("fast", 0.01), [way("slow", 0.03)], 1000, pairs=3)
    comparison = found["against"]["slow"]
    low, high = comparison["interval_95"]
    assert 1.5 < low <= comparison["median_ratio"] <= high < 4
    assert len(comparison["ways"]["fast"]["all_gb_per_s"]) == 3
    assert comparison["ways"]["fast"]["server_cpu_s_per_gb"]["median"] >= 0
    with pytest.raises(paired.TrialFailed, match="AssertionError"):
        paired.compare(way("fast", 0), [way("wrong", 0, b"wrong")], 1000, pairs=3)


def test_the_interval_of_equal_ratios_is_a_point_and_of_others_contains_their_median() -> None:
    assert paired.bootstrap_interval([2.0] * 15) == (2.0, 2.0)
    ratios = [1.0, 1.1, 1.2, 1.3, 5.0]
    low, high = paired.bootstrap_interval(ratios)
    assert 1.0 <= low < 1.2 < high <= 5.0
    assert paired.bootstrap_interval(ratios) == (low, high)


def test_the_congestion_control_is_restored() -> None:
    before = machine.congestion_control()
    with machine.server_congestion_control("no-such-algorithm") as in_force:
        assert not in_force
    with machine.server_congestion_control("reno") as in_force:
        assert in_force == (machine.congestion_control() == "reno")
    assert machine.congestion_control() == before


def test_files_leave_and_enter_the_page_cache(tmp_path: Path) -> None:
    checkpoint = checkpoints.llama_like(tmp_path / "model", 2.5e6)
    if machine.cached_fraction(checkpoint.directory) is None:
        pytest.skip("cachestat needs Linux 6.5")
    machine.warm_page_cache(checkpoint.directory)
    assert machine.cached_fraction(checkpoint.directory) == 1
    assert all(path.stat().st_blocks for path in checkpoint.weight_files)


def test_the_sglang_way_loads_what_it_stored(
    redis_server: RedisServer, model: str, tiny_checkpoint: checkpoints.Checkpoint
) -> None:
    with redis_server.client() as client:
        sglang_way.store(client, model, tiny_checkpoint.directory)
    for hiredis in (True, False):
        with sglang_way.connect(redis_server.host, redis_server.port, hiredis=hiredis) as client:
            parser = client.connection_pool.make_connection()._parser
            assert ("Hiredis" in type(parser).__name__) == hiredis
            state = sglang_way.load(client, model)
        assert checkpoints.compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes

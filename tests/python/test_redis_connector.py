"""Redis: what the server says in our words, retries, secrets, and what goes over the wire."""

from __future__ import annotations

import logging
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import pytest

from rdmaload.connectors import connector_for
from rdmaload.connectors.redis import RedisConnector
from rdmaload.errors import (
    AuthenticationError,
    FormatError,
    LoadTimeoutError,
    NotSupportedError,
    RdmaloadError,
    UnavailableError,
    UrlError,
)
from tests.support.fault_proxy import FaultProxy
from tests.support.faults import Close, Replace, Stall
from tests.support.resp import bulk, error
from tests.support.scripted_server import ScriptedServer, answers_from
from tests.support.servers import RedisServer

SECRET = "s3cret"


def open_redis(url: str, **options: object) -> RedisConnector:
    connector = connector_for(url, **options)
    assert isinstance(connector, RedisConnector)
    return connector


def shown(caught: pytest.ExceptionInfo[RdmaloadError]) -> str:
    return "".join(traceback.format_exception(caught.value)) + repr(caught.value.__dict__)


def failing(reply: str) -> Callable[[list[bytes]], bytes]:
    """A server that answers every command on keys with one error."""
    setup = answers_from({})

    def answer(words: list[bytes]) -> bytes:
        known = words[0].upper() in (b"AUTH", b"SELECT", b"CLIENT", b"HELLO")
        return (setup(words) or b"") if known else error(reply)

    return answer


@pytest.mark.parametrize(
    ("reply", "kind", "advice"),
    [
        ("OOM command not allowed when used memory > 'maxmemory'.", UnavailableError, "maxmemory"),
        ("MOVED 1234 10.0.0.9:6379", NotSupportedError, r"redis\+cluster"),
        ("ASK 1234 10.0.0.9:6379", NotSupportedError, r"redis\+cluster"),
        ("NOAUTH Authentication required.", AuthenticationError, "password_file"),
        ("WRONGPASS invalid username-password pair", AuthenticationError, "password_file"),
        ("NOPERM this user has no permissions", AuthenticationError, "ACL"),
        ("READONLY You can't write against a read only replica.", UnavailableError, "primary"),
        ("CLUSTERDOWN The cluster is down", UnavailableError, "cannot serve now"),
        ("WRONGTYPE Operation against a key", FormatError, "another kind"),
        ("ERR unknown command 'GET'", UnavailableError, "refused"),
        ("WHATEVER else", UnavailableError, "refused"),
    ],
)
def test_error_replies_are_translated(reply: str, kind: type[RdmaloadError], advice: str) -> None:
    with ScriptedServer(failing(reply)) as server, open_redis(server.url("m")) as connector:
        for use in (
            lambda: connector.get("m/a"),
            lambda: connector.set("m/a", b"x"),
            lambda: connector.exists("m/a"),
            lambda: connector.delete("m/a"),
        ):
            with pytest.raises(kind, match=advice) as caught:
                use()
            assert caught.value.key == "m/a"
            assert caught.value.url == connector.url
            assert "m/a at redis://" in str(caught.value)
        asked = [words for words in server.commands if words[0] == b"GET"]
    assert len(asked) == 1  # none of these passes by itself


def test_loading_is_waited_for() -> None:
    answers = iter([error("LOADING Redis is loading the dataset in memory")] * 3)
    values = answers_from({"m/a": b"value"})
    with (
        ScriptedServer(lambda words: next(answers, values(words)) if words[0] == b"GET" else values(words)) as server,
        open_redis(server.url("m")) as connector,
    ):
        assert connector.get("m/a") == b"value"


def test_loading_that_does_not_end_is_an_error_in_time() -> None:
    with (
        ScriptedServer(failing("LOADING Redis is loading")) as server,
        open_redis(server.url("m"), retry_timeout=0.2) as connector,
    ):
        started = time.monotonic()
        with pytest.raises(UnavailableError, match=r"\d attempts.*still loading"):
            connector.get("m/a")
        assert time.monotonic() - started < 2


def test_the_hint_at_tls_is_for_lost_connections_only() -> None:
    for reply, words in (
        ("LOADING Redis is loading", "still loading"),
        ("ERR max number of clients reached", "maxclients"),
    ):
        with (
            ScriptedServer(lambda _, reply=reply: error(reply)) as server,  # type: ignore[misc]
            open_redis(server.url("m"), retry_timeout=0.1) as connector,
            pytest.raises(UnavailableError, match=words) as caught,
        ):
            connector.get("m/a")
        assert "rediss" not in str(caught.value)
    with (
        FaultProxy("127.0.0.1", 1, Close(after=0)) as proxy,
        open_redis(proxy.url("m"), retry_timeout=0.1) as connector,
        pytest.raises(UnavailableError, match="rediss:// or valkeys://"),
    ):
        connector.get("m/a")


def test_what_is_not_redis_is_said_to_be_not() -> None:
    with (
        ScriptedServer(lambda words: b"HTTP/1.1 400 Bad Request\r\n\r\n") as server,
        open_redis(server.url("m")) as connector,
        pytest.raises(FormatError, match="not RESP"),
    ):
        connector.get("m/a")


def test_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"redis://:{SECRET}@127.0.0.1:{taken.getsockname()[1]}/m"
        with (
            open_redis(url, connect_timeout=0.3) as connector,
            caplog.at_level(logging.WARNING, "rdmaload"),
        ):
            started = time.monotonic()
            with pytest.raises(UnavailableError, match="check that the server runs") as caught:
                connector.get("m/a")
            assert time.monotonic() - started < 3
    assert "trying again" in caplog.text
    assert SECRET not in shown(caught) + caplog.text


def test_a_name_that_does_not_resolve_fails_at_once() -> None:
    with open_redis("redis://no-such-host.invalid/m") as connector:
        started = time.monotonic()
        with pytest.raises(UnavailableError):
            connector.get("m/a")
        assert time.monotonic() - started < 8
    with (
        open_redis(f"redis://{'x' * 70}.invalid/m") as connector,
        pytest.raises((UrlError, UnavailableError)),
    ):
        connector.get("m/a")


def test_a_server_that_never_accepts(redis_server: RedisServer) -> None:
    with (
        FaultProxy(redis_server.host, redis_server.port, mode="never_accept") as proxy,
        open_redis(proxy.url("m"), connect_timeout=0.2) as connector,
        pytest.raises(LoadTimeoutError, match="connect_timeout"),
    ):
        connector.get("m/a")


def test_a_stall_is_a_failure_and_the_next_connection_serves(redis_server: RedisServer, model: str) -> None:
    value = bytes(100_000)
    with open_redis(redis_server.url(model)) as connector:
        connector.set(f"{model}/a", value)
    with FaultProxy(redis_server.host, redis_server.port, Stall(after=50_000, first_connections=1)) as proxy:
        with open_redis(proxy.url(model), inactivity_timeout=0.2) as connector:
            assert connector.get(f"{model}/a") == value
        assert proxy.connections == 2
    with (
        FaultProxy(redis_server.host, redis_server.port, Stall(after=50_000)) as proxy,
        open_redis(proxy.url(model), inactivity_timeout=0.1, retry_timeout=0.3) as connector,
        pytest.raises(LoadTimeoutError, match="attempts"),
    ):
        connector.get(f"{model}/a")


def test_a_connection_that_ends_in_a_value_is_replaced(redis_server: RedisServer, model: str) -> None:
    value = bytes(range(256)) * 1000
    with open_redis(redis_server.url(model)) as connector:
        connector.set(f"{model}/a", value)
    with (
        FaultProxy(redis_server.host, redis_server.port, Close(after=70_000, first_connections=2)) as proxy,
        open_redis(proxy.url(model)) as connector,
    ):
        assert connector.get(f"{model}/a") == value


def test_a_server_that_restarts_is_waited_for(model: str) -> None:
    with RedisServer() as server, open_redis(server.url(model)) as connector:
        connector.set(f"{model}/a", b"1")
        server.kill()
        starter = threading.Timer(0.3, server.start)
        starter.start()
        try:
            assert connector.get(f"{model}/a") is None  # the new server is empty
        finally:
            starter.join()


def test_a_claim_whose_answer_was_lost_is_still_ours(redis_server: RedisServer, model: str) -> None:
    lost = Replace(key=f"{model}/claim", reply=b"")
    with (
        FaultProxy(redis_server.host, redis_server.port, lost) as proxy,
        open_redis(proxy.url(model), inactivity_timeout=0.2) as connector,
    ):
        assert connector.set(f"{model}/claim", b"token-1", if_absent=True) is True
        assert proxy.fired == 1
    with open_redis(redis_server.url(model)) as connector:
        assert connector.set(f"{model}/claim", b"token-2", if_absent=True) is False
        assert connector.get(f"{model}/claim") == b"token-1"


@pytest.fixture(scope="module")
def guarded() -> Iterator[RedisServer]:
    with RedisServer(password=SECRET, users=["reader on >r3ader ~pub/* +get +exists +select +client"]) as server:
        yield server


def test_the_right_password_from_every_place(
    guarded: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    from pathlib import Path

    plain = f"redis://127.0.0.1:{guarded.port}/m"
    file = Path(str(tmp_path)) / "secret"
    file.write_text(SECRET + "\n")
    monkeypatch.setenv("STORE_SECRET", SECRET)
    for url, options in (
        (guarded.url("m"), {}),
        (guarded.url("m"), {"protocol": 3}),
        (plain, {"password": SECRET}),
        (plain, {"password_file": file}),
        (plain, {"username": "default", "password": SECRET}),
        (f"{plain}?password_env=STORE_SECRET", {}),
    ):
        with open_redis(url, **options) as connector:
            assert connector.set("m/a", b"1")
            assert SECRET not in repr(connector) + connector.url + repr(vars(connector).get("_client"))


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_wrong_or_missing_password(guarded: RedisServer, protocol: int) -> None:
    for userinfo in ("", ":wr0ng@", "nobody:wr0ng@"):
        url = f"redis://{userinfo}127.0.0.1:{guarded.port}/m"
        with open_redis(url, protocol=protocol) as connector:
            started = time.monotonic()
            with pytest.raises(AuthenticationError, match="password_file") as caught:
                connector.get("m/a")
            assert time.monotonic() - started < 2
            assert "wr0ng" not in shown(caught)
            assert "rediss" not in str(caught.value)  # the server spoke to us: its port is the right one


def test_a_user_who_may_not(guarded: RedisServer) -> None:
    with open_redis(f"redis://reader:r3ader@127.0.0.1:{guarded.port}/pub") as connector:
        assert connector.get("pub/a") is None
        with pytest.raises(AuthenticationError, match="ACL"):
            connector.set("pub/a", b"1")
        with pytest.raises(AuthenticationError, match="ACL"):
            connector.get("m/a")
        assert connector.publish_warning(10**15) == []


def test_a_password_that_the_server_quotes_is_not_repeated() -> None:
    reply = f"ERR unknown command 'HELLO', with args beginning with: '3' 'AUTH' 'default' '{SECRET}'"
    with ScriptedServer(lambda words: error(reply)) as server:
        url = server.url("m").replace("//", f"//:{SECRET}@")
        for protocol in (2, 3):
            with open_redis(url, protocol=protocol, retry_timeout=0.1) as connector:
                with pytest.raises(RdmaloadError, match="its text is left out") as caught:
                    connector.get("m/a")
                assert SECRET not in shown(caught)
                assert caught.value.__cause__ is None
                assert caught.value.__context__ is None


def test_a_database_that_there_is_not(redis_server: RedisServer) -> None:
    with (
        open_redis(redis_server.url("m", db=99)) as connector,
        pytest.raises(UrlError, match="correct db="),
    ):
        connector.get("m/a")


def test_databases_are_apart(redis_server: RedisServer, model: str) -> None:
    with (
        open_redis(redis_server.url(model)) as first,
        open_redis(redis_server.url(model, db=1)) as second,
    ):
        second.set(f"{model}/a", b"1")
        assert first.get(f"{model}/a") is None
        second.delete(f"{model}/a")


def test_values_of_other_kinds_are_not_listed_and_not_read(redis_server: RedisServer, model: str) -> None:
    with open_redis(redis_server.url(model)) as connector, redis_server.client() as client:
        connector.set(f"{model}/value", b"1")
        client.sadd(f"{model}/set", "x")
        client.set(f"{model}/".encode() + b"\xff", b"not a key of ours")
        assert list(connector.list(f"{model}/")) == [f"{model}/value"]
        with pytest.raises(FormatError, match="another kind"):
            connector.get(f"{model}/set")
        client.delete(f"{model}/".encode() + b"\xff", f"{model}/set")


def test_keys_that_scan_repeats_are_given_once() -> None:
    pages = iter([(b"7", [b"m/a", b"m/b"]), (b"0", [b"m/b", b"m/c"])])
    setup = answers_from({})

    def answer(words: list[bytes]) -> bytes | None:
        if words[0] != b"SCAN":
            return setup(words)
        cursor, keys = next(pages)
        return b"*2\r\n" + bulk(cursor) + b"*%d\r\n" % len(keys) + b"".join(map(bulk, keys))

    with ScriptedServer(answer) as server, open_redis(server.url("m")) as connector:
        assert list(connector.list("m/[")) == ["m/a", "m/b", "m/c"]
        scans = [words for words in server.commands if words[0] == b"SCAN"]
    assert scans[0][1:] == [b"0", b"MATCH", b"m/\\[*", b"COUNT", b"1000", b"TYPE", b"STRING"]
    assert scans[1][1] == b"7"


def test_a_value_is_sent_from_the_callers_memory() -> None:
    """A packer that copied would show as a second buffer of the value's size."""
    import tracemalloc

    from rdmaload.connectors.redis import _Packer

    value = memoryview(bytearray(32 * 2**20))
    tracemalloc.start()
    try:
        pieces = _Packer().pack("SET", "m/a", value, "NX")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000
    assert any(piece is value for piece in pieces)
    assert b"".join(pieces) == b"*4\r\n$3\r\nSET\r\n$3\r\nm/a\r\n$33554432\r\n" + bytes(value) + b"\r\n$2\r\nNX\r\n"


def test_deleting_goes_in_batches(redis_server: RedisServer, model: str) -> None:
    keys = [f"{model}/{i}" for i in range(2500)]
    with redis_server.client() as client:
        client.mset({key: b"1" for key in keys})
    with FaultProxy(redis_server.host, redis_server.port, Replace(index=10**9, reply=b"")) as proxy:
        with open_redis(proxy.url(model)) as connector:
            assert connector.delete(*keys) == 2500
        assert [len(words) - 1 for words in proxy.commands if words[0] == b"UNLINK"] in (
            [1000, 1000, 500],
            [1, 1, 1],
        )


@pytest.mark.parametrize(
    ("settings", "needed", "says"),
    [
        ({}, 10**15, []),
        ({"maxmemory": "100mb", "maxmemory_policy": "noeviction"}, 10**6, []),
        (
            {"maxmemory": "100mb", "maxmemory_policy": "noeviction"},
            10**9,
            ["1.00 GB more do not fit"],
        ),
        ({"maxmemory": "100mb", "maxmemory_policy": "allkeys-lru"}, 10**6, ["allkeys-lru"]),
        (
            {"maxmemory": "100mb", "maxmemory_policy": "volatile-ttl"},
            10**9,
            ["volatile-ttl", "do not fit"],
        ),
    ],
)
def test_warnings_about_the_servers_memory(settings: dict[str, str], needed: int, says: list[str]) -> None:
    with RedisServer(**settings) as server:  # type: ignore[arg-type]
        for protocol in (2, 3):
            with open_redis(server.url("m"), protocol=protocol) as connector:
                warnings = connector.publish_warning(needed)
                assert len(warnings) == len(says)
                for warning, part in zip(warnings, says, strict=True):
                    assert part in warning
                    assert connector.url in warning


def test_memory_settings_are_read_by_whichever_command_is_allowed() -> None:
    for denied in ("-info", "-config"):
        with (
            RedisServer(
                maxmemory="50mb",
                maxmemory_policy="allkeys-lru",
                users=[f"default on nopass ~* +@all {denied}"],
            ) as server,
            open_redis(server.url("m")) as connector,
        ):
            assert any("allkeys-lru" in warning for warning in connector.publish_warning(1))


def test_ipv6() -> None:
    with RedisServer(host="::1") as server, open_redis(server.url("m")) as connector:
        assert connector.set("m/a", b"1")
        assert connector.get("m/a") == b"1"


def closed_while_busy(connector: RedisConnector, is_busy: Callable[[], bool]) -> None:
    """Close the connector once a get() of another thread waits; it must fail soon."""
    caught: list[BaseException] = []

    def get() -> None:
        try:
            connector.get("m/a")
        except UnavailableError as err:
            caught.append(err)

    thread = threading.Thread(target=get)
    thread.start()
    try:
        assert is_busy()
    finally:
        connector.close()
        thread.join(20)
    assert not thread.is_alive()
    assert "closed" in str(caught[0])


def test_close_ends_a_command_that_waits_for_its_answer(redis_server: RedisServer) -> None:
    with FaultProxy(redis_server.host, redis_server.port, Stall(after=0)) as proxy:
        closed_while_busy(open_redis(proxy.url("m"), inactivity_timeout=60), proxy.wait_for_fault)


def test_close_ends_the_attempts() -> None:
    with ScriptedServer(failing("LOADING Redis is loading the dataset in memory")) as server:
        tried = threading.Event()

        class Told(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                tried.set()

        handler = Told()
        logging.getLogger("rdmaload").addHandler(handler)
        try:
            closed_while_busy(open_redis(server.url("m"), retry_timeout=60), lambda: tried.wait(20))
        finally:
            logging.getLogger("rdmaload").removeHandler(handler)


@pytest.mark.parametrize(
    ("url", "connections", "bytes_in_flight"),
    [
        ("redis://127.0.0.1/m", 1, 2 << 20),
        ("redis://[::1]/m", 1, 2 << 20),
        ("redis://localhost/m", 1, 2 << 20),
        ("redis+unix:///run/redis.sock?model=m", 1, 2 << 20),
        ("redis://10.0.0.5/m", 4, 16 << 20),
        ("redis://store.example/m", 4, 16 << 20),
        ("redis://127.0.0.1/m?connections=3&bytes_in_flight=1MiB", 3, 1 << 20),
        ("redis://10.0.0.5/m?connections=1", 1, 16 << 20),
    ],
)
def test_how_much_is_in_flight_depends_on_where_the_store_is(url: str, connections: int, bytes_in_flight: int) -> None:
    connector = open_redis(url)
    assert (connector.connections, connector.bytes_in_flight) == (connections, bytes_in_flight)

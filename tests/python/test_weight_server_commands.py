"""The weight server's commands beside redis-server's: the same replies, errors included, or a difference by intent."""

from __future__ import annotations

import resource
import socket
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
import redis

from tests.python.test_weight_server import eventually
from tests.support.servers import RedisServer
from tests.support.weight_server import WeightServer

# In this order, on an empty server. {m} is the model's name, words are separated by blanks, _ in a word is one.
SAME = """
PING
PING hello
PING a b
ECHO x
ECHO
SELECT 0
SELECT x
SELECT
GET
GET {m}none
GET a b
SET {m}k
SET {m}k 0123456789
SET {m}k other NX
SET {m}none v XX
SET {m}n v nx
GET {m}n
GETRANGE {m}k 0 -1
GETRANGE {m}k 0 3
GETRANGE {m}k -3 -1
GETRANGE {m}k 5 100
GETRANGE {m}k 10 20
GETRANGE {m}k 5 4
GETRANGE {m}k -100 2
GETRANGE {m}k 0 -10
GETRANGE {m}k -1 -5
GETRANGE {m}k a b
GETRANGE {m}none 0 1
GETRANGE {m}k 0
STRLEN {m}k
STRLEN {m}none
STRLEN
SADD
SADD {m}s
SADD {m}s a b a
SADD {m}s a
SADD {m}k a
SMEMBERS {m}none
SMEMBERS {m}k
SMEMBERS
SISMEMBER {m}s a
SISMEMBER {m}s z
SISMEMBER {m}none z
SISMEMBER {m}k z
SREM {m}s z
SREM {m}none z
SREM {m}k z
SREM {m}s
MGET
MGET {m}k {m}none {m}n {m}s
EXISTS {m}k {m}k {m}none {m}s
EXISTS
TYPE {m}k
TYPE {m}none
TYPE {m}s
TYPE
GET {m}s
STRLEN {m}s
GETRANGE {m}s 0 1
SET {m}s v NX
SCAN
SCAN x
SCAN 0 COUNT 0
SCAN 0 COUNT x
SCAN 0 FOO 1
SCAN 0 MATCH
DBSIZE x
CONFIG
CONFIG GET
CONFIG GET nosuch
CONFIG GET appendonly
CLIENT
CLIENT GETNAME
CLIENT SETNAME a_b
CLIENT SETNAME good
CLIENT GETNAME
CLIENT NO-EVICT on
CLIENT NO-EVICT bad
COMMAND INFO nosuch
HELLO x
HELLO 1
HELLO 7
HELLO 2 FOO
HELLO 2 AUTH other x
HELLO 2 SETNAME a_b
HELLO 2 SETNAME
AUTH x
AUTH default x
AUTH other x
AUTH
SHUTDOWN NOSUCH
SHUTDOWN ABORT
SREM {m}s a b
EXISTS {m}s
SET {m}gone v
DEL
DEL {m}none
DEL {m}k {m}gone
UNLINK
UNLINK {m}none {m}n
"""

# What this server does not have, and what it says instead.
OTHERS = {
    "SELECT 1": "-ERR DB index is out of range",  # redis-server has 16
    "SET {m}k v EX 10": "-ERR syntax error",
    "SET {m}k v KEEPTTL": "-ERR syntax error",
    "SET {m}k v GET": "-ERR syntax error",
    "SET {m}k v NX XX": "-ERR syntax error",
    "CONFIG SET maxmemory 1": "-ERR CONFIG: this server has only GET",
    "CONFIG NOSUCH": "-ERR CONFIG: this server has only GET",
    "CLIENT NOSUCH": "-ERR unknown subcommand",
    "CLIENT KILL 1": "-ERR unknown subcommand",
    "CLIENT SETINFO NOSUCH x": "-ERR Unrecognized option 'NOSUCH'",
    "COMMAND NOSUCH": "-ERR unknown subcommand",
    "SHUTDOWN SAVE": "-ERR SHUTDOWN SAVE: this server keeps nothing on disk",
    "APPEND {m}k x": "-ERR unknown command 'APPEND'",
    "INCR {m}k": "-ERR unknown command 'INCR'",
    "EXPIRE {m}k 10": "-ERR unknown command 'EXPIRE'",
    "SETEX {m}k 10 v": "-ERR unknown command 'SETEX'",
    "FLUSHALL": "-ERR unknown command 'FLUSHALL'",
    "KEYS *": "-ERR unknown command 'KEYS'",
    "MULTI": "-ERR unknown command 'MULTI'",
    "EVAL x 0": "-ERR unknown command 'EVAL'",
    "SUBSCRIBE x": "-ERR unknown command 'SUBSCRIBE'",
    "HSET {m}h a b": "-ERR unknown command 'HSET'",
    "RDMALOAD.HELLO 1": "-ERR unknown command 'RDMALOAD.HELLO'",
}


class Raw:
    """Replies as they are sent: what a client library would make of them is left out."""

    def __init__(self, port: int, protocol: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.stream = self.socket.makefile("rb")
        assert self.ask("HELLO", str(protocol))

    def ask(self, *words: str) -> object:
        parts = [b"$%d\r\n%s\r\n" % (len(word), word.encode()) for word in words]
        self.socket.sendall(b"*%d\r\n" % len(words) + b"".join(parts))
        return self.reply()

    def reply(self) -> object:
        line = self.stream.readline()
        assert line.endswith(b"\r\n"), "the connection was closed"
        kind, rest = line[:1], line[1:-2]
        if kind == b"$" and rest != b"-1":
            return self.stream.read(int(rest) + 2)[:-2]
        if kind in b"*~%" and rest != b"-1":
            items = [self.reply() for _ in range(int(rest) * (2 if kind == b"%" else 1))]
            return kind, sorted(items, key=repr) if kind == b"~" else items
        return line[:-2].decode()

    def close(self) -> None:
        self.stream.close()
        self.socket.close()


def spelled(line: str, model: str, protocol: int) -> list[str]:
    words = [word.format(m=f"{model}/").replace("_b", " b") for word in line.split(" ")]
    # A refused HELLO leaves the protocol as it is; the others ask for the one that is spoken.
    return [words[0], str(protocol), *words[2:]] if words[:2] == ["HELLO", "2"] else words


def set_as_list(reply: object) -> object:
    return (reply[0], sorted(reply[1], key=repr)) if isinstance(reply, tuple) else reply


@pytest.mark.parametrize("protocol", [2, 3])
def test_replies_are_redis_servers_errors_included(
    weight_server: WeightServer, redis_server: RedisServer, model: str, protocol: int
) -> None:
    with closing(Raw(weight_server.port, protocol)) as ours, closing(Raw(redis_server.port, protocol)) as theirs:
        different = {}
        for line in SAME.strip().splitlines():
            words = spelled(line, model, protocol)
            mine, other = ours.ask(*words), theirs.ask(*words)
            if words[0] == "SMEMBERS":
                mine, other = set_as_list(mine), set_as_list(other)
            if mine != other:
                different[line] = mine, other
        assert different == {}
        for key in ("k", "n", "s", "gone"):
            assert theirs.ask("EXISTS", f"{model}/{key}") == ":0"


@pytest.mark.parametrize("protocol", [2, 3])
def test_what_it_does_not_have_is_a_proper_error(weight_server: WeightServer, model: str, protocol: int) -> None:
    with closing(Raw(weight_server.port, protocol)) as client:
        for line, error in OTHERS.items():
            reply = client.ask(*spelled(line, model, protocol))
            assert str(reply).startswith(error), line
            assert client.ask("PING") == "+PONG", line  # and the connection goes on
        assert client.ask("EXISTS", f"{model}/k") == ":0"


def test_commands_are_described_as_redis_server_does(weight_server: WeightServer, redis_server: RedisServer) -> None:
    with closing(Raw(weight_server.port, 2)) as ours, closing(Raw(redis_server.port, 2)) as theirs:
        listed = ours.ask("COMMAND", "LIST")
        assert isinstance(listed, tuple)
        names = [name.decode() for name in listed[1] if not name.startswith(b"rdmaload.")]
        assert ours.ask("COMMAND", "COUNT") == f":{len(listed[1])}"
        assert len(ours.ask("COMMAND")[1]) == len(listed[1])  # type: ignore[index]
        assert {"get", "set", "mget", "del", "scan", "hello", "shutdown"} <= set(names)
        for name in names:
            mine, other = ours.ask("COMMAND", "INFO", name), theirs.ask("COMMAND", "INFO", name)
            described, model = mine[1][0][1], other[1][0][1]  # type: ignore[index]
            assert described[0] == model[0] == name.encode()
            assert described[3:6] == model[3:6], name  # which words are keys: proxies route by it


def test_where_the_system_has_no_memory_a_client_loses_its_request_and_not_the_server() -> None:
    """Memory runs out below --max-memory: a write fails, nothing dies, and what is there stays."""
    room = 64 * 2**20
    with WeightServer(max_memory=2**34) as server:
        with server.client() as client:
            assert client.set("kept", b"k" * 100_000)
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        mapped = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmSize"))
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, (mapped + room, mapped + room))

        def delete_all(nbytes: int) -> bool:
            try:  # where nothing is left even this may cost its client the connection
                with server.client() as client:
                    for number in range(4 * room // nbytes):
                        client.delete(f"{nbytes}/{number}")
                    return True
            except redis.ConnectionError:
                return False

        for nbytes in (16_000, 2**20 - 4096, 9 * 2**20):
            refused = False
            with server.client() as writer:
                for number in range(4 * room // nbytes):  # what the heap has reserved already comes first
                    try:
                        writer.set(f"{nbytes}/{number}", b"v" * nbytes)
                    except (redis.ResponseError, redis.ConnectionError):
                        refused = True
                        break
            assert refused, nbytes
            assert server.running
            assert eventually(lambda nbytes=nbytes: delete_all(nbytes))  # type: ignore[misc]
            with server.client() as client:
                assert client.get("kept") == b"k" * 100_000


def test_valkeys_own_tools_work(weight_server: WeightServer, model: str) -> None:
    port = ["-p", str(weight_server.port)]

    def run(*command: str, text: str | None = None) -> str:
        done = subprocess.run(command, capture_output=True, text=True, input=text, timeout=120)
        assert done.returncode == 0, done
        return done.stdout

    assert run("valkey-cli", *port, "SET", f"{model}/a", "hello") == "OK\n"
    assert run("valkey-cli", *port, "-3", "GET", f"{model}/a") == "hello\n"
    assert "unknown command" in run("valkey-cli", *port, text="NOSUCH\n")
    assert f"{model}/a" in run("valkey-cli", *port, "--scan", "--pattern", f"{model}/*")
    spoken = run("valkey-benchmark", *port, "-t", "get,set", "-n", "1000", "-d", "20000", "-P", "8", "-q")
    assert spoken.count("requests per second") == 2
    run("valkey-cli", *port, "DEL", "key:__rand_int__")

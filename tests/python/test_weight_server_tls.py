"""The weight server under TLS: our client, redis-py, redis-cli, who is refused, and what slow clients cost it."""

from __future__ import annotations

import random
import shutil
import socket
import ssl
import struct
import subprocess
from pathlib import Path

import pytest
import redis
import torch

import rdmaload
from rdmaload.cli import main
from rdmaload.errors import AuthenticationError, UnavailableError
from tests.python.test_weight_server import content, eventually, same
from tests.support.certificates import Authority
from tests.support.checkpoints import Checkpoint
from tests.support.weight_server import WeightServer


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


def wrapped(server: WeightServer, **arguments: object) -> ssl.SSLSocket:
    assert server.tls is not None
    context = ssl.create_default_context(cafile=str(server.tls.ca_file))
    plain = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    return context.wrap_socket(plain, server_hostname="127.0.0.1", **arguments)  # type: ignore[arg-type]


def test_models_are_saved_loaded_and_exported_under_tls(
    authority: Authority, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint.directory, tmp_path / "models" / "exported")
    expected = content(tiny_checkpoint.directory)
    with WeightServer(tls=authority, models=tmp_path / "models", args=["--wait-checksums"]) as server:
        assert str(server.document["url"]).startswith("rediss://")
        rdmaload.save(tiny_checkpoint.directory, server.url("saved", connections=3))
        for model in ("saved", "exported"):
            stats = rdmaload.LoadStats()
            assert same(rdmaload.load(server.url(model), stats=stats, verify="require"), expected)
            assert (stats.path, stats.unverified_bytes) == ("resp-tls", 0)
        assert main(["ping", server.url("")]) == 0
        with pytest.raises(AuthenticationError, match="ca_file"):
            rdmaload.load(server.url("saved").partition("?")[0])
        with pytest.raises(UnavailableError):
            rdmaload.load(f"redis://127.0.0.1:{server.port}/saved", retry_timeout=0.2)
        # Nothing is lost of a value that ends in the middle of a record, nor of one that spans many.
        value = random.Random(1).randbytes(3_000_001)
        with server.client() as client:
            assert client.set("a", value)
            assert client.get("a") == value
            assert client.getrange("a", 16380, 16390) == value[16380:16391]
            info = client.info()
            assert info["tls"] == "yes"
            assert int(info["tls_handshakes_failed"]) >= 1
            assert client.config_get("*port*") == {"port": "0", "tls-port": str(server.port)}
            with client.pipeline(transaction=False) as pipeline:
                for number in range(3000):
                    pipeline.set(f"{number}", b"v" * number)
                for number in range(3000):
                    pipeline.get(f"{number}")
                assert [len(got) for got in pipeline.execute()[3000:]] == list(range(3000))
        assert server.end() == 0


def test_redis_cli_and_redis_benchmark_work_under_tls(authority: Authority) -> None:
    with WeightServer(tls=authority) as server:
        secure = ["-p", str(server.port), "--tls", "--cacert", str(authority.ca_file)]
        command = ["redis-cli", *secure, "SET", "a", "hello"]
        assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "OK\n"
        command = ["redis-cli", *secure, "GET", "a"]
        assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "hello\n"
        command = ["redis-benchmark", *secure, "-t", "get,set", "-n", "1000", "-d", "100000", "-P", "4", "-q"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done
        assert done.stdout.count("requests per second") == 2


def test_clients_without_the_certificate_that_is_asked_for_are_refused(authority: Authority, tmp_path: Path) -> None:
    with WeightServer(tls=authority, tls_clients=True) as server:
        rdmaload.save({"w": torch.ones(3)}, server.url("m"))
        assert same(rdmaload.load(server.url("m")), {"w": torch.ones(3)})
        bare = f"rediss://127.0.0.1:{server.port}/m?ca_file={authority.ca_file}"
        with pytest.raises(AuthenticationError, match="client_cert_file"):
            rdmaload.load(bare)
        other = Authority(tmp_path, "other").issue(names=("client",))
        with pytest.raises(AuthenticationError):
            rdmaload.load(f"{bare}&client_cert_file={other.cert_file}&client_key_file={other.key_file}")
        with server.client() as client:
            assert int(client.info("clients")["tls_handshakes_failed"]) >= 2


@pytest.mark.parametrize("junk", [b"PING\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 100_000, b"\0" * 5000])
def test_what_is_no_tls_ends_that_connection_only(authority: Authority, junk: bytes) -> None:
    with WeightServer(tls=authority) as server, server.client() as client:
        assert client.set("a", b"1")
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as plain:
            plain.sendall(junk)
            plain.shutdown(socket.SHUT_WR)
            received = b""
            try:
                while part := plain.recv(4096):
                    received += part
            except ConnectionResetError:
                pass
            assert len(received) < 100  # an alert at most
        assert client.get("a") == b"1"
        assert eventually(lambda: int(client.info("clients")["connected_clients"]) == 1)


def test_slow_and_killed_clients_leave_nothing_and_hold_up_nobody(authority: Authority) -> None:
    value = random.Random(2).randbytes(2**20)
    with WeightServer(tls=authority) as server, server.client() as client:
        assert client.set("a", value)
        before = client.info()
        slow = [wrapped(server) for _ in range(40)]
        for one in slow:
            one.sendall(b"GET a\r\n" * 50)  # and never read
        for _ in range(3):
            with server.client() as other:
                assert other.get("a") == value
        during = client.info()
        assert int(during["connected_clients"]) == 41
        assert during["values"] == before["values"]
        for number, one in enumerate(slow):
            if number % 2 == 0:  # killed: a reset instead of an end
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.close()
        assert eventually(lambda: int(client.info("clients")["connected_clients"]) == 1)
        after = client.info()
        assert (after["used_memory"], after["values"]) == (before["used_memory"], before["values"])


def test_a_slow_client_gets_everything_in_the_end(authority: Authority) -> None:
    value = random.Random(3).randbytes(2**20)
    with WeightServer(tls=authority) as server, server.client() as client:
        assert client.set("a", value)
        with wrapped(server) as slow:
            slow.sendall(b"GET a\r\n" * 40)
            assert client.get("a") == value
            reply = b"$%d\r\n%s\r\n" % (len(value), value)
            stream = slow.makefile("rb")
            for _ in range(40):
                assert stream.read(len(reply)) == reply
            slow.sendall(b"PING\r\n")
            assert stream.readline() == b"+PONG\r\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--tls-key", "x"], 2, "without --tls-cert"),
        (["--tls-client-ca", "x"], 2, "without --tls-cert"),
        (["--tls-cert", "/does/not/exist"], 5, "tls_cert=/does/not/exist cannot be used"),
    ],
)
def test_what_serve_refuses(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", *arguments]) == code
    assert words in capsys.readouterr().err


def test_a_key_that_does_not_fit_is_refused(authority: Authority, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = authority.issue(), authority.issue()
    command = ["serve", "--port", "0", "--tls-cert", str(one.cert_file), "--tls-key", str(other.key_file)]
    assert main(command) == 5
    assert f"tls_key={other.key_file} cannot be used" in capsys.readouterr().err
    encrypted = authority.issue(password=b"secret")
    command = ["serve", "--port", "0", "--tls-cert", str(encrypted.cert_file), "--tls-key", str(encrypted.key_file)]
    assert main(command) == 5


def test_tls_alone_may_listen_beyond_loopback_and_says_what_that_means(authority: Authority, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret\n")
    with WeightServer(tls=authority, args=["--host", "0.0.0.0"]) as server:
        assert "everybody who reaches the server can read and write" in server.errors()
    with WeightServer(tls=authority, password_file=secret, password="s3cret", args=["--host", "0.0.0.0"]) as server:
        assert server.errors() == ""
        with server.client() as client:
            assert client.ping()
        with pytest.raises(redis.AuthenticationError), server.client(password="wrong") as client:
            client.ping()
    with WeightServer(tls=authority, tls_clients=True, args=["--host", "0.0.0.0"]) as server:
        assert server.errors() == ""

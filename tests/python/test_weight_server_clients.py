"""200 clients of one weight server that come and go, half of them slow or killed: what they get, what they leave."""

from __future__ import annotations

import os
import random
import socket
import ssl
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import rdmaload
from tests.python.test_weight_server import eventually
from tests.support.certificates import Authority
from tests.support.weight_server import WeightServer

GOOD, SLOW, KILLED = 100, 50, 50
REPLIES = 20  # that a slow client asks for at once
MEMORY_BYTES = 48 * 2**20  # what a process may keep of allocations that came and went


class Client:
    """A connection without a library's habits: it reads when told to, and ends as told."""

    def __init__(self, server: WeightServer) -> None:
        self.socket: socket.socket = socket.socket()
        self.socket.settimeout(120)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        self.socket.connect((server.host, server.port))
        if server.tls is not None:
            context = ssl.create_default_context(cafile=str(server.tls.ca_file))
            self.socket = context.wrap_socket(self.socket, server_hostname=server.host)
        self.stream = self.socket.makefile("rb")

    def send(self, *words: bytes) -> None:
        self.socket.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words))

    def value(self) -> bytes:
        header = self.stream.readline()
        assert header.startswith(b"$"), header
        value = self.stream.read(int(header[1:]))
        assert self.stream.read(2) == b"\r\n"
        return value

    def close(self) -> None:
        self.stream.close()
        self.socket.close()

    def kill(self) -> None:
        """As a process that is killed with unread data: a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


def descriptors(server: WeightServer) -> list[str]:
    """What the server's process has open; of sockets only how many."""
    root = Path(f"/proc/{server.process.pid}/fd")
    found = []
    for name in os.listdir(root):
        try:
            found.append(os.readlink(root / name))
        except FileNotFoundError:
            continue
    return sorted(kind.partition(":")[0] if kind.startswith("socket:") else kind for kind in found)


def resident_bytes(server: WeightServer) -> int:
    for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_200_clients_half_of_them_slow_or_killed_leave_nothing_and_hold_up_nobody(tmp_path: Path, secure: bool) -> None:
    directory = tmp_path / "models" / "exported"
    directory.mkdir(parents=True)
    exported = torch.frombuffer(bytearray(random.Random(1).randbytes(2**21)), dtype=torch.uint8)
    save_file({"w": exported}, directory / "model.safetensors")
    stored = random.Random(2).randbytes(2**20 - 4096)
    authority = Authority(tmp_path) if secure else None
    with (
        WeightServer(
            models=tmp_path / "models", cache=tmp_path / "cache", tls=authority, args=["--wait-checksums"]
        ) as server,
        server.client() as watcher,
    ):
        with rdmaload.open(server.url("exported")) as model:
            chunk = f"exported/chunks/{model.generation}/0/0".encode()
        of_file = (directory / "model.safetensors").read_bytes()[: 2**20 - 4096]
        assert watcher.set("stored", stored)
        assert watcher.get(chunk) == of_file
        assert eventually(lambda: int(watcher.info("clients")["connected_clients"]) == 1)
        before, open_before, resident_before = watcher.info(), descriptors(server), resident_bytes(server)

        slow = [Client(server) for _ in range(SLOW)]
        for number, client in enumerate(slow):
            for _ in range(REPLIES):
                client.send(b"GET", b"stored" if number % 4 < 2 else chunk)
        received = 0
        lock = threading.Lock()

        def good(_: int) -> None:
            nonlocal received
            client = Client(server)
            for key, expected in ((b"stored", stored), (chunk, of_file)):
                client.send(b"GET", key)
                value = client.value()
                assert value == expected
                with lock:
                    received += len(value)
            client.close()

        def killed(number: int) -> None:
            client = Client(server)
            if number % 3 == 0:  # in the middle of a reply
                client.send(b"MGET", b"stored", chunk, b"stored", chunk)
                assert client.stream.read(1000)
            elif number % 3 == 1:  # in the middle of a value
                client.socket.sendall(b"*3\r\n$3\r\nSET\r\n$6\r\nstored\r\n$1000000\r\n" + stored[:500_000])
            else:  # in the middle of a request
                client.socket.sendall(b"*2\r\n$3\r\nGET\r\n$6\r\nsto")
            client.kill()

        with ThreadPoolExecutor(8) as pool:
            done = [pool.submit(killed if number % 3 == 2 else good, number) for number in range(GOOD + KILLED)]
            for one in done:
                one.result()
        # All that while nobody took the slow ones' replies.
        assert received == GOOD * (len(stored) + len(of_file))
        during = watcher.info()
        assert int(during["connected_clients"]) >= 1 + SLOW
        assert int(during["values"]) <= int(before["values"]) + SLOW + KILLED  # none per reply that waits
        assert resident_bytes(server) < resident_before + MEMORY_BYTES
        with ExitStack() as stack:
            for number, client in enumerate(slow):
                if number % 2 == 0:
                    stack.callback(client.kill)
                    continue
                for _ in range(REPLIES):  # late, but whole
                    assert client.value() == (stored if number % 4 < 2 else of_file)
                stack.callback(client.close)

        assert eventually(lambda: int(watcher.info("clients")["connected_clients"]) == 1)
        after = watcher.info()
        assert watcher.get("stored") == stored
        for name in ("used_memory", "used_memory_rss", "values"):
            assert after[name] == before[name], name
        accepted = int(after["total_connections_received"]) - int(before["total_connections_received"])
        assert accepted == GOOD + SLOW + KILLED
        sent = int(after["total_net_output_bytes"]) - int(before["total_net_output_bytes"])
        assert sent >= received + SLOW // 2 * REPLIES * min(len(stored), len(of_file))
        assert (after["stalled_clients_closed"], after["exported_file_failures"]) == (0, 0)
        assert descriptors(server) == open_before
        assert resident_bytes(server) < resident_before + MEMORY_BYTES
        assert server.end() == 0
        assert server.errors() == ""

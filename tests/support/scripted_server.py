"""A RESP server whose answers a Python function gives, for what no real server would send."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping
from types import TracebackType

from tests.support.resp import bulk, command_end, error, nil, parse_command, simple

__all__ = ["Answer", "ScriptedServer", "answers_from"]

# The words of a command -> the bytes to send (which may be none, or half a reply); None closes the
# connection.
Answer = Callable[[list[bytes]], bytes | None]


def answers_from(values: Mapping[str, bytes]) -> Answer:
    """Answers as a server that holds `values`: PING AUTH SELECT CLIENT HELLO GET STRLEN EXISTS."""

    def answer(words: list[bytes]) -> bytes:
        name = words[0].upper()
        value = values.get(words[1].decode()) if len(words) > 1 else None
        if name == b"PING":
            return simple("PONG")
        if name in (b"AUTH", b"SELECT", b"CLIENT"):
            return simple("OK")
        if name == b"HELLO":
            return b"*4\r\n" + bulk(b"server") + bulk(b"redis") + bulk(b"proto") + b":2\r\n"
        if name == b"GET":
            return nil() if value is None else bulk(value)
        if name == b"STRLEN":
            return b":%d\r\n" % len(value or b"")
        if name == b"EXISTS":
            return b":%d\r\n" % (value is not None)
        return error(f"ERR unknown command '{name.decode(errors='replace')}'")

    return answer


class ScriptedServer:
    """Serves connections, one thread each; `commands` holds what all of them asked, in order.

    with ScriptedServer(lambda words: b"$5\\r\\nhel") as server:  # a value that stops in the middle
        ...
    """

    def __init__(self, answer: Answer, *, host: str = "127.0.0.1") -> None:
        self._answer = answer
        self._mutex = threading.Lock()
        self._clients: set[socket.socket] = set()  # Guarded by _mutex, as is _closed.
        self._closed = False
        self._threads: list[threading.Thread] = []
        self.commands: list[list[bytes]] = []
        self.failure: BaseException | None = None
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self.host, self.port = self._listener.getsockname()[:2]
        self._acceptor = threading.Thread(target=self._accept, name=f"scripted-server-{self.port}")
        self._acceptor.start()

    def url(self, model: str) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis://{host}:{self.port}/{model}"

    def close(self) -> None:
        """Drop every connection and join every thread; raises what `answer` raised, if it did."""
        with self._mutex:
            self._closed = True
            for client in self._clients:
                with contextlib.suppress(OSError):  # the peer may have reset it
                    client.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        for thread in self._threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            with self._mutex:
                if self._closed:
                    client.close()
                    return
                self._clients.add(client)
            thread = threading.Thread(target=self._serve, args=(client,))
            thread.name = f"scripted-server-{self.port}-client"
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        pending = bytearray()
        try:
            while data := client.recv(1 << 16):
                pending += data
                while (end := command_end(pending)) is not None:
                    words = parse_command(pending[:end])
                    del pending[:end]
                    if not words:
                        continue
                    self.commands.append(words)
                    reply = self._answer(words)
                    if reply is None:
                        return
                    client.sendall(reply)
        except OSError:
            pass  # the client is gone, which is its right
        except BaseException as failure:  # kept for close(), where the test sees it
            self.failure = failure
        finally:
            with self._mutex:
                self._clients.discard(client)
                client.close()

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

"""A TCP proxy before a RESP server that does to its bytes what networks and servers do.

One thread accepts and one thread serves each connection; `close` ends and joins them all. What the
client sends passes unchanged. With a reply fault the proxy holds each reply until it has it whole;
otherwise bytes pass as they come.

    with FaultProxy(server.host, server.port, Reset(after=5_000_000, first_connections=1)) as proxy:
        rdmaload.load(proxy.url("llama"))
        assert proxy.fired == 1
"""

from __future__ import annotations

import fcntl
import selectors
import socket
import struct
import termios
import threading
import time
from collections import deque
from types import TracebackType

from tests.support.faults import (
    ByteFault,
    Delay,
    Fault,
    FlipBit,
    ReplyFault,
    ReplyFaults,
    Reset,
    Stall,
    Throttle,
)
from tests.support.resp import command_end, parse_command, reply_end

__all__ = ["FaultProxy"]

BLOCK_BYTES = 256 << 10
# Enough for any socket to stay busy, little enough that a proxy of a large model stays small.
PENDING_BYTES = 4 << 20
# How often a throttled connection may send: a few packets' worth of time, so that the rate is
# smooth.
TICK_SECONDS = 0.005


class FaultProxy:
    """Listens on a free port of 127.0.0.1 and applies `faults`, in their order, to each connection.

    `mode`: "forward"; "refuse" closes the port; "never_accept" leaves it listening with a full
    backlog, so that connecting neither succeeds nor fails. `set_mode` and `set_faults` act on
    connections made after them.
    """

    def __init__(self, host: str, port: int, *faults: Fault, mode: str = "forward") -> None:
        self._upstream = (host, port)
        self._faults = faults
        self._changed = threading.Condition()
        self._fired: dict[Fault, int] = {}  # Guarded by _changed, as are the three counters.
        self.connections = 0
        self.bytes_to_client = 0
        self.bytes_to_server = 0
        self.commands: list[list[bytes]] = []  # name and key of each; only with a reply fault
        self._wake = _Wake()
        self._threads: list[threading.Thread] = []
        self._acceptor: threading.Thread | None = None
        self._fillers: list[socket.socket] = []
        # Bound but never listening: it keeps the port ours while nothing listens on it.
        self._reservation = _bound(("127.0.0.1", 0))
        self.host, self.port = self._reservation.getsockname()
        self.mode = "refuse"
        self.set_mode(mode)

    @property
    def fired(self) -> int:
        """How many times any fault was applied."""
        with self._changed:
            return sum(self._fired.values())

    def url(self, model: str, query: str = "") -> str:
        """A redis url of `model` through this proxy, without a password."""
        return f"redis://{self.host}:{self.port}/{model}" + (f"?{query}" if query else "")

    def wait_for_fault(self, timeout: float = 10.0, count: int = 1) -> bool:
        """Wait until faults were applied `count` times; False after `timeout` seconds without."""
        with self._changed:
            return self._changed.wait_for(lambda: sum(self._fired.values()) >= count, timeout)

    def wait_for_bytes(self, count: int, timeout: float = 10.0) -> bool:
        """Wait until `count` bytes went to the client; False after `timeout` seconds without."""
        with self._changed:
            return self._changed.wait_for(lambda: self.bytes_to_client >= count, timeout)

    def set_faults(self, *faults: Fault) -> None:
        self._faults = faults

    def set_mode(self, mode: str) -> None:
        """Change to "forward", "refuse" or "never_accept"; open connections go on."""
        if mode not in ("forward", "refuse", "never_accept"):
            raise ValueError(f"unknown mode {mode!r}")
        if mode == self.mode:
            return
        self._stop_listening()
        self.mode = mode
        if mode != "refuse":
            listener = _bound((self.host, self.port))
            listener.listen(128 if mode == "forward" else 0)
            self._listener = listener
        if mode == "forward":
            self._acceptor = threading.Thread(target=self._accept, args=(self._listener,))
            self._acceptor.name = f"fault-proxy-{self.port}"
            self._acceptor.start()
        elif mode == "never_accept":
            self._fill_backlog()

    def close(self) -> None:
        """Drop every connection, join every thread and give the port back; may be called again."""
        self._wake.set()
        self.set_mode("refuse")
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._reservation.close()
        self._wake.close()

    def _stop_listening(self) -> None:
        if self.mode == "refuse":
            return
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        if self._acceptor is not None:
            self._acceptor.join()
            self._acceptor = None
        self._listener.close()
        for filler in self._fillers:
            filler.close()
        self._fillers.clear()

    def _fill_backlog(self) -> None:
        """Connect until a connection stays pending: from then on the kernel drops new ones."""
        while True:
            filler = socket.socket()
            self._fillers.append(filler)
            filler.settimeout(0.2)
            try:
                filler.connect((self.host, self.port))
            except TimeoutError:
                return

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client = listener.accept()[0]
            except OSError:
                return
            with self._changed:
                number = self.connections
                self.connections += 1
                self._changed.notify_all()
            faults = [
                fault for fault in self._faults if fault.first_connections is None or number < fault.first_connections
            ]
            thread = threading.Thread(target=_Connection(self, client, faults).serve)
            thread.name = f"fault-proxy-{self.port}-{number}"
            self._threads = [old for old in self._threads if old.is_alive()]
            self._threads.append(thread)
            thread.start()

    def _fire(self, fault: Fault, once: bool) -> bool:
        """Count one application of `fault`; False when it may not be applied again."""
        with self._changed:
            if once and fault in self._fired:
                return False
            self._fired[fault] = self._fired.get(fault, 0) + 1
            self._changed.notify_all()
            return True

    def _count(self, to_client: int, to_server: int) -> None:
        with self._changed:
            self.bytes_to_client += to_client
            self.bytes_to_server += to_server
            self._changed.notify_all()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Wake:
    """A flag that a selector can wait for."""

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()

    def set(self) -> None:
        if self._writer.fileno() >= 0:
            self._writer.close()

    def close(self) -> None:
        self._writer.close()
        self.reader.close()


class _Connection:
    """One client's connection. Everything here runs in the thread that calls `serve`."""

    def __init__(self, proxy: FaultProxy, client: socket.socket, faults: list[Fault]) -> None:
        self._proxy = proxy
        self._client = client
        self._server: socket.socket | None = None
        self._to_client = bytearray()
        self._to_server = bytearray()
        self._passed = 0  # bytes of the server put into _to_client
        self._ends = sorted((fault for fault in faults if isinstance(fault, ByteFault)), key=lambda end: end.after)
        self._flips = [fault for fault in faults if isinstance(fault, FlipBit)]
        self._delay = sum(fault.seconds for fault in faults if isinstance(fault, Delay))
        self._rates = [fault.bytes_per_second for fault in faults if isinstance(fault, Throttle)]
        replies = [fault for fault in faults if isinstance(fault, ReplyFault)]
        self._replies = ReplyFaults(replies, proxy._fire) if replies else None
        self._reply_bytes = bytearray()
        self._command_bytes = bytearray()
        self._commands: deque[list[bytes]] = deque()
        self._not_before = 0.0
        for fault in faults:
            if isinstance(fault, Delay | Throttle):
                proxy._fire(fault, False)

    def serve(self) -> None:
        try:
            if not self._at_end():
                self._server = socket.create_connection(self._proxy._upstream, timeout=10)
                self._server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._server.setblocking(False)
                self._client.setblocking(False)
                self._forward()
            if self._at_end() and not self._to_client:
                self._finish(self._ends[0])
        except OSError:
            # One side is gone; the other learns it as a reset, never as an orderly end.
            _reset_on_close(self._client)
        finally:
            self._client.close()
            if self._server is not None:
                self._server.close()

    def _at_end(self) -> bool:
        return bool(self._ends) and self._passed >= self._ends[0].after

    def _forward(self) -> None:
        """Pass bytes both ways until a fault ends it, one side closes, or the proxy is closed."""
        assert self._server is not None
        server_open = True
        with selectors.DefaultSelector() as selector:
            selector.register(self._proxy._wake.reader, selectors.EVENT_READ)
            while self._to_client or (server_open and not self._at_end()):
                now = time.monotonic()
                held = bool(self._to_client) and now < self._not_before
                writable = bool(self._to_client) and not held
                reading = server_open and not self._at_end() and len(self._to_client) < PENDING_BYTES
                _watch(selector, self._client, len(self._to_server) < PENDING_BYTES, writable)
                _watch(selector, self._server, reading, bool(self._to_server))
                events = selector.select(self._not_before - now if held else None)
                ready = {key.fileobj: mask for key, mask in events}
                if self._proxy._wake.reader in ready:
                    raise ConnectionAbortedError("the proxy was closed")
                if ready.get(self._client, 0) & selectors.EVENT_READ and not self._from_client():
                    return
                if ready.get(self._server, 0) & selectors.EVENT_WRITE:
                    sent = self._server.send(self._to_server)
                    del self._to_server[:sent]
                    self._proxy._count(0, sent)
                if ready.get(self._server, 0) & selectors.EVENT_READ:
                    server_open = self._from_server()
                if ready.get(self._client, 0) & selectors.EVENT_WRITE:
                    self._send_to_client()

    def _from_client(self) -> bool:
        data = self._client.recv(BLOCK_BYTES)
        self._to_server += data
        if self._replies is not None:
            self._command_bytes += data
            while (end := command_end(self._command_bytes)) is not None:
                words = parse_command(self._command_bytes[:end])[:2]
                del self._command_bytes[:end]
                if words:
                    self._commands.append(words)
                    self._proxy.commands.append(words)
        return bool(data)

    def _from_server(self) -> bool:
        assert self._server is not None
        data = self._server.recv(BLOCK_BYTES)
        if self._replies is None:
            self._pass(data)
            return bool(data)
        self._reply_bytes += data
        while (end := reply_end(self._reply_bytes)) is not None:
            reply = bytes(self._reply_bytes[:end])
            del self._reply_bytes[:end]
            pushed = reply[:1] == b">"  # answers no command
            command = self._commands.popleft() if self._commands and not pushed else []
            self._pass(self._replies.apply(reply, command))
        return bool(data)

    def _pass(self, data: bytes) -> None:
        """Put bytes of the server on their way to the client, up to where a fault ends it."""
        if self._ends:
            data = data[: max(0, self._ends[0].after - self._passed)]
        for fault in self._flips:
            position = fault.offset - self._passed
            if 0 <= position < len(data) and self._proxy._fire(fault, fault.repeat == "once"):
                changed = bytearray(data)
                changed[position] ^= 1 << fault.bit
                data = bytes(changed)
        if data and not self._to_client and self._delay:
            self._not_before = time.monotonic() + self._delay
        self._passed += len(data)
        self._to_client += data

    def _send_to_client(self) -> None:
        limit = BLOCK_BYTES
        if self._rates:
            limit = max(1, min(limit, int(min(self._rates) * TICK_SECONDS)))
        sent = self._client.send(memoryview(self._to_client)[:limit])
        del self._to_client[:sent]
        if self._rates:
            self._not_before = time.monotonic() + sent / min(self._rates)
        self._proxy._count(sent, 0)

    def _finish(self, fault: ByteFault) -> None:
        if isinstance(fault, Stall):
            self._proxy._fire(fault, False)
            self._wait(None)
            return
        # What has passed must reach the client first: a reset discards what is still queued here.
        while _unsent(self._client) and not self._wait(0.001):
            pass
        if isinstance(fault, Reset):
            _reset_on_close(self._client)
            self._client.close()
            self._proxy._fire(fault, False)
            return
        self._client.shutdown(socket.SHUT_WR)
        self._proxy._fire(fault, False)
        # Closing with unread bytes would be a reset: read until the client ends, too.
        self._client.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._proxy._wake.reader, selectors.EVENT_READ)
            selector.register(self._client, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._proxy._wake.reader in ready or not self._client.recv(BLOCK_BYTES):
                    return

    def _wait(self, timeout: float | None) -> bool:
        """Wait for the proxy's end; False when `timeout` seconds passed first."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._proxy._wake.reader, selectors.EVENT_READ)
            return bool(selector.select(timeout))


def _bound(address: tuple[str, int]) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    return bound


def _watch(selector: selectors.BaseSelector, of: socket.socket, read: bool, write: bool) -> None:
    events = (selectors.EVENT_READ if read else 0) | (selectors.EVENT_WRITE if write else 0)
    known = selector.get_map().get(of)
    if known is not None and not events:
        selector.unregister(of)
    elif known is not None:
        selector.modify(of, events)
    elif events:
        selector.register(of, events)


def _reset_on_close(of: socket.socket) -> None:
    if of.fileno() >= 0:
        of.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _unsent(of: socket.socket) -> int:
    """Bytes sent on `of` that the other side's kernel has not acknowledged (SIOCOUTQ)."""
    return int(struct.unpack("i", fcntl.ioctl(of, termios.TIOCOUTQ, b"\0\0\0\0"))[0])

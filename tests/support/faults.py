"""The faults that the proxy can apply, as plain values, and the bookkeeping of when one applies.

Byte faults count the bytes that the server sent on one connection. Reply faults count its replies,
of which `min_bytes` and `key` choose some: `key` is a shell pattern for the key of the command that
is answered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

__all__ = [
    "ByteFault",
    "Close",
    "Delay",
    "Fault",
    "FlipBit",
    "FlipBulkBit",
    "Replace",
    "ReplyFault",
    "Reset",
    "Stall",
    "Throttle",
    "longer_bulk",
    "shorter_bulk",
]

# once: a single time in the proxy's life; connection: once on each connection; always: from the
# first match on
Repeat = Literal["once", "connection", "always"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`first_connections` limits a fault to the first so many connections; None means all."""

    first_connections: int | None = None


@dataclass(frozen=True, kw_only=True)
class ByteFault(Fault):
    """Happens once `after` bytes of the server have passed; 0 is at once, before any."""

    after: int = 0


@dataclass(frozen=True, kw_only=True)
class Stall(ByteFault):
    """Nothing more passes in either direction, and the connection stays open."""


@dataclass(frozen=True, kw_only=True)
class Reset(ByteFault):
    """The client's connection is reset (RST)."""


@dataclass(frozen=True, kw_only=True)
class Close(ByteFault):
    """The client's connection ends cleanly (FIN)."""


@dataclass(frozen=True, kw_only=True)
class FlipBit(Fault):
    """Bit `bit` of the server's byte number `offset` is flipped, once or on each connection."""

    offset: int
    bit: int = 0
    repeat: Repeat = "once"


@dataclass(frozen=True, kw_only=True)
class Delay(Fault):
    """Each burst of the server's bytes waits for `seconds`."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class Throttle(Fault):
    """The server's bytes pass at no more than this rate per connection."""

    bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class ReplyFault(Fault):
    """Acts on matching reply `index` of a connection (from 0) and, by `repeat`, on others."""

    index: int = 0
    min_bytes: int = 0
    key: str | None = None
    repeat: Repeat = "once"

    def matches(self, reply: bytes, command: list[bytes]) -> bool:
        if len(reply) < self.min_bytes:
            return False
        if self.key is None:
            return True
        return len(command) > 1 and fnmatchcase(command[1].decode(errors="replace"), self.key)

    def change(self, reply: bytes) -> bytes:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Replace(ReplyFault):
    """The reply becomes `reply`, bytes or a function of the true one; support.resp encodes."""

    reply: bytes | Callable[[bytes], bytes]

    def change(self, reply: bytes) -> bytes:
        return self.reply if isinstance(self.reply, bytes) else self.reply(reply)


@dataclass(frozen=True, kw_only=True)
class FlipBulkBit(ReplyFault):
    """One bit of a bulk string's payload is flipped; other replies do not match."""

    offset: int = 0
    bit: int = 0

    def matches(self, reply: bytes, command: list[bytes]) -> bool:
        if reply[:1] != b"$" or not super().matches(reply, command):
            return False
        return len(reply) - reply.index(b"\n") - 3 > self.offset

    def change(self, reply: bytes) -> bytes:
        changed = bytearray(reply)
        changed[reply.index(b"\n") + 1 + self.offset] ^= 1 << self.bit
        return bytes(changed)


def longer_bulk(reply: bytes) -> bytes:
    """The same bulk string with one byte more, correctly framed: a value that changed its size."""
    return _resize(reply, 1)


def shorter_bulk(reply: bytes) -> bytes:
    """The same bulk string with one byte less, correctly framed."""
    return _resize(reply, -1)


def _resize(reply: bytes, by: int) -> bytes:
    if reply[:1] != b"$":
        return reply
    payload = reply[reply.index(b"\n") + 1 : -2]
    payload = payload[:by] if by < 0 else payload + b"\0" * by
    return b"$%d\r\n%b\r\n" % (len(payload), payload)


class ReplyFaults:
    """The reply faults of one connection. `fire_once` says whether a once-fault may still fire."""

    def __init__(self, faults: list[ReplyFault], fire: Callable[[Fault, bool], bool]) -> None:
        self._faults = faults
        self._seen = [0] * len(faults)
        self._fire = fire

    def apply(self, reply: bytes, command: list[bytes]) -> bytes:
        for position, fault in enumerate(self._faults):
            if not fault.matches(reply, command):
                continue
            number = self._seen[position]
            self._seen[position] += 1
            if number != fault.index and (number < fault.index or fault.repeat == "connection"):
                continue
            if self._fire(fault, fault.repeat == "once"):
                reply = fault.change(reply)
        return reply

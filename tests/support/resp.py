"""The wire format of Redis (RESP 2 and 3) as far as the proxy and the scripted server need it."""

from __future__ import annotations

__all__ = [
    "array",
    "bulk",
    "command_end",
    "error",
    "integer",
    "nil",
    "parse_command",
    "reply_end",
    "simple",
]

_LINE = b"+-:_#,("
_BULK = b"$!="
_AGGREGATE = {b"*": 1, b"~": 1, b">": 1, b"%": 2, b"|": 2}


def simple(text: str) -> bytes:
    return b"+" + text.encode() + b"\r\n"


def error(text: str) -> bytes:
    return b"-" + text.encode() + b"\r\n"


def integer(value: int) -> bytes:
    return b":%d\r\n" % value


def nil() -> bytes:
    return b"$-1\r\n"


def bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


def array(items: list[bytes]) -> bytes:
    """An array of replies that are encoded already."""
    return b"*%d\r\n" % len(items) + b"".join(items)


def reply_end(data: bytes | bytearray, start: int = 0) -> int | None:
    """Where the reply that begins at `start` ends; None when it is not there whole."""
    line_end = data.find(b"\r\n", start)
    if line_end < 0:
        return None
    kind = bytes(data[start : start + 1])
    if kind in _LINE and kind:
        return line_end + 2
    if kind in _BULK and kind:
        length = int(data[start + 1 : line_end])
        end = line_end + 2 if length < 0 else line_end + 2 + length + 2
        return end if end <= len(data) else None
    if kind not in _AGGREGATE:
        raise ValueError(f"no reply begins with {kind!r}")
    position = line_end + 2
    count = max(0, int(data[start + 1 : line_end])) * _AGGREGATE[kind]
    count += kind == b"|"  # an attribute stands before the reply that it describes
    for _ in range(count):
        after = reply_end(data, position)
        if after is None:
            return None
        position = after
    return position


def command_end(data: bytes | bytearray, start: int = 0) -> int | None:
    """Where the command (array or inline) at `start` ends; None when it is not there whole."""
    if data[start : start + 1] == b"*":
        return reply_end(data, start)
    line_end = data.find(b"\n", start)
    return None if line_end < 0 else line_end + 1


def parse_command(data: bytes | bytearray) -> list[bytes]:
    """The words of one whole command."""
    if data[:1] != b"*":
        return bytes(data).split()
    words = []
    position = data.index(b"\r\n") + 2
    for _ in range(int(data[1 : position - 2])):
        body = data.index(b"\r\n", position) + 2
        length = int(data[position + 1 : body - 2])
        words.append(bytes(data[body : body + length]))
        position = body + length + 2
    return words

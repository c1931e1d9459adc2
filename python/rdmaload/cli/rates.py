"""Rates that do not need a store: memory, checksums, a stream between two sockets of this process.

Each function does the work once and gives bytes per second; who calls it repeats and takes the median.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rdmaload._core import HostArena

__all__ = ["Figure", "checksum_rate", "device_rate", "fresh_rate", "small_page_rate", "stream_rate", "touched_rate"]

ARENA_BYTES = 256 << 20  # as the arenas of a load
_SOURCE_BYTES = 2 << 20  # stays in a cache, as what a socket has just received does
_TOUCH_BYTES = 16 << 20  # per thread and turn
_PIECE_BYTES = 256 << 10  # what a load hands to the checksum at a time
_STREAM_BYTES = 1 << 20  # per send and receive
_STALL_SECONDS = 30.0  # a stream within one process that stands so long is broken


@dataclass(frozen=True)
class Figure:
    """One thing measured several times, in bytes per second.

    >>> Figure("load", (3e9, 1e9, 2e9)).text()
    '2.00 GB/s (1.00 to 3.00)'
    """

    name: str
    samples: tuple[float, ...]
    note: str = ""
    """What else a reader should know: the path, the implementation."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def text(self) -> str:
        return f"{self.median / 1e9:.2f} GB/s ({min(self.samples) / 1e9:.2f} to {max(self.samples) / 1e9:.2f})"

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "gb_per_s": self.median / 1e9,
            "min_gb_per_s": min(self.samples) / 1e9,
            "max_gb_per_s": max(self.samples) / 1e9,
            "samples": len(self.samples),
            "note": self.note,
        }


def _address(memory: HostArena | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def fresh_rate(nbytes: int, threads: int) -> float:
    """Memory that the system must find and clear first, as a load's destination is; huge pages where allowed."""
    from rdmaload._core import HostArena

    arenas = []  # kept: memory given back could be had again at once
    with ThreadPoolExecutor(threads, thread_name_prefix="bench-memory") as pool:
        begin = time.perf_counter()
        for done in range(0, nbytes, ARENA_BYTES):
            arenas.append(HostArena(min(ARENA_BYTES, nbytes - done)))
        pieces = [
            (_address(arena) + done, min(_TOUCH_BYTES, arena.nbytes - done))
            for arena in arenas
            for done in range(0, arena.nbytes, _TOUCH_BYTES)
        ]
        for _ in pool.map(lambda piece: ctypes.memset(piece[0], 1, piece[1]), pieces):
            pass
        return nbytes / (time.perf_counter() - begin)


def small_page_rate(nbytes: int) -> float:
    """The same in pages of the ordinary size."""
    begin = time.perf_counter()
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        with contextlib.suppress(OSError):  # a kernel without huge pages has nothing to turn off
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        ctypes.memset(_address(memory), 1, nbytes)
        return nbytes / (time.perf_counter() - begin)


def touched_rate(nbytes: int) -> float:
    """Copying into memory that is there already, from a source that a cache holds."""
    from rdmaload._core import HostArena

    source = (ctypes.c_char * _SOURCE_BYTES)()
    arena = HostArena(min(ARENA_BYTES, nbytes))  # far above any cache, where that much was asked for
    address = _address(arena)
    ctypes.memset(address, 1, arena.nbytes)
    total = 0
    begin = time.perf_counter()
    while total < nbytes:
        for done in range(0, arena.nbytes, _SOURCE_BYTES):
            ctypes.memmove(address + done, source, min(_SOURCE_BYTES, arena.nbytes - done))
        total += arena.nbytes
    return total / (time.perf_counter() - begin)


def checksum_rate(nbytes: int) -> float:
    """CRC32C of pieces that a cache holds, on one core."""
    from rdmaload._core import crc32c

    piece = bytes(_PIECE_BYTES)
    count = max(1, nbytes // _PIECE_BYTES)
    begin = time.perf_counter()
    for _ in range(count):
        crc32c(piece)
    return count * _PIECE_BYTES / (time.perf_counter() - begin)


def device_rate(nbytes: int, device: str) -> float:
    """Copying from page-locked host memory to a GPU, as large pieces: what the bus between them gives."""
    import torch

    source = torch.empty(min(nbytes, ARENA_BYTES), dtype=torch.uint8, pin_memory=True)
    target = torch.empty(source.numel(), dtype=torch.uint8, device=device)
    target.copy_(source)
    torch.cuda.synchronize(device)
    total = 0
    begin = time.perf_counter()
    while total < nbytes:
        target.copy_(source, non_blocking=True)
        total += source.numel()
    torch.cuda.synchronize(device)
    return total / (time.perf_counter() - begin)


def stream_rate(nbytes: int, *, unix: bool) -> float:
    """What the kernel carries from one socket of this machine to another: no store in this way can be faster."""
    block = memoryview(bytearray(_STREAM_BYTES))
    target = memoryview(bytearray(_STREAM_BYTES))
    with _socket_pair(unix) as (sender, receiver):
        thread = threading.Thread(target=_send, args=(sender, block, nbytes), name="bench-stream")
        thread.start()
        try:
            left = nbytes
            begin = time.perf_counter()
            while left > 0:
                count = receiver.recv_into(target, min(left, _STREAM_BYTES))
                if count == 0:
                    raise ConnectionError("the stream to this process itself broke")
                left -= count
            seconds = time.perf_counter() - begin
        finally:
            receiver.close()  # ends the thread, whatever it waits for
            thread.join()
    return nbytes / seconds


@contextlib.contextmanager
def _socket_pair(unix: bool) -> Iterator[tuple[socket.socket, socket.socket]]:
    if unix:
        sender, receiver = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            receiver = socket.create_connection(listener.getsockname())
            sender, _ = listener.accept()
    with sender, receiver:
        sender.settimeout(_STALL_SECONDS)
        receiver.settimeout(_STALL_SECONDS)
        yield sender, receiver


def _send(sender: socket.socket, block: memoryview, nbytes: int) -> None:
    with contextlib.suppress(OSError):  # the receiver was interrupted, and says so itself
        while nbytes > 0:
            nbytes -= sender.send(block[: min(nbytes, len(block))])

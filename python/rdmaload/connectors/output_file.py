"""A new local file, written from front to back, past the page cache where that can be.

Through the cache every byte is copied once more, and `fsync` then waits for what the kernel has put off; past it
(O_DIRECT) the disk takes the bytes from where they are, and pages that others read stay in the cache. The disk wants
whole blocks from aligned memory: what is not, such as the end of a file, goes through the cache.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Literal

__all__ = ["OutputFile"]

_BLOCK_BYTES = 4096  # disks want multiples of 512 or of this

_SMALLEST_DIRECT_BYTES = 4 << 20  # as for reading: below it there is nothing to gain


class OutputFile:
    """The file `path`, which must not be there, open for `size` bytes; `file_io` as in the options.

    `ways` are those it was written in so far, "file-buffered" and "file-direct"; `refusal` says why a file that should
    be written past the page cache is not.
    """

    def __init__(self, path: Path, size: int, file_io: Literal["auto", "buffered", "direct"]) -> None:
        self.size = size
        self.written = 0
        self.ways: set[str] = set()
        self.refusal = ""
        self._direct = False
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if self._wants_direct(size, file_io):
            self._set_direct(True)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def write(self, block: memoryview) -> None:
        """All of `block`; raises OSError."""
        while block:
            part = block[: len(block) - len(block) % _BLOCK_BYTES] if self._direct else block
            if not part:  # the end of the file, or of an odd block
                if self.written + len(block) < self.size:
                    self.refusal = f"blocks are no multiples of {_BLOCK_BYTES} bytes"
                self._set_direct(False)
                continue
            try:
                count = os.write(self._descriptor, part)
            except OSError as err:
                if err.errno != errno.EINVAL or not self._direct:
                    raise
                self.refusal = "the disk does not take these bytes from where they are in memory"
                self._set_direct(False)
                continue
            self.ways.add("file-direct" if self._direct else "file-buffered")
            self.written += count
            block = block[count:]

    def sync(self) -> None:
        """Returns when the disk has everything."""
        os.fsync(self._descriptor)

    def _wants_direct(self, size: int, file_io: str) -> bool:
        if file_io != "auto":
            return file_io == "direct"
        from rdmaload import _core

        return size >= _SMALLEST_DIRECT_BYTES and _core.is_local_disk(self._descriptor)

    def _set_direct(self, direct: bool) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)
        except OSError as err:
            if not direct:
                raise
            self.refusal = f"O_DIRECT was refused: {err.strerror}"
            return
        self._direct = direct

"""What shows on stderr while a command works: a progress bar, or lines, and the package's log."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rdmaload.amounts import count_text, size_text
from rdmaload.cli.output import printable, write_error

if TYPE_CHECKING:
    from rdmaload.stats import Progress

__all__ = ["logging_to_stderr", "progress_bar"]

_DELAY_SECONDS = 0.3  # what is done sooner needs no bar
_INTERVAL_SECONDS = 0.1  # between drawings
_LINE_SECONDS = 10.0  # between lines where there is no terminal, such as the log of a container
_COLUMNS = 80  # of a terminal that does not say
_ROWS = 24  # whatever the terminal says: tqdm draws nothing where it says 0 or 1
_ORDINARY = ("read", "send", "checksum", "")  # stages that the name of the operation says already


@contextmanager
def progress_bar(args: Namespace, text: str) -> Iterator[Callable[[Progress], None] | None]:
    """A `progress` callback that draws a bar, or writes a line now and then; None when nobody would look at either."""
    if args.quiet or args.json is True:
        yield None
        return
    shown = _Bar(text) if sys.stderr.isatty() else _Lines(text)
    try:
        yield shown.show
    finally:
        shown.close()


class _Lines:
    """A plain line now and then."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._lock = threading.Lock()  # callbacks come from any thread
        self._next = time.monotonic() + _LINE_SECONDS  # guarded by _lock

    def show(self, progress: Progress) -> None:
        with self._lock:
            if time.monotonic() < self._next:
                return
            self._next = time.monotonic() + _LINE_SECONDS
        files = f"{progress.files_done} of {count_text(progress.files_total, 'file')}, "
        files = files if progress.files_total > 1 else ""
        write_error(f"{_head(self._text, progress)}%, {files}{_tail(progress)}")

    def close(self) -> None:
        """Nothing is left to take away."""


class _Bar:
    """One line of the terminal, drawn anew; gone when all is done."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._lock = threading.Lock()
        self._next = time.monotonic() + _DELAY_SECONDS  # guarded by _lock, as is the next
        self._bar: Any = None  # Any: tqdm has no types

    def show(self, progress: Progress) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._next and not (self._bar and progress.bytes_done == progress.bytes_total):
                return
            self._next = now + _INTERVAL_SECONDS
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(
                    total=1,
                    delay=_FAR,  # it is drawn from here alone
                    leave=False,
                    ncols=_COLUMNS,
                    nrows=_ROWS,
                    file=sys.stderr,
                )
            bar = self._bar
            bar.ncols = _columns(sys.stderr)
            bar.bar_format = f"{_head(self._text, progress)}% {{bar}} {_tail(progress)}"
            bar.total, bar.n = max(1, progress.bytes_total), progress.bytes_done
            bar.refresh()

    def close(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.delay = 0  # else it would leave the line as it is
                self._bar.close()


_FAR = 1e9  # seconds


def _head(text: str, progress: Progress) -> str:
    """The percentage is rounded down: 100 only at the end."""
    percent = 100 * progress.bytes_done // progress.bytes_total if progress.bytes_total else 100
    stage = "" if progress.stage in _ORDINARY or percent == 100 else f" ({progress.stage})"
    return f"{text}{stage}: {percent:3d}"


def _tail(progress: Progress) -> str:
    left = progress.seconds_left
    return (
        f"{size_text(progress.bytes_done)} of {size_text(progress.bytes_total)}, {size_text(progress.rate)}/s, "
        f"{'?' if left is None else _clock(left)} left"
    )


def _clock(seconds: float) -> str:
    """A duration to look at.

    >>> _clock(59.2), _clock(3661)
    ('1:00', '1:01:01')
    """
    whole = math.ceil(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _columns(stream: TextIO) -> int:
    """How wide the terminal is now; those of containers and scripts may say 0. The last column is left: some wrap."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except OSError:
        columns = 0
    return (columns or _COLUMNS) - 1


@contextmanager
def logging_to_stderr(*, quiet: bool, debug: bool) -> Iterator[None]:
    """Show the package's warnings (with `debug` everything) as lines like those of errors."""
    log = logging.getLogger("rdmaload")
    before = log.level, log.propagate
    handler = _StderrHandler()
    handler.setLevel(logging.DEBUG if debug else logging.ERROR if quiet else logging.WARNING)
    log.setLevel(handler.level)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before


class _StderrHandler(logging.Handler):
    """Writes above a progress bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        line = f"rdmaload: {record.levelname.lower()}: {printable(record.getMessage())}"
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if tqdm is None:
            print(line, file=sys.stderr)
        else:
            tqdm.write(line, file=sys.stderr)

"""What shows on stderr while a command works: a progress bar, and the package's log."""

from __future__ import annotations

import logging
import os
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from rdmaload.cli.output import printable

if TYPE_CHECKING:
    from rdmaload.stats import Progress

__all__ = ["logging_to_stderr", "progress_bar"]

_DELAY_SECONDS = 0.3  # what is done sooner needs no bar
_INTERVAL_SECONDS = 0.1  # between drawings
_COLUMNS = 79  # of a terminal that does not say
_FORMAT = "{desc}: {percentage:3.0f}% {bar} {n_fmt}/{total_fmt} {rate_fmt}, {remaining} left"


@contextmanager
def progress_bar(args: Namespace, text: str) -> Iterator[Callable[[Progress], None] | None]:
    """A `progress` callback that draws a bar; None when nobody would look at one."""
    if args.quiet or args.json or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    sized = _has_size(sys.stderr)
    lock = threading.Lock()  # callbacks come from any thread
    with tqdm(
        desc=text,
        unit="B",
        unit_scale=True,
        miniters=1,
        mininterval=_INTERVAL_SECONDS,
        delay=_DELAY_SECONDS,
        leave=False,
        dynamic_ncols=sized,
        ncols=None if sized else _COLUMNS,
        bar_format=_FORMAT,
        file=sys.stderr,
    ) as bar:

        def show(progress: Progress) -> None:
            with lock:
                bar.total = progress.bytes_total
                bar.update(progress.bytes_done - bar.n)

        yield show


def _has_size(stream: TextIO) -> bool:
    """Whether the terminal says how wide it is; those of containers and scripts may say 0."""
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return False


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

"""Small calls to a store, tried again while that may help: how often, with what pauses, and for how long in all.

Weights go through the native transports, which have the same rules. One object per connector; any thread may use it.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TypeVar

from rdmaload.errors import LoadTimeoutError, RdmaloadError, UnavailableError
from rdmaload.options import Options

__all__ = ["Refused", "Retries", "retry_after_seconds"]

_Result = TypeVar("_Result")

_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 5.0
_LONGEST_RETRY_AFTER_SECONDS = 30.0  # as the native transport


class Refused(Exception):
    """For `Retries.tried`: the store is there and busy, which is `error`, and asks for a pause of so many seconds."""

    def __init__(self, error: RdmaloadError, seconds: float) -> None:
        super().__init__(str(error))
        self.error = error
        self.seconds = seconds


class Retries:
    """What one connector's small calls have in common.

    >>> Retries(Options()).tried(lambda: 1 + 1)
    2
    """

    def __init__(
        self, options: Options, *, count: Callable[[], None] = lambda: None, attempts: int | None = None
    ) -> None:
        """`count` is told of each call that is sent again; `attempts` for what tries again by itself below us."""
        self._options = options
        self._count = count
        self._attempts = attempts
        self._closing = threading.Event()
        self.has_answered = False
        """Whether the store is known to be there: a wrong address need not be asked for a minute."""

    @property
    def closed(self) -> bool:
        return self._closing.is_set()

    def close(self) -> None:
        """End all pauses: what waits in one fails with what it failed with before. Idempotent."""
        self._closing.set()

    def tried(self, work: Callable[[], _Result]) -> _Result:
        """`work`, again while the store is away or says that it is busy, for `retry_timeout` at most."""
        begin = time.monotonic()
        for attempt in itertools.count(1):
            try:
                result = work()
                self.has_answered = True
                return result
            except Refused as refused:
                self.has_answered = True
                error, pause = refused.error, refused.seconds
            except (UnavailableError, LoadTimeoutError) as err:
                error, pause = err, 0.0
            usual = min(_FIRST_PAUSE_SECONDS * 2 ** min(attempt - 1, 20), _LONGEST_PAUSE_SECONDS)
            pause = max(pause, usual * random.uniform(0.5, 1))
            limit = self._options.retry_timeout
            limit = limit if self.has_answered else min(limit, self._options.connect_timeout)
            over = attempt == self._attempts or time.monotonic() + pause - begin > limit
            if over or self._closing.wait(pause):
                raise error from error.__cause__
            self._count()
        raise AssertionError("unreachable")


def retry_after_seconds(text: str) -> float:
    """How long a `Retry-After` header asks to wait, in seconds or until a date; 0 where it says nothing of the kind."""
    if text.isascii() and text.isdecimal():
        seconds = float(text)
    else:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):  # neither of its two forms
            return 0.0
    return min(max(0.0, seconds), _LONGEST_RETRY_AFTER_SECONDS)

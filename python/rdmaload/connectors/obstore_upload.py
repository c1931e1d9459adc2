"""A file on its way in parts through obstore, which takes them in their order, whatever thread they come from."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator

__all__ = ["ObstoreUpload"]


class ObstoreUpload:
    """A file on its way in parts, which obstore takes in their order from a thread that waits for them.

    A part that comes early waits for those before it; they are begun in their order, so that somebody has the next.
    """

    resume_token = ""  # obstore keeps uploads to itself

    def __init__(self, put: Callable[[Iterator[bytes], int], str]) -> None:
        self._put = put
        self._turn = threading.Condition()
        self._next = 1  # Guarded by _turn, as are the next two.
        self._aborted = False
        self._failure: BaseException | None = None
        self._parts: queue.Queue[bytes | None] = queue.Queue(maxsize=1)
        self._thread: threading.Thread | None = None
        self._etag = ""

    def send(self, number: int, data: bytes | bytearray) -> bool:
        with self._turn:
            self._turn.wait_for(lambda: self._next == number or self._aborted or self._failure is not None)
            if self._aborted:  # the reason is told by whom it happened to
                return True
            if self._thread is None and self._failure is None:
                self._thread = threading.Thread(target=self._run, args=(len(data),), name="rdmaload-upload")
                self._thread.start()
        self._give(bytes(data))
        with self._turn:
            self._next += 1
            self._turn.notify_all()
        return True

    def finish(self) -> str:
        self._give(None)
        if self._thread is None:
            raise ValueError("an upload without parts")
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._etag

    def interrupt(self) -> None:
        with self._turn:
            self._aborted = True
            self._turn.notify_all()

    def abort(self) -> None:
        self.interrupt()
        if self._thread is not None:
            self._thread.join()

    def _give(self, part: bytes | None) -> None:
        while True:
            with self._turn:
                if self._failure is not None:
                    raise self._failure
                if self._aborted:
                    return
            with contextlib.suppress(queue.Full):
                self._parts.put(part, timeout=0.1)
                return

    def _taken(self) -> Iterator[bytes]:
        while True:
            try:
                part = self._parts.get(timeout=0.1)
            except queue.Empty:
                if self._aborted:
                    raise ConnectionAbortedError("the upload was aborted") from None
                continue
            if part is None:
                return
            yield part

    def _run(self, part_bytes: int) -> None:
        try:
            self._etag = self._put(self._taken(), part_bytes)
        except BaseException as failure:  # raised where the parts come from
            with self._turn:
                self._failure = failure
                self._turn.notify_all()

"""Run one function in several threads until the first error; an interrupt ends the caller's wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

__all__ = ["map_in_threads", "run_in_threads"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# How often the caller's thread looks around meanwhile; often enough for a progress bar.
_TICK_SECONDS = 0.1


def run_in_threads(
    work: Callable[[threading.Event], None],
    count: int,
    *,
    tick: Callable[[], None] | None = None,
    interrupt: Callable[[], None] | None = None,
    name: str = "rdmaload",
) -> None:
    """Call `work(stop)` in `count` threads and wait for all of them.

    `work` returns soon after `stop` is set. The first error of any thread, an error of `tick`
    (called in the caller's thread about ten times a second) or a KeyboardInterrupt stops the
    others; it is raised after the last thread has ended. In the latter two cases `interrupt` is
    called once before the wait: it makes what the threads are blocked in fail soon.
    """
    stop = threading.Event()
    # Nobody works before all threads are known: one whose start() was interrupted cannot be joined,
    # and must have done nothing.
    go = threading.Event()
    finished = threading.Event()
    lock = threading.Lock()
    errors: list[BaseException] = []
    running = count

    def body() -> None:
        nonlocal running
        try:
            go.wait()
            if not stop.is_set():
                work(stop)
        except BaseException as err:
            with lock:
                errors.append(err)
            stop.set()
        finally:
            with lock:
                running -= 1
                if running == 0:
                    finished.set()

    threads = [threading.Thread(target=body, name=f"{name}-{number}", daemon=True) for number in range(count)]
    try:
        for thread in threads:
            thread.start()
        go.set()
        while not finished.wait(_TICK_SECONDS):
            if tick is not None:
                tick()
    except BaseException:
        stop.set()
        if interrupt is not None:
            interrupt()
        raise
    finally:
        stop.set()
        go.set()
        for thread in threads:
            if thread.is_alive():
                thread.join()
    if errors:
        raise errors[0]


def map_in_threads(
    work: Callable[[_Item], _Result], items: Iterable[_Item], threads: int, *, name: str = "rdmaload"
) -> list[_Result]:
    """`work` of every item, in order, by at most so many threads: small requests to a store.

    The first error is raised when what had begun has ended. A KeyboardInterrupt is raised at once: a request that the
    store does not answer would hold the caller until its time-outs. What had begun goes on in daemon threads, which
    hold up no process that ends; closing the connector ends its retries.
    """
    waiting = list(enumerate(items))
    waiting.reverse()  # so that pop() takes the first
    results: dict[int, _Result] = {}
    errors: list[BaseException] = []
    lock = threading.Lock()
    running = min(max(1, threads), len(waiting))
    finished = threading.Event()

    def body() -> None:
        nonlocal running
        try:
            while True:
                with lock:
                    if not waiting:
                        return
                    number, item = waiting.pop()
                result = work(item)
                with lock:
                    results[number] = result
        except BaseException as err:
            with lock:
                errors.append(err)
                waiting.clear()
        finally:
            with lock:
                running -= 1
                if running == 0:
                    finished.set()

    count = len(waiting)
    try:
        for thread in [
            threading.Thread(target=body, name=f"{name}-{number}", daemon=True) for number in range(running)
        ]:
            thread.start()
        if count:
            finished.wait()
    except BaseException:
        with lock:
            waiting.clear()
        raise
    if errors:
        raise errors[0]
    return [results[number] for number in range(count)]

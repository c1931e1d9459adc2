"""Run one function in several threads until the first error, and leave none behind."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["run_in_threads"]

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

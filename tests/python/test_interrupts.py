"""Ctrl-C while a store does not answer the small requests that open a model: the process ends, it waits for nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from rdmaload.threads import map_in_threads
from tests.support.checkpoints import Checkpoint
from tests.support.s3 import HttpObjects, Reply, Request, s3_url

LOAD = """
import signal, sys, rdmaload
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started us may ignore it
try:
    rdmaload.load(sys.argv[1], inactivity_timeout=600, retry_timeout=600)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


@pytest.mark.parametrize(("scheme", "method"), [("s3", "GET"), ("s3", "HEAD"), ("http", "GET"), ("http", "HEAD")])
def test_control_c_ends_a_process_whose_store_says_nothing(
    tiny_checkpoint: Checkpoint, scheme: str, method: str
) -> None:
    asked = threading.Event()

    def answer(request: Request, honest: Reply) -> Reply:
        if request.method == method and request.path.endswith(".safetensors") and honest.status < 400:
            asked.set()
            honest.cut, honest.then = 0, "stall"
        return honest

    objects = {f"/bucket/m/{path.name}": path.read_bytes() for path in tiny_checkpoint.directory.iterdir()}
    with HttpObjects(objects, answer) as server:
        url = s3_url(server.endpoint, "bucket", "m") if scheme == "s3" else f"{server.endpoint}/bucket/m"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(
            [sys.executable, "-c", LOAD, url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            assert asked.wait(60)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)  # while the server goes on saying nothing
            assert (output, process.returncode) == ("interrupted\n", 130), errors
        finally:
            process.kill()
            process.communicate()


def test_results_are_in_the_order_of_the_items_whatever_thread_ends_first() -> None:
    second = threading.Event()

    def work(number: int) -> int:
        if number == 0:
            assert second.wait(30)
        second.set()
        return -number

    assert map_in_threads(work, range(5), 2) == [0, -1, -2, -3, -4]
    assert map_in_threads(work, [], 2) == []


def test_the_first_error_begins_nothing_more() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        if number == 2:
            raise ValueError("two")
        done.append(number)

    with pytest.raises(ValueError, match="two"):
        map_in_threads(work, range(100), 1)
    assert done == [0, 1]

"""The command line as a process: what it imports, signals, pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rdmaload
from tests.support.checkpoints import Checkpoint
from tests.support.fault_proxy import FaultProxy
from tests.support.faults import Stall
from tests.support.servers import RedisServer

COMMAND = [sys.executable, "-m", "rdmaload"]
SECONDS = 60.0  # for anything that a command does here; a busy machine takes some to import torch


@pytest.fixture
def environment() -> dict[str, str]:
    """Finds the same package as this process."""
    package = Path(rdmaload.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": str(package)}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


@pytest.mark.parametrize(
    "argument", ["--help", "--version", "save --help", "bench --help", "doctor --help", "help load"]
)
def test_help_and_version_import_nothing_heavy(argument: str, environment: dict[str, str]) -> None:
    code = (
        "import sys\n"
        "from rdmaload.cli import main\n"
        f"code = main({argument.split()!r})\n"
        "heavy = {'torch', 'redis', 'boto3', 'tqdm', 'numpy', 'rdmaload._core'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ("examples:" in done.stdout) is ("help" in argument)
    assert (f"rdmaload {rdmaload.__version__}\n" == done.stdout) is (argument == "--version")


def test_a_round_trip_by_processes(redis_url: str, tiny_checkpoint: Checkpoint, environment: dict[str, str]) -> None:
    directory = str(tiny_checkpoint.directory)
    done = run(environment, "save", directory, redis_url)
    assert (done.returncode, done.stderr) == (0, "")
    done = run(environment, "load", redis_url, "--against", directory, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["compared_bytes"] == tiny_checkpoint.bytes
    done = run(environment, "rm", redis_url)
    assert done.returncode == 2
    done = run(environment, "rm", redis_url, "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    done = run(environment, "load", redis_url)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("\n") == 1


def test_an_interrupted_load_ends_at_once_with_130(
    redis_url: str,
    redis_server: RedisServer,
    tiny_checkpoint: Checkpoint,
    environment: dict[str, str],
) -> None:
    rdmaload.save(tiny_checkpoint.directory, redis_url)
    model = redis_url.rpartition("/")[2]
    with FaultProxy(redis_server.host, redis_server.port, Stall(after=500_000)) as proxy:
        process = subprocess.Popen(
            [*COMMAND, "load", proxy.url(model)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            try:
                assert proxy.wait_for_fault(SECONDS)
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=SECONDS)
            finally:
                process.kill()
    assert (process.returncode, out, err) == (130, "", "rdmaload: interrupted\n")


def test_a_reader_that_has_had_enough_is_no_traceback(tmp_path: Path, environment: dict[str, str]) -> None:
    for number in range(5000):  # more than a pipe holds
        (tmp_path / f"a-file-with-quite-a-long-name-{number}").touch()
    process = subprocess.Popen(
        [*COMMAND, "ls", str(tmp_path)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1

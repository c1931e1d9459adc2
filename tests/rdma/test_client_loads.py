"""Loads over real verbs from our own server: bytes, copies, what is said of the way, and ways that end."""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import rdmaload
from rdmaload.cli import main
from rdmaload.errors import RdmaloadError, UnavailableError
from rdmaload.stats import LoadStats, Progress
from tests.support.checkpoints import compare, llama_like, make_checkpoint
from tests.support.servers import RedisServer
from tests.support.weight_server import WeightServer

SLOW = {"connect_timeout": 100.0, "inactivity_timeout": 120.0}


def serving(address: str, **arguments: object) -> WeightServer:
    args = ["--host", "0.0.0.0", "--rdma-bind", address, "--insecure"]
    return WeightServer(args=args, **arguments)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    llama_like(directory, 24e6, files=2, seed=5)
    return directory


@pytest.fixture(scope="module")
def server(rdma_address: str, checkpoint: Path) -> Iterator[WeightServer]:
    with serving(rdma_address) as running:
        rdmaload.save(checkpoint, running.url("m"))
        yield running


def limit_locked_memory(limit: int) -> None:
    """What is executed next may lock no more, root or not."""
    cap_ipc_lock, pr_capbset_drop = 14, 24
    if ctypes.CDLL(None).prctl(pr_capbset_drop, cap_ipc_lock, 0, 0, 0) != 0:
        raise OSError("prctl")
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))


def url_of(server: WeightServer, address: str, model: str = "m", query: str = "") -> str:
    return f"rdma://{address}:{server.port}/{model}{query}"


def test_a_load_is_byte_equal_and_copies_nothing(
    server: WeightServer, rdma_address: str, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stats = LoadStats()
    with caplog.at_level(logging.INFO, "rdmaload"):
        state = rdmaload.load(url_of(server, rdma_address, query="?fallback=never"), stats=stats, **SLOW)
    compare(state, checkpoint)
    assert stats.path == "resp-rdma"
    assert stats.fallback_reason is None
    assert stats.copied_bytes == 0
    assert stats.verified_bytes == stats.read_bytes >= stats.bytes
    assert stats.retries == 0
    said = [record.getMessage() for record in caplog.records if "RDMALOAD.READ over rxe0" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize("connections", [1, 3])
def test_iterating_and_filling_work(
    server: WeightServer, rdma_address: str, checkpoint: Path, connections: int
) -> None:
    url = url_of(server, rdma_address, query=f"?fallback=never&connections={connections}")
    whole = dict(rdmaload.weight_iterator(url, window_bytes=4 * 2**20, **SLOW))
    compare(whole, checkpoint)
    target = {name: tensor.clone().zero_() for name, tensor in whole.items()}
    stats = rdmaload.load_into(target, url, **SLOW)
    compare(target, checkpoint)
    assert stats.path == "resp-rdma"


@pytest.mark.parametrize("chunk_bytes", [1, 4095, 1_044_480, 64 * 2**20])
def test_values_from_a_byte_to_64_mebibytes(
    server: WeightServer, rdma_address: str, tmp_path: Path, chunk_bytes: int
) -> None:
    elements = {1: 40, 4095: 50_000, 1_044_480: 2_000_000, 64 * 2**20: 40_000_000}[chunk_bytes]
    make_checkpoint(tmp_path, {"a": ("BF16", (elements,)), "b": ("U8", (7,)), "c": ("F32", (33, 5))}, seed=1)
    name = f"v{chunk_bytes}"
    rdmaload.save(tmp_path, server.url(name), chunk_bytes=chunk_bytes)
    stats = LoadStats()
    url = url_of(server, rdma_address, name, "?fallback=never")
    compare(rdmaload.load(url, stats=stats, **SLOW), tmp_path)
    assert stats.path == "resp-rdma"
    with rdmaload.open(server.url(name)) as model:  # room for the next
        assert model.generation
    main(["rm", "--yes", server.url(name)])


def test_two_clients_at_once(server: WeightServer, rdma_address: str, checkpoint: Path) -> None:
    code = (
        "import sys, rdmaload; from tests.support.checkpoints import compare; s = rdmaload.LoadStats();"
        f"compare(rdmaload.load(sys.argv[1], stats=s, **{SLOW!r}), sys.argv[2]); assert s.path == 'resp-rdma', s"
    )
    arguments = [sys.executable, "-c", code, url_of(server, rdma_address, query="?fallback=never"), str(checkpoint)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["python", *sys.path])}
    clients = [subprocess.Popen(arguments, env=environment) for _ in range(2)]
    assert [client.wait(timeout=300) for client in clients] == [0, 0]


def test_a_low_limit_of_locked_memory_stages_or_takes_tcp_and_says_so(
    server: WeightServer, rdma_address: str, checkpoint: Path
) -> None:
    # A root with CAP_IPC_LOCK is above the limit: the client is run without it.
    code = (
        "import sys, rdmaload; from tests.support.checkpoints import compare; s = rdmaload.LoadStats();"
        f"compare(rdmaload.load(sys.argv[1], stats=s, **{SLOW!r}), sys.argv[2]);"
        "print(s.path); print(s.fallback_reason); print(s.copied_bytes)"
    )
    seen = {}
    for limit in (16 * 2**20, 64 * 2**10):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                code,
                url_of(server, rdma_address, query="?connections=1"),
                str(checkpoint),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(["python", *sys.path])},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            preexec_fn=functools.partial(limit_locked_memory, limit),
        )
        assert done.returncode == 0, done.stderr
        seen[limit] = done.stdout.splitlines()
    path, reason, copied = seen[16 * 2**20]
    assert path == "resp-rdma"
    assert "staged in host memory" in reason
    assert "memlock" in reason.lower() or "locked memory" in reason
    assert int(copied) > 0
    path, reason, copied = seen[64 * 2**10]
    assert path == "resp-tcp"
    assert "no RDMA" in reason
    assert "locked memory" in reason or "memlock" in reason.lower()
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY


def test_a_tcp_port_without_rdma_behind_it_is_read_over_tcp(rdma_address: str, checkpoint: Path) -> None:
    with RedisServer(host=rdma_address, args=["--protected-mode", "no"]) as plain:
        rdmaload.save(checkpoint, plain.url("m"))
        stats = LoadStats()
        url = f"rdma://{rdma_address}:{plain.port}/m"
        compare(rdmaload.load(url, stats=stats, **SLOW), checkpoint)
        assert stats.path == "resp-tcp"
        assert stats.fallback_reason is not None
        assert stats.fallback_reason.startswith("no RDMA: ")
        assert stats.retries == 0
        with pytest.raises(UnavailableError):
            rdmaload.load(url, fallback="never", retry_timeout=0.5, **SLOW)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_ends_mid_load_is_an_error_soon(rdma_address: str, checkpoint: Path, end: int) -> None:
    with serving(rdma_address) as doomed:
        rdmaload.save(checkpoint, doomed.url("m"))
        once = threading.Event()

        def ended(progress: Progress) -> None:
            if progress.bytes_done and not once.is_set():
                once.set()
                doomed.process.send_signal(end)
                doomed.process.wait()

        url = url_of(doomed, rdma_address, query="?connections=2&window_bytes=1MiB")
        with pytest.raises(RdmaloadError) as caught:
            for _ in rdmaload.weight_iterator(
                url, progress=ended, connect_timeout=100.0, inactivity_timeout=10.0, retry_timeout=1.0
            ):
                pass
        assert once.is_set()
        assert isinstance(caught.value, (UnavailableError, rdmaload.LoadTimeoutError))


def test_doctor_finds_the_way(server: WeightServer, rdma_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["doctor", url_of(server, rdma_address, query="?fallback=never&connect_timeout=100"), "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert re.match(r"RDMALOAD\.READ over rxe0", checks["rdma connection"]["value"])
    assert checks["rdma port"]["status"] == "ok"


def test_a_card_may_be_named(server: WeightServer, rdma_address: str, checkpoint: Path) -> None:
    compare(rdmaload.load(url_of(server, rdma_address, query="?fallback=never&device=rxe0"), **SLOW), checkpoint)
    stats = LoadStats()
    compare(rdmaload.load(url_of(server, rdma_address, query="?device=rxe7"), stats=stats, **SLOW), checkpoint)
    assert stats.path == "resp-tcp"
    assert "rxe7" in (stats.fallback_reason or "")

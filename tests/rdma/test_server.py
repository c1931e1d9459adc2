"""`rdmaload serve --rdma-bind` as users run it: a process, loaded from over real verbs.

What is asserted of speed is what costs time: copies, work requests, round trips.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import rdmaload
from rdmaload.cli import main
from rdmaload.errors import AuthenticationError, LoadTimeoutError, UnavailableError
from tests.support.weight_server import WeightServer

CHUNK_BYTES = 2**20 - 4096
PATIENCE_SECONDS = 120.0  # the guest has one slow CPU


def tensors(seed: int, count: int = 6, nbytes: int = 2**20 + 17) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layer.{i}": torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator) for i in range(count)
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def numbers(server: WeightServer) -> dict[str, int]:
    """What the server counts, by INFO over TCP."""
    with server.client() as client:
        info = client.info("everything")
    return {name: value for name, value in info.items() if isinstance(value, int)}


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def server(rdma_address: str) -> Iterator[WeightServer]:
    with WeightServer(max_memory=2**29, rdma=rdma_address) as server:
        yield server


def test_a_model_is_written_into_place_without_a_copy(server: WeightServer) -> None:
    saved = tensors(1)
    rdmaload.save(saved, server.url("placed"))
    before = numbers(server)
    stats = rdmaload.LoadStats()
    loaded = rdmaload.load(server.rdma_url("placed"), stats=stats)
    after = numbers(server)
    assert same(loaded, saved)
    assert stats.path == "resp-rdma"
    assert stats.copied_bytes == 0
    assert stats.unverified_bytes == 0
    nbytes = sum(tensor.nbytes for tensor in saved.values())
    # All but the last chunk, when that is small, and what a connection begins with.
    assert after["rdma_direct_bytes"] - before["rdma_direct_bytes"] > nbytes - 2**15
    assert after["rdma_copied_bytes"] - before["rdma_copied_bytes"] < 2**16
    # Each chunk is one request and one reply; a tensor's edge in a chunk costs another write.
    chunks = nbytes // CHUNK_BYTES + 1
    assert after["rdma_reads"] - before["rdma_reads"] <= chunks + 8
    assert after["rdma_work_requests"] - before["rdma_work_requests"] <= 2 * chunks + len(saved) + 100


def test_an_exported_directory_is_copied_once_by_the_server_and_not_by_the_client(
    rdma_address: str, tmp_path: Path
) -> None:
    saved = tensors(2)
    (tmp_path / "models" / "exported").mkdir(parents=True)
    save_file(saved, tmp_path / "models" / "exported" / "model.safetensors")
    with WeightServer(rdma=rdma_address, models=tmp_path / "models", cache=tmp_path / "cache") as server:
        stats = rdmaload.LoadStats()
        assert same(rdmaload.load(server.rdma_url("exported"), stats=stats), saved)
        assert (stats.path, stats.copied_bytes) == ("resp-rdma", 0)
        assert numbers(server)["rdma_copied_bytes"] >= sum(tensor.nbytes for tensor in saved.values())


def test_what_replaced_a_model_is_what_is_loaded(server: WeightServer) -> None:
    for seed in range(3, 6):
        saved = tensors(seed, count=3)
        rdmaload.save(saved, server.url("replaced"))
        assert same(rdmaload.load(server.rdma_url("replaced")), saved)
        rdmaload.prune(server.url("replaced"), force=True)
    assert same(rdmaload.load(server.rdma_url("replaced")), saved)


def test_clients_at_once_get_their_own(server: WeightServer) -> None:
    models = {f"own{i}": tensors(10 + i, count=4) for i in range(3)}
    for name, saved in models.items():
        rdmaload.save(saved, server.url(name))
    failures: list[str] = []

    def load(name: str) -> None:
        for _ in range(3):
            if not same(rdmaload.load(server.rdma_url(name)), models[name]):
                failures.append(name)

    threads = [threading.Thread(target=load, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert eventually(lambda: numbers(server)["rdma_connected_clients"] == 0)


def test_a_client_that_is_killed_leaves_nothing_behind(server: WeightServer) -> None:
    saved = tensors(20)
    rdmaload.save(saved, server.url("killed"))
    url = server.rdma_url("killed")
    script = f"import rdmaload\nwhile True:\n    rdmaload.load({url!r})\n    print('loaded', flush=True)"
    for _ in range(2):
        before = numbers(server)
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "loaded\n"
            assert eventually(lambda: numbers(server)["rdma_connected_clients"] >= 1)
            client.kill()
        assert eventually(lambda: numbers(server)["rdma_connected_clients"] == 0)
        assert numbers(server)["values"] == before["values"]
    assert same(rdmaload.load(server.rdma_url("killed")), saved)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_ends_is_noticed(rdma_address: str, number: int) -> None:
    with WeightServer(max_memory=2**28, rdma=rdma_address) as server:
        rdmaload.save(tensors(21), server.url("ended"))
        with rdmaload.open(server.rdma_url("ended", retry_timeout=1)) as model:
            model.load()
            assert server.end(number) == (0 if number == signal.SIGTERM else -number)
            with pytest.raises((UnavailableError, LoadTimeoutError)):
                model.load()


def test_a_server_that_may_lock_little_copies_and_says_why(rdma_address: str) -> None:
    # Root may lock without limit, unless it may not.
    wrapper = ["prlimit", f"--memlock={6 * 2**20}", "setpriv", "--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock"]
    saved = tensors(22, count=3)
    with WeightServer(max_memory=2**28, rdma=rdma_address, wrapper=wrapper) as server:
        rdmaload.save(saved, server.url("locked"))
        assert same(rdmaload.load(server.rdma_url("locked", connections=1)), saved)
        counted = numbers(server)
        assert counted["rdma_direct_bytes"] == 0
        assert counted["rdma_copied_bytes"] >= sum(tensor.nbytes for tensor in saved.values())
        assert eventually(lambda: "values are copied before they are sent over RDMA" in server.errors())
        assert "may lock 6144 KiB" in server.errors()


def test_a_password_is_asked_for_over_rdma_too(rdma_address: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("swordfish")
    saved = tensors(23, count=1)
    with WeightServer(rdma=rdma_address, password_file=secret, password="swordfish") as server:
        rdmaload.save(saved, server.url("secret"))
        assert same(rdmaload.load(server.rdma_url("secret")), saved)
        server.password = "wrong"
        with pytest.raises(AuthenticationError):
            rdmaload.load(server.rdma_url("secret"))


def test_an_address_without_a_card_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", "--rdma-bind", "10.99.0.1", "--insecure"]) == 6
    assert "10.99.0.1" in capsys.readouterr().err


def test_a_tcp_port_without_rdma_behind_it_refuses(rdma_address: str) -> None:
    with WeightServer(args=["--host", rdma_address, "--insecure"]) as server:
        rdmaload.save(tensors(24, count=1), f"redis://{rdma_address}:{server.port}/plain")
        with pytest.raises(UnavailableError):
            rdmaload.load(f"rdma://{rdma_address}:{server.port}/plain?fallback=never&retry_timeout=1")
        stats = rdmaload.LoadStats()
        rdmaload.load(f"rdma://{rdma_address}:{server.port}/plain", stats=stats)
        assert stats.path == "resp-tcp"
        assert stats.fallback_reason

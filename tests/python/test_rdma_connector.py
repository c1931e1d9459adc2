"""rdma:// urls where there is no RDMA: their options, the way that is taken instead, and what is said of it."""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import rdmaload
from rdmaload import _core, devices
from rdmaload.cli import main
from rdmaload.cli.rdma_checks import rdma_checks
from rdmaload.connectors import connector_for
from rdmaload.connectors.rdma import RdmaConnector
from rdmaload.errors import NotSupportedError, UnavailableError, UrlError
from rdmaload.stats import LoadStats
from tests.support.checkpoints import compare, llama_like
from tests.support.fake_gpu import FakeGpu
from tests.support.servers import RedisServer

pytestmark = pytest.mark.skipif(
    os.path.isdir("/sys/class/infiniband") and bool(os.listdir("/sys/class/infiniband")),
    reason="this machine has RDMA cards, where tests/rdma/test_client_*.py apply",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RedisServer, Path]]:
    directory = tmp_path_factory.mktemp("model")
    llama_like(directory, 4e6, files=2, seed=3)
    with RedisServer() as server:
        rdmaload.save(directory, f"rdma://127.0.0.1:{server.port}/m")
        yield server, directory


def open_rdma(url: str, **options: object) -> RdmaConnector:
    connector = connector_for(url, **options)
    assert isinstance(connector, RdmaConnector)
    return connector


def test_the_url_says_where_and_over_which_card() -> None:
    with open_rdma("rdma://h:7000/m?tcp_port=7001&fallback=never&device=mlx5_1") as connector:
        assert connector.rdma_address == ("h", 7000)
        assert connector._port == 7001
        assert (connector.options.fallback, connector.card) == ("never", "mlx5_1")
    with open_rdma("rdma://h/m", tcp_port=7001) as connector:
        assert connector.rdma_address == ("h", 6379)
        assert (connector._port, connector.options.fallback, connector.card) == (7001, "auto", "")
    with open_rdma("rdma://h:7000/m") as connector:
        assert connector._port == 7000  # one number for both, as servers have it unless told otherwise


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("tcp_port=0", "1 to 65535"),
        ("tcp_port=x", "tcp_port"),
        ("fallback=maybe", "auto, never"),
        ("device=mlx5%2F0", "names an RDMA card"),
        ("devise=mlx5_0", "unknown option devise"),
    ],
)
def test_wrong_options_are_refused_by_name(query: str, words: str) -> None:
    with pytest.raises(UrlError, match=words):
        connector_for(f"rdma://h/m?{query}")


def test_what_rdma_alone_understands_is_refused_elsewhere() -> None:
    with pytest.raises(UrlError, match="unknown option device"):
        connector_for("redis://h/m?device=mlx5_0")


def test_a_load_goes_over_tcp_with_the_reason_logged_once(
    saved: tuple[RedisServer, Path], caplog: pytest.LogCaptureFixture
) -> None:
    server, directory = saved
    stats = LoadStats()
    with caplog.at_level(logging.INFO, "rdmaload"), rdmaload.open(f"rdma://127.0.0.1:{server.port}/m") as model:
        compare(model.load(stats=stats), directory)
        compare(model.load(stats=stats), directory)
    assert stats.path == "resp-tcp"
    assert stats.copied_bytes == 0
    assert stats.retries == 0  # nothing was tried in vain
    assert stats.fallback_reason is not None
    assert stats.fallback_reason.startswith("no RDMA: ")
    told = [record for record in caplog.records if "no RDMA: " in record.getMessage()]
    assert len(told) == 1
    assert told[0].levelno == logging.WARNING


def test_tcp_may_be_on_another_port(saved: tuple[RedisServer, Path]) -> None:
    server, directory = saved
    compare(rdmaload.load(f"rdma://127.0.0.1:1/m?tcp_port={server.port}"), directory)


def test_every_way_to_load_works(saved: tuple[RedisServer, Path]) -> None:
    server, directory = saved
    url = f"rdma://127.0.0.1:{server.port}/m"
    whole = rdmaload.load(url)
    compare(dict(rdmaload.weight_iterator(url, window_bytes=2**20)), directory)
    target = {name: tensor.clone().zero_() for name, tensor in whole.items()}
    stats = rdmaload.load_into(target, url)
    compare(target, directory)
    assert stats.path == "resp-tcp"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    fake = FakeGpu()
    monkeypatch.setattr(devices, "allocator", lambda: fake)
    yield fake
    gc.collect()
    _core.release_pinned_memory()
    fake.close()


def test_a_load_into_a_gpu_goes_over_tcp_and_says_why(saved: tuple[RedisServer, Path], gpu: FakeGpu) -> None:
    server, directory = saved
    url = f"rdma://127.0.0.1:{server.port}/m"
    stats = LoadStats()
    state = rdmaload.load(url, device="cuda:0", stats=stats)
    compare({name: gpu.seen(tensor) for name, tensor in state.items()}, directory)
    assert stats.path == "resp-tcp+staged-gpu"
    assert stats.fallback_reason is not None
    assert stats.fallback_reason.startswith("no RDMA: ")
    assert "page-locked" not in stats.fallback_reason  # that follows from it
    assert stats.retries == 0
    filled = {name: gpu.empty(tensor.shape, tensor.dtype, 1) for name, tensor in state.items()}
    stats = rdmaload.load_into(filled, url)
    compare({name: gpu.seen(tensor) for name, tensor in filled.items()}, directory)
    assert stats.path == "resp-tcp+staged-gpu"
    with pytest.raises((NotSupportedError, UnavailableError), match=r"RDMA|rdma|ibverbs|device|card"):
        rdmaload.load(url, device="cuda:0", fallback="never", retry_timeout=0.1)


def test_a_gpu_that_cannot_order_a_cards_writes_is_filled_otherwise(
    saved: tuple[RedisServer, Path], gpu: FakeGpu
) -> None:
    server, directory = saved
    gpu.set_attribute(117, 0)  # no way to flush
    state = rdmaload.load(f"rdma://127.0.0.1:{server.port}/m", device="cuda:0")
    compare({name: gpu.seen(tensor) for name, tensor in state.items()}, directory)


def test_doctor_shows_which_card_is_near_which_gpu(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> None:
    asked: list[str] = []

    def by_distance(address: str) -> list[tuple[str, str, int]]:
        asked.append(address)
        return [("mlx5_2", "below one PCI root", 2), ("mlx5_0", "perhaps across CPU sockets", 9)]

    monkeypatch.setattr(_core, "rdma_cards_by_distance", by_distance)
    with open_rdma("rdma://127.0.0.1:1/m") as connector:
        shown = {check.name: check.value for check in rdma_checks(connector)}
    assert asked == ["0000:00:00.0"] * 2  # as the fake driver has it
    assert shown["rdma cards near cuda:1"].startswith("mlx5_2 (below one PCI root, 2 hops), mlx5_0")


def test_never_falling_back_is_an_error_that_says_what_is_missing(saved: tuple[RedisServer, Path]) -> None:
    server, _ = saved
    with pytest.raises((NotSupportedError, UnavailableError), match=r"RDMA|rdma|ibverbs|device|card"):
        rdmaload.load(f"rdma://127.0.0.1:{server.port}/m?fallback=never&retry_timeout=0.1")


def test_doctor_says_what_stands_in_the_way(
    saved: tuple[RedisServer, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    server, _ = saved
    main(["doctor", f"rdma://127.0.0.1:{server.port}/m", "--json"])
    document = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in document["checks"]}
    assert checks["rdma connection"]["status"] == "warn"
    assert "TCP" in checks["rdma connection"]["advice"]
    failed = [check for name, check in checks.items() if name.startswith("rdma ") and check["status"] == "warn"]
    assert len(failed) > 1
    assert all(check["advice"] for check in failed)
    assert checks["model"]["status"] == "ok"  # found over TCP
    assert main(["doctor", f"rdma://127.0.0.1:{server.port}/m?fallback=never"]) == 1

"""Metrics: what was done is counted, as text that Prometheus reads and in prometheus_client, by process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import rdmaload
from rdmaload import _core, metrics
from rdmaload.cli.metrics_page import _HELP, server_text
from rdmaload.connectors.memory import forget_store
from rdmaload.errors import IntegrityError, NotFoundError, NotSupportedError
from rdmaload.stats import LoadStats
from tests.support.checkpoints import Checkpoint, make_checkpoint
from tests.support.weight_server import WeightServer


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of this test alone, in no registry."""
    counts = metrics._Counts()
    counts.settled = True
    monkeypatch.setattr(metrics, "_counts", counts)


@pytest.fixture
def memory_url(request: pytest.FixtureRequest) -> Iterator[str]:
    store = re.sub("[^a-z]+", "-", request.node.name)
    yield f"memory://{store}/m"
    forget_store(store)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return make_checkpoint(tmp_path / "m", {f"t{i:02}": ("U8", [10_000]) for i in range(12)}, files=3)


LABELS = ("operation", "path", "outcome", "stage", "error", "reason")


def read(text: str) -> dict[str, float]:
    """Every sample by its name and labels."""
    families: list[Metric] = list(text_string_to_metric_families(text))
    return {
        " ".join([sample.name, *(sample.labels[name] for name in LABELS if name in sample.labels)]): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_a_load_a_save_and_an_iteration_given_up(checkpoint: Checkpoint, memory_url: str) -> None:
    rdmaload.save(checkpoint.directory, memory_url, chunk_bytes=5000)
    stats = LoadStats()
    with rdmaload.open(memory_url) as model:
        model.load(stats=stats)
        model.load(stats=stats)  # the same object again: what it said before is not counted twice
        tensors = model.weight_iterator()
        assert read(metrics.exposition())["rdmaload_operations_running load"] == 0
        next(tensors)
        assert read(metrics.exposition())["rdmaload_operations_running load"] == 1
        del tensors
    seen = read(metrics.exposition())
    assert seen["rdmaload_operations_running load"] == 0
    assert seen["rdmaload_operations_total load python ok"] == 2
    assert seen["rdmaload_operations_total load python stopped"] == 1
    assert seen["rdmaload_operations_total save memory ok"] == 1
    assert 240_000 < seen["rdmaload_bytes_total load python"] < 360_000
    assert seen["rdmaload_verified_bytes_total load"] >= stats.verified_bytes > 240_000
    assert seen["rdmaload_verified_bytes_total load"] < 2 * stats.verified_bytes
    assert seen["rdmaload_seconds_total load python"] > 0
    assert seen["rdmaload_stage_seconds_total load read"] > 0
    assert seen["rdmaload_unverified_bytes_total load"] == 0
    assert not [name for name in seen if "failures" in name]


def test_stats_of_several_models_only_grow(
    checkpoint: Checkpoint, memory_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A counter of prometheus_client refuses what becomes less."""
    rdmaload.save(checkpoint.directory, memory_url)
    registry = CollectorRegistry()
    metrics.publish(registry)
    stats, opened = LoadStats(), []
    for _ in range(5):
        with rdmaload.open(memory_url) as model:
            model.load(stats=stats)
            opened.append(stats.stages["open"])
            model.load(stats=stats)
            assert stats.stages["open"] == opened[-1]  # it was opened once
    assert opened == sorted(set(opened))
    seen = read(generate_latest(registry).decode())
    assert seen["rdmaload_operations_total load python ok"] == 10
    assert seen["rdmaload_stage_seconds_total load open"] == pytest.approx(opened[-1])
    assert "not counted" not in caplog.text


def test_failures_are_counted_by_their_class(checkpoint: Checkpoint, memory_url: str) -> None:
    with pytest.raises(NotFoundError):
        rdmaload.load(memory_url)
    rdmaload.save(checkpoint.directory, memory_url, chunk_bytes=5000)
    with rdmaload.open(memory_url) as model:
        number = max(file.number for file in model.files if file.header is not None)
        key = f"{model._connector.location.model}/chunks/{model.generation}/{number}/0"
        model._connector.set(key, b"x" * 5000)  # type: ignore[attr-defined]
        with pytest.raises(rdmaload.PartialLoadError):
            model.load_into({name: torch.empty(spec.shape, dtype=torch.uint8) for name, spec in model.tensors.items()})
        with pytest.raises(IntegrityError):
            model.load()
    seen = read(metrics.exposition())
    assert seen["rdmaload_failures_total open NotFoundError"] == 1
    assert seen["rdmaload_failures_total load IntegrityError"] == 2
    assert seen["rdmaload_operations_total load python failed"] == 2
    assert seen["rdmaload_retries_total load"] > 0


def test_fallbacks_are_counted_by_reason_and_reasons_are_bounded() -> None:
    for number in range(100):
        metrics.ended("load", LoadStats(fallback_reason=f'no "card" {number}\n' + "x" * 500), None)
    metrics.ended("load", LoadStats(fallback_reason='no "card" 3\n' + "x" * 500), None)
    seen = {name: value for name, value in read(metrics.exposition()).items() if "fallbacks" in name}
    assert len(seen) == 21
    assert seen["rdmaload_fallbacks_total load others"] == 80
    assert sum(seen.values()) == 101
    assert max(map(len, seen)) < 200


def test_threads_lose_nothing() -> None:
    def work() -> None:
        for _ in range(500):
            metrics.began("load")
            metrics.ended("load", LoadStats(bytes=3, path="p"), None)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = read(metrics.exposition())
    assert seen["rdmaload_bytes_total load p"] == 6000
    assert seen["rdmaload_operations_running load"] == 0


def test_prometheus_client_shows_the_same_before_and_after(checkpoint: Checkpoint, memory_url: str) -> None:
    rdmaload.save(checkpoint.directory, memory_url)
    registry = CollectorRegistry()
    metrics.publish(registry)
    metrics.publish(registry)
    rdmaload.load(memory_url)
    shown = read(generate_latest(registry).decode())
    assert shown == read(metrics.exposition())
    assert shown["rdmaload_bytes_total load python"] == 120_000


def test_a_registry_that_refuses_does_not_stop_a_load(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(registry: object = None) -> None:
        raise ValueError("a metric of that name is there")

    monkeypatch.setattr(metrics, "publish", refuse)
    metrics._counts.settled = False
    assert len(rdmaload.load(checkpoint.directory)) == 12
    assert "a metric of that name is there" in caplog.text
    assert read(metrics.exposition())["rdmaload_bytes_total load file-buffered"] == 120_000


def test_without_prometheus_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(NotSupportedError, match="pip install prometheus-client"):
        metrics.publish()


def run(code: str, *arguments: object, **environment: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_engine_that_uses_prometheus_client_gets_them_unasked(checkpoint: Checkpoint) -> None:
    shown = run(
        """
        import sys, prometheus_client, rdmaload
        rdmaload.load(sys.argv[1])
        print(prometheus_client.generate_latest().decode())
        """,
        checkpoint.directory,
    )
    assert read(shown)["rdmaload_bytes_total load file-buffered"] == 120_000
    untouched = "import sys, rdmaload; rdmaload.load(sys.argv[1]); print('prometheus_client' in sys.modules)"
    assert run(untouched, checkpoint.directory).strip() == "False"


def test_processes_that_share_a_directory_come_together(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As those of SGLang do, and vLLM's with several API servers: workers load, another process is asked."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shown = run(
        """
        import os, sys, rdmaload, rdmaload.metrics
        for _ in range(2):  # a worker that has counted itself, then one that was forked from it
            rdmaload.load(sys.argv[1])
            child = os.fork()
            if not child:
                rdmaload.load(sys.argv[1])
                assert 'rdmaload_operations_total{operation="load",path="file-buffered",outcome="ok"} 1' in (
                    rdmaload.metrics.exposition())
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        import prometheus_client.multiprocess
        registry = prometheus_client.CollectorRegistry()
        prometheus_client.multiprocess.MultiProcessCollector(registry)
        print(prometheus_client.generate_latest(registry).decode())
        """,
        checkpoint.directory,
        PROMETHEUS_MULTIPROC_DIR=str(shared),
    )
    seen = read(shown)
    assert seen["rdmaload_operations_total load file-buffered ok"] == 4
    assert seen["rdmaload_bytes_total load file-buffered"] == 480_000


def test_the_weight_server_shows_its_counters(checkpoint: Checkpoint) -> None:
    with WeightServer(args=("--metrics-port", "0")) as server:
        rdmaload.save(checkpoint.directory, server.url("m"))
        rdmaload.load(server.url("m"))
        page = str(server.document["metrics_url"])
        with urllib.request.urlopen(page, timeout=10) as answer:
            assert answer.headers["Content-Type"] == metrics.CONTENT_TYPE
            seen = read(answer.read().decode())
        assert seen["rdmaload_server_bytes_received_total"] > 120_000
        assert seen["rdmaload_server_bytes_sent_total"] > 120_000
        assert seen["rdmaload_server_hits_total"] > 0
        assert seen["rdmaload_server_limit_bytes"] == 2**30
        assert seen["rdmaload_server_used_bytes"] > 120_000
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(page.removesuffix("metrics"), timeout=10)


def test_every_counter_of_the_server_is_explained() -> None:
    server = _core.WeightServer(_core.WeightStore(1 << 20))
    try:
        counters = dict(server.counters)
    finally:
        server.close()
    assert counters.keys() == _HELP.keys()
    assert read(server_text(counters))["rdmaload_server_limit_bytes"] == 1 << 20

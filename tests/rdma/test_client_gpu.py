"""Loads over real verbs into the memory of the fake GPU, which is host memory: soft-RoCE can write to it.

It takes no dma-buf, so that road ends in page-locked memory; and where /sys/module says that nvidia_peermem is loaded,
memory of a GPU is registered as it is: the whole way, except that no GPU and no card are real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rdmaload
from tests.support.checkpoints import make_checkpoint
from tests.support.weight_server import WeightServer

CODE = """
import json, sys
import rdmaload
from rdmaload import devices
from tests.support.checkpoints import compare
from tests.support.fake_gpu import FakeGpu

gpu = FakeGpu()
devices.allocator = lambda: gpu
url, directory, how = sys.argv[1:]
stats = rdmaload.LoadStats()
slow = {"connect_timeout": 100.0, "inactivity_timeout": 120.0}
if how == "iterate":
    tensors = dict(rdmaload.weight_iterator(url, device="cuda:1", window_bytes=2 * 2**20, stats=stats, **slow))
elif how == "fill":
    tensors = {name: gpu.empty(tensor.shape, tensor.dtype, 1) for name, tensor in rdmaload.load(url, **slow).items()}
    stats = rdmaload.load_into(tensors, url, **slow)
else:
    tensors = rdmaload.load(url, device="cuda:0", stats=stats, **slow)
compare({name: gpu.seen(tensor) for name, tensor in tensors.items()}, directory)
state = gpu.state()
print(json.dumps({"path": stats.path, "reason": stats.fallback_reason, "copied": stats.copied_bytes,
                  "verified": stats.verified_bytes, "read": stats.read_bytes, "unverified": stats.unverified_bytes,
                  "late": state["late_writes"]}))
"""
PEERMEM = (
    "mount -t tmpfs none /sys/module && mkdir /sys/module/nvidia_peermem && echo 1 >/sys/module/nvidia_peermem/version"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        f"layer.{i}": (dtype, (rows, 1024))
        for i, (dtype, rows) in enumerate([("BF16", 1500), ("F32", 700), ("U8", 33)])
    }
    make_checkpoint(
        directory, {**shapes, "norm": ("BF16", (100,)), "scale": ("F32", (1,)), "odd": ("U8", (7,))}, seed=3
    )
    return directory


@pytest.fixture(scope="module")
def server(rdma_address: str, checkpoint: Path) -> Iterator[WeightServer]:
    with WeightServer(rdma=rdma_address) as running:
        rdmaload.save(checkpoint, running.url("m"))
        yield running


def load(server: WeightServer, checkpoint: Path, how: str, peermem: bool, **query: object) -> dict[str, object]:
    command = [sys.executable, "-c", CODE, server.rdma_url("m", **query), str(checkpoint), how]
    if peermem:
        command = ["unshare", "--mount", "sh", "-c", f'{PEERMEM} && exec "$@"', "sh", *command]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["python", *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, object] = json.loads(done.stdout)
    assert seen["copied"] == 0
    assert seen["verified"] == seen["read"]
    assert seen["unverified"] == seen["late"] == 0
    return seen


@pytest.mark.parametrize("how", ["load", "iterate", "fill"])
def test_the_card_writes_into_gpu_memory(server: WeightServer, checkpoint: Path, how: str) -> None:
    seen = load(server, checkpoint, how, True)
    assert (seen["path"], seen["reason"]) == ("resp-rdma+direct-gpu", None)


def test_without_a_way_to_register_gpu_memory_the_card_writes_into_page_locked_memory(
    server: WeightServer, checkpoint: Path
) -> None:
    seen = load(server, checkpoint, "load", False)
    assert seen["path"] == "resp-rdma+staged-gpu"
    assert "dma-buf" in str(seen["reason"])
    assert "nvidia_peermem is not loaded" in str(seen["reason"])


def test_the_direct_way_can_be_switched_off(server: WeightServer, checkpoint: Path) -> None:
    assert load(server, checkpoint, "load", True, gpudirect="off")["path"] == "resp-rdma+staged-gpu"

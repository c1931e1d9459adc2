"""What happens to an open model when the world changes under it: a fork, a replaced file, a slow neighbour."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import rdmaload
from tests.support.fault_proxy import FaultProxy
from tests.support.faults import Reset, Throttle
from tests.support.servers import RedisServer

FORKED = """
import os, sys, rdmaload
model = rdmaload.open(sys.argv[1])
model.load()
child = os.fork()
if child == 0:
    try:
        model.load()
    except rdmaload.UnavailableError as error:
        assert "forked" in str(error), error
    else:
        os._exit(3)
    assert list(rdmaload.load(sys.argv[1])) == ["w"]
    model.close()
    del model
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert list(model.load()) == ["w"]
"""


def test_a_forked_child_gets_an_error_and_can_end_and_open_again(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", FORKED, str(tmp_path)], check=True, timeout=60, env=environment)


def test_a_file_replaced_by_one_of_equal_size_while_the_model_is_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000), "b": torch.zeros(1000)}, path)
    with rdmaload.open(tmp_path) as model:
        assert model.load(include="a")["a"].sum() == 0
        save_file({"a": torch.ones(1000), "b": torch.ones(1000)}, tmp_path / "new")
        os.replace(tmp_path / "new", path)
        with pytest.raises(rdmaload.IntegrityError, match=r"model\.safetensors was changed"):
            model.load(include="b")
    assert rdmaload.load(tmp_path)["b"].sum() == 1000


def test_a_part_that_waited_behind_others_is_retried_all_the_same(redis_server: RedisServer, model: str) -> None:
    state = {f"t{i}": torch.full((100_000,), float(i)) for i in range(8)}
    rdmaload.save(state, redis_server.url(model), chunk_bytes=50_000)
    # The parts of the window wait behind each other for longer than retry_timeout, and then a connection breaks.
    with FaultProxy(
        redis_server.host, redis_server.port, Throttle(bytes_per_second=2_000_000), Reset(after=2_500_000)
    ) as proxy:
        options = {"retry_timeout": 0.5, "connections": 1, "window_bytes": 8 * 400_000}
        loaded = dict(rdmaload.weight_iterator(proxy.url(model), **options))
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)

"""`import rdmaload` is cheap and needs nothing: no torch, no client library, no network, no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rdmaload

HEAVY = ["boto3", "botocore", "hiredis", "numpy", "redis", "requests", "safetensors", "torch", "tqdm"]


def python(code: str, *options: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    result = subprocess.run(
        [sys.executable, *options, "-c", code],
        env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


LOADED = f"import json, sys; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"


@pytest.mark.parametrize(
    "code",
    [
        "import rdmaload",
        "import rdmaload; dir(rdmaload); rdmaload.__version__; rdmaload.NotFoundError; rdmaload.LoadStats()",
        "import rdmaload; rdmaload.Options(connections=3); rdmaload.KeyValueConnector",
        "from rdmaload import load, open, save, weight_iterator, load_into, pull_files, prune, models, remove, Model",
        "import rdmaload.cli",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert json.loads(python(f"{code}\n{LOADED}")) == []


def test_it_imports_in_a_moment() -> None:
    # A bound against importing torch by mistake (seconds), not a measurement: the best of three on any machine.
    code = "import time; begin = time.perf_counter(); import rdmaload; print(time.perf_counter() - begin)"
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_it_opens_no_socket_and_starts_no_thread() -> None:
    code = """
import socket, threading
def refuse(*arguments, **keywords): raise AssertionError("a socket was opened")
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
import rdmaload
[getattr(rdmaload, name) for name in rdmaload.__all__]
assert threading.active_count() == 1
print("fine")
"""
    assert python(code) == "fine\n"


def test_files_load_without_redis_boto3_or_network(tmp_path: Path) -> None:
    code = f"""
import sys, socket
for name in ("redis", "boto3", "tqdm", "safetensors"):
    sys.modules[name] = None  # as if it were not installed
def refuse(*arguments, **keywords): raise AssertionError("a socket was opened")
import torch, rdmaload
socket.socket.connect = refuse
rdmaload.save({{"a": torch.arange(5)}}, {str(tmp_path / "m")!r})
print(rdmaload.load({str(tmp_path / "m")!r})["a"].tolist())
"""
    assert python(code, CUDA_VISIBLE_DEVICES="") == "[0, 1, 2, 3, 4]\n"


def test_warnings_as_errors_and_isolated_modes() -> None:
    assert python("import rdmaload; print('fine')", "-W", "error", "-X", "dev", "-bb") == "fine\n"


def test_everything_that_is_promised_is_there() -> None:
    code = """
import rdmaload
for name in rdmaload.__all__:
    assert getattr(rdmaload, name).__module__.startswith("rdmaload"), name
assert set(rdmaload.__all__) <= set(dir(rdmaload))
print("fine")
"""
    assert python(code) == "fine\n"
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        rdmaload.lode  # noqa: B018


@pytest.mark.parametrize("use", ["metrics.exposition()", "errors.RdmaloadError", "connectors.Connector"])
def test_submodules_that_users_name_are_there_without_an_import_of_their_own(use: str) -> None:
    name = use.partition(".")[0]
    assert name in dir(rdmaload)
    code = f"""
import sys, rdmaload
assert "rdmaload.metrics" not in sys.modules
rdmaload.{use}
assert rdmaload.{name} is sys.modules["rdmaload.{name}"]
"""
    assert json.loads(python(f"{code}\n{LOADED}")) == []


@pytest.mark.parametrize("name", ["save", "prune", "load", "open", "models", "remove", "Model"])
def test_a_function_is_no_module_however_it_was_reached(name: str) -> None:
    # A submodule of the same name, imported by anybody, must not take the function's place.
    code = f"""
import importlib, pkgutil, rdmaload
for module in pkgutil.walk_packages(rdmaload.__path__, "rdmaload."):
    if not module.name.endswith(("__main__", "vllm.loader")):  # the latter needs vLLM
        importlib.import_module(module.name)
from rdmaload import {name} as imported
assert callable(rdmaload.{name}) and callable(imported), rdmaload.{name}
print("fine")
"""
    assert python(code) == "fine\n"


def test_the_package_says_that_it_is_typed() -> None:
    assert Path(rdmaload.__file__).with_name("py.typed").exists()


def test_the_process_ends_with_a_model_open(tmp_path: Path) -> None:
    # Threads that call into Python must be gone before the interpreter is.
    code = """
import torch, rdmaload
rdmaload.save({"a": torch.zeros(100_000)}, "memory://s/m", chunk_bytes=1000)
model = rdmaload.open("memory://s/m")
iterator = model.weight_iterator(window_bytes=1000)
next(iterator)
other = rdmaload.open("memory://s/m").weight_iterator()
next(other)
print("fine")
"""
    assert python(code) == "fine\n"


def test_the_process_ends_with_reads_under_way() -> None:
    # Without waiting for them this aborts in some of the runs.
    code = """
import sys, torch, rdmaload
from rdmaload import _core
rdmaload.save({"a": torch.zeros(500_000)}, "memory://s/m", chunk_bytes=1000)
model = rdmaload.open("memory://s/m")
plan = model._reader.plan(model._weights_of(None).native, [0])
sys.kept = model._reader.start(plan, [_core.HostArena(nbytes) for nbytes in plan.region_bytes])
print("fine")
"""
    for _ in range(3):
        assert python(code) == "fine\n"

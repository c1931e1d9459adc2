"""What rdmaload writes, SGLang's own Redis connector and loader read, and the other way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import rdmaload
from tests.support.servers import RedisServer
from tests.support.sglang_values import same_tensors, sample_tensors

pytestmark = pytest.mark.engines

DRIVER = Path(__file__).with_name("sglang_driver.py")


def _sglang(source: Path, *arguments: object) -> None:
    command = [sys.executable, str(DRIVER), str(source), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def _state() -> dict[str, torch.Tensor]:
    """An engine's state: tied tensors, a part of another, strided ones and an empty one among others."""
    state = sample_tensors()
    rows = torch.arange(12.0).reshape(3, 4)
    state |= {"lm_head.weight": state["model.embed.weight"], "rows": rows, "rows.last": rows[2:]}
    state |= {"strided": rows.clone().t(), "empty": torch.empty(0, 3)}
    state |= {"two": torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "scalar": torch.tensor(3.5)}
    return state


def test_sglang_writes_and_rdmaload_reads(sglang_source: Path, server: RedisServer, tmp_path: Path) -> None:
    files = tmp_path / "files"
    (files / "deeper").mkdir(parents=True)
    (files / "config.json").write_text('{"name": "ü"}')
    (files / "deeper" / "modeling.py").write_text("x = 1\n")
    (files / "merges.txt").write_text("SGLang leaves it out")
    url = server.url("org/model")
    for rank in range(2):
        torch.save(_state(), tmp_path / "state.pt")
        _sglang(sglang_source, "save", url, rank, tmp_path / "state.pt", files)
    with rdmaload.open(url) as model:
        assert (model.store_layout, model.kind, model.world_size) == ("sglang", "sharded", 2)
        for rank in range(2):
            loaded = model.load(rank=rank)
            expected = {name: tensor for name, tensor in _state().items() if name in loaded}
            assert same_tensors(loaded, expected)
        assert _state().keys() - loaded.keys() == {"model.embed.weight", "rows.last", "empty"}
        pulled = model.pull_files(tmp_path / "pulled")
    assert {path.name: path.read_text() for path in pulled.iterdir()} == {
        "config.json": '{"name": "ü"}',
        "modeling.py": "x = 1\n",
    }


def test_both_write_the_same_bytes_under_the_same_keys(
    sglang_source: Path, server: RedisServer, tmp_path: Path
) -> None:
    torch.save(_state(), tmp_path / "state.pt")
    (tmp_path / "files").mkdir()
    _sglang(sglang_source, "save", server.url("theirs"), 0, tmp_path / "state.pt", tmp_path / "files")
    rdmaload.save(torch.load(tmp_path / "state.pt"), server.url("ours"), layout="sglang")
    with server.client() as client:

        def values(model: str) -> dict[bytes, bytes]:
            prefix = f"{model}/keys/"
            return {key[len(prefix) :]: client.get(key) for key in client.scan_iter(f"{prefix}*")}

        assert len(values("theirs")) > 8
        assert values("ours") == values("theirs")


def test_rdmaload_writes_and_sglangs_loader_reads(sglang_source: Path, server: RedisServer, tmp_path: Path) -> None:
    url = server.url("org/model")
    ranks = [_state() | {"only": torch.full((5,), float(rank))} for rank in range(2)]
    # A larger model was there before: whatever it leaves behind would be a KeyError.
    for rank in range(3):
        rdmaload.save({"old": torch.ones(3)}, url, layout="sglang", rank=rank, world_size=3)
    for rank, state in enumerate(ranks):
        rdmaload.save(state, url, layout="sglang", rank=rank, world_size=2)
    for rank, state in enumerate(ranks):
        path = tmp_path / f"rank{rank}.pt"
        blank = _state() | {"only": torch.zeros(5)}  # with the same ties
        for tensor in blank.values():
            tensor.zero_()
        torch.save(blank, path)
        _sglang(sglang_source, "load", url, rank, path)
        assert same_tensors(torch.load(path), state)
    _sglang(sglang_source, "iterate", url, 1, tmp_path / "iterated.pt")
    with rdmaload.open(url) as model:
        assert same_tensors(torch.load(tmp_path / "iterated.pt"), model.load(rank=1))


def test_sglang_pulls_the_files_that_rdmaload_wrote(sglang_source: Path, server: RedisServer, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    (directory / "code").mkdir(parents=True)
    safetensors.torch.save_file({"w": torch.ones(2)}, directory / "model.safetensors")
    texts = {"config.json": '{"name": "ü"}', "code/modeling.py": "x = 1\n", "merges.txt": "a b\n", "empty.json": ""}
    for name, text in texts.items():
        (directory / name).write_text(text)
    (directory / "tokenizer.model").write_bytes(b"\xff\x00")  # SGLang would fail to decode it
    rdmaload.save(directory, server.url("m"), layout="sglang")
    _sglang(sglang_source, "pull", server.url("m"), tmp_path / "pulled")
    pulled = {path.name: path.read_text() for path in (tmp_path / "pulled").iterdir()}
    assert pulled == {name.rpartition("/")[2]: text for name, text in texts.items()}


def test_our_plug_in_serves_sglangs_loader(
    sglang_source: Path, server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its registry puts our connector in, and its loader copies from it, in either layout."""
    monkeypatch.setenv("RDMALOAD_CACHE_DIR", str(tmp_path / "cache"))
    state = {name: tensor for name, tensor in _state().items() if name not in ("empty", "rows.last")}
    ranks = [state | {"only": torch.full((5,), float(rank))} for rank in range(2)]
    for rank, each in enumerate(ranks):
        rdmaload.save(each, server.url("sgl"), layout="sglang", rank=rank, world_size=2)
        rdmaload.save(each, server.url("ours"), rank=rank, world_size=2, save_id="s")
    for name in ("sgl", "ours"):
        for rank, each in enumerate(ranks):
            path = tmp_path / f"{name}{rank}.pt"
            blank = {key: tensor.clone() for key, tensor in each.items()}
            blank["lm_head.weight"] = blank["model.embed.weight"]
            for tensor in blank.values():
                tensor.zero_()
            torch.save(blank, path)
            _sglang(sglang_source, "plugin", server.url(name), rank, path)
            assert same_tensors(torch.load(path), each)

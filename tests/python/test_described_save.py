"""save() of tensors in memory with a directory's other files, and with what the manifest says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import rdmaload


def test_files_parallel_sizes_and_identity_are_saved(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "sub" / "code.py").write_text("x = 1")
    (directory / "model.safetensors.index.json").write_text("{}")
    save_file({"old": torch.ones(1)}, directory / "model.safetensors")
    url = f"memory://{tmp_path.name}/m"
    rdmaload.save({"w": torch.ones(2)}, url, files=directory, parallel={"tp": 1}, identity={"engine": "mine"})
    with rdmaload.open(url) as model:
        assert sorted(file.path for file in model.files) == ["config.json", "model.safetensors", "sub/code.py"]
        assert model.tensors.keys() == {"w"}
        assert model.manifest is not None
        assert dict(model.manifest.layout) == {"tp": 1}
        assert dict(model.manifest.identity) == {"engine": "mine"}
        assert (model.pull_files(tmp_path / "pulled") / "sub" / "code.py").read_text() == "x = 1"


def test_a_directory_has_its_own(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="are for a state dict or a module"):
        rdmaload.save(tmp_path, f"memory://{tmp_path.name}/m", identity={"engine": "mine"})

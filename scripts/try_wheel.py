"""Whether an installed wheel works: saves a small model into a directory, loads it and compares every tensor."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import rdmaload
from rdmaload import _core
from rdmaload.cli import main


def try_wheel() -> None:
    source = {
        "matrix": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "large": torch.arange(3_000_000, dtype=torch.int32),
        "scalar": torch.tensor(2.5),
    }
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "model"
        rdmaload.save(source, directory)
        for loaded in (rdmaload.load(directory), dict(rdmaload.weight_iterator(directory))):
            assert loaded.keys() == source.keys(), loaded.keys()
            assert all(torch.equal(loaded[key], tensor) for key, tensor in source.items())
        rdmaload.save(directory, "memory://wheel/model")
        assert main(["load", "memory://wheel/model", "--against", str(directory)]) == 0
        assert main(["doctor", str(directory)]) == 0
    root = Path(__file__).resolve().parents[1]
    assert root not in Path(rdmaload.__file__).resolve().parents, "this is the checkout, not the wheel"
    library = _core.tls_library()  # raises where the wheel was built without TLS, or the system has no OpenSSL
    print(
        f"the wheel works: rdmaload {rdmaload.__version__}, torch {torch.__version__}, "
        f"Python {sys.version.split()[0]}, TLS by {library}"
    )


if __name__ == "__main__":
    try_wheel()

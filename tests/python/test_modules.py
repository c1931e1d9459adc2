"""Modules on the meta device that get their parameters from a store: ties, dtypes, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import rdmaload
from rdmaload.errors import LayoutMismatchError
from rdmaload.integrations.modules import materialize


class Net(nn.Module):
    def __init__(self, *, tied: bool = True, meta: bool = False) -> None:
        super().__init__()
        device = "meta" if meta else "cpu"
        self.embed = nn.Embedding(6, 4, device=device)
        self.frozen = nn.Linear(4, 4, device=device).requires_grad_(False)
        self.head = nn.Linear(4, 6, bias=False, device=device)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3, device=device))
        self.register_buffer("computed", torch.arange(3.0), persistent=False)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"memory://{tmp_path.name}/net"


def test_parameters_get_memory_and_stay_tied(url: str) -> None:
    original = Net()
    rdmaload.save(original, url)
    module = Net(meta=True)
    materialize(module, url)
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in module.state_dict().items())
    assert module.head.weight is module.embed.weight
    assert not module.frozen.weight.requires_grad
    assert module.embed.weight.requires_grad
    assert torch.equal(module.computed, torch.arange(3.0))  # type: ignore[arg-type]


def test_ties_that_the_meta_device_has_lost(url: str) -> None:
    """init_empty_weights makes two parameters of one; those that have memory of their own keep one each."""
    rdmaload.save(Net(), url)
    module = Net(meta=True, tied=False)
    materialize(module, url)
    assert module.head.weight is module.embed.weight
    apart = Net(tied=False)
    materialize(apart, url)
    assert apart.head.weight is not apart.embed.weight
    assert torch.equal(apart.head.weight, apart.embed.weight)
    assert apart.head.weight.data_ptr() != apart.embed.weight.data_ptr()


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_a_checkpoint_with_one_of_two_tied_names(url: str, kept: str) -> None:
    state = Net().state_dict()
    dropped = {"embed.weight", "head.weight"} - {kept}
    rdmaload.save({name: tensor for name, tensor in state.items() if name not in dropped}, url)
    module = Net(meta=True)
    materialize(module, url)
    assert module.head.weight is module.embed.weight
    assert torch.equal(module.embed.weight, state[kept])


def test_another_dtype(url: str) -> None:
    rdmaload.save(Net(), url)
    module = Net(meta=True)
    materialize(module, url, dtype=torch.bfloat16)
    assert module.embed.weight.dtype == module.head.weight.dtype == torch.bfloat16


def test_differences_are_refused_before_anything_changes(url: str) -> None:
    state = Net(tied=False).state_dict()
    del state["head.weight"]
    rdmaload.save({**state, "more": torch.ones(1)}, url)
    module = Net(tied=False, meta=True)
    with pytest.raises(LayoutMismatchError, match=r"1 not stored \(head.weight\); 1 not in the module \(more\)"):
        materialize(module, url)
    assert module.embed.weight.device.type == "meta"
    with pytest.raises(LayoutMismatchError, match="1 not stored"):  # else it would stay without memory
        materialize(module, url, strict=False)
    there = Net(tied=False)
    before = there.head.weight.clone()
    materialize(there, url, strict=False)
    assert torch.equal(there.head.weight, before)
    assert torch.equal(there.embed.weight, state["embed.weight"])


def test_another_shape_is_refused(url: str) -> None:
    state = Net(tied=False).state_dict()
    rdmaload.save({**state, "scale": torch.ones(4)}, url)
    module = Net(tied=False, meta=True)
    with pytest.raises(LayoutMismatchError, match=r"scale has shape \[4\], in Net it has \[3\]"):
        materialize(module, url)
    assert module.embed.weight.device.type == "meta"


def test_computed_buffers_without_memory_are_refused(url: str) -> None:
    rdmaload.save(Net(), url)
    module = Net(meta=True)
    module.computed = torch.arange(3.0, device="meta")
    with pytest.raises(LayoutMismatchError, match=r"1 on the meta device and not stored.*include_buffers=False"):
        materialize(module, url)

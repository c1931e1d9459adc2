"""Modules of plain torch whose parameters have no memory yet, filled from a store without a second copy.

    with accelerate.init_empty_weights(include_buffers=False):
        module = Net()
    materialize(module, "redis://10.0.0.5/net", device="cuda:0")

For a module that has its memory there is `rdmaload.load_into`. Parameters that are one object stay one object, and
those that were one when they were saved become one again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rdmaload import loading
from rdmaload.errors import LayoutMismatchError
from rdmaload.options import Options

if TYPE_CHECKING:
    from torch import nn

__all__ = ["materialize"]

_SHOWN_NAMES = 5


def materialize(
    module: nn.Module,
    url: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    rank: int | None = None,
    strict: bool = True,
    options: Options | None = None,
    **opts: object,
) -> nn.Module:
    """Give `module` the stored tensors as its parameters and buffers, and return it.

    `dtype` converts floating-point tensors; without it they keep the stored one. Buffers that are not stored must have
    been computed: build the module with parameters only on the meta device. With `strict` the names must be the same on
    both sides, a name tied to a stored one counting as stored; LayoutMismatchError names the others, and those of
    another shape. Raises what `load` raises; the parameters are what they were then.
    """
    with loading.open(url, options=options, **opts) as model:
        stored = model.rank_tensors(rank)
        # Models of transformers tie in a method of their own; init_empty_weights has made two parameters of each.
        tie_weights: Callable[[], object] | None = getattr(module, "tie_weights", None)
        if callable(tie_weights):
            tie_weights()
        tied = _tied(module)
        expected = dict(module.state_dict(keep_vars=True))
        covered = {name for names in tied for name in names if any(other in stored for other in names)}
        missing = [name for name in expected if name not in stored and name not in covered]
        missing = [name for name in missing if strict or expected[name].device.type == "meta"]
        unexpected = [name for name in stored if name not in expected] if strict else []
        computed = [name for name, buffer in module.named_buffers() if buffer.device.type == "meta"]
        lost = [name for name in computed if name not in expected]
        if missing or unexpected or lost:
            problems = [
                _listed(missing, "not stored"),
                _listed(unexpected, "not in the module"),
                _listed(lost, "on the meta device and not stored: build the module with include_buffers=False"),
            ]
            raise LayoutMismatchError(
                f"{model.url} and {type(module).__name__} differ: {'; '.join(filter(None, problems))}", url=model.url
            )
        state = model.load(rank=rank, device=device, dtype=dtype, include=[name for name in stored if name in expected])
        for name, tensor in state.items():
            if tensor.shape != expected[name].shape:
                raise LayoutMismatchError(
                    f"{model.url}: {name} has shape {list(tensor.shape)}, in {type(module).__name__} it has "
                    f"{list(expected[name].shape)}",
                    url=model.url,
                )
    tied += _stored_as_one(state, expected)
    module.load_state_dict(state, strict=False, assign=True)
    _tie(module, tied, state)
    module.to(device)  # buffers that were computed
    return module


def _tied(module: nn.Module) -> list[list[str]]:
    """Names of parameters that are one object."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _stored_as_one(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[list[str]]:
    """Names of parameters that were one when they were saved, and that have no memory: init_empty_weights makes two of
    them. Where the module has memory of its own for each, `state` gets a copy for each."""
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    found = []
    for names in groups.values():
        if len({id(expected[name]) for name in names}) < 2:
            continue
        if all(isinstance(expected[name], torch.nn.Parameter) and expected[name].is_meta for name in names):
            found.append(names)
        else:
            state.update({name: state[name].clone() for name in names[1:]})
    return found


def _tie(module: nn.Module, tied: list[list[str]], loaded: dict[str, torch.Tensor]) -> None:
    """Make them one object again: assigning has given every name one of its own."""
    for names in tied:
        source = next((name for name in names if name in loaded), None)
        if source is None:
            continue
        parameter = module.get_parameter(source)
        for name in names:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, parameter)


def _listed(names: list[str], what: str) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > _SHOWN_NAMES else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN_NAMES])}{more})"

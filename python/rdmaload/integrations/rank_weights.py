"""The weights of one rank: the one place that engines take them from.

A rank of a sharded model reads its own part. Of an unsharded checkpoint every rank wants nearly all, so that the ranks
of one node read it once, together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from rdmaload.errors import LayoutMismatchError
from rdmaload.model import Model
from rdmaload.node_group import NodeGroup
from rdmaload.tensors import TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["checkpoint_weights", "load_shard"]


def checkpoint_weights(
    model: Model,
    *,
    device: str | torch.device = "cpu",
    wanted: Callable[[TensorSpec], bool] | None = None,
    window_bytes: int | None = None,
    node: NodeGroup | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an unsharded checkpoint that are `wanted` (default: all), in the order file, then offset.

    What is not wanted is not read. With `node` the members of that group read together, and must want the same. Raises
    LayoutMismatchError for a sharded model.
    """
    if model.kind == "sharded":
        raise LayoutMismatchError(
            f"{model.url} is sharded over {model.world_size} ranks: its tensors go into the ranks' memory as they are, "
            "and not through the engine's loading of checkpoints",
            url=model.url,
        )
    include = None
    if wanted is not None:
        named = model.rank_tensors(None)
        include = [name for name, spec in named.items() if wanted(spec)]
        if len(include) == len(named):
            include = None
        elif not include:
            return iter(())
    return model.weight_iterator(device=device, include=include, window_bytes=window_bytes, node=node)


def load_shard(model: Model, state: Mapping[str, torch.Tensor], rank: int, *, optional: tuple[str, ...] = ()) -> None:
    """Fill `state`, the tensors of one rank, with what that rank saved.

    Names must be the same on both sides; those that end in one of `optional` may be missing in the store and keep
    their values, as do empty tensors. Raises what `load_into` raises.
    """
    stored = model.rank_tensors(rank)
    targets = {
        name: tensor
        for name, tensor in state.items()
        if name in stored or not (tensor.numel() == 0 or name.endswith(optional))
    }
    model.load_into(targets, rank=rank)

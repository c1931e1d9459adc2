"""Which of the engine's ranks this process is, and how the ranks agree on something."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from rdmaload.integrations.places import gathered, place
from rdmaload.node_group import NodeGroup

__all__ = ["Ranks"]

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Ranks:
    """This process among those of one replica (tensor and pipeline parallel), and which replica it is in."""

    tp: int
    tp_size: int
    pp: int
    pp_size: int
    replica: int

    @classmethod
    def here(cls) -> Ranks:
        """As vLLM has set its groups up; alone where it has none."""
        from vllm.distributed import parallel_state

        if not parallel_state.model_parallel_is_initialized():
            return cls(0, 1, 0, 1, 0)
        tp, pp = parallel_state.get_tp_group(), parallel_state.get_pp_group()
        replica = parallel_state.get_dp_group().rank_in_group
        return cls(tp.rank_in_group, tp.world_size, pp.rank_in_group, pp.world_size, replica)

    @property
    def rank(self) -> int:
        return self.pp * self.tp_size + self.tp

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    def weights_rank(self, sizes: Mapping[str, int]) -> int:
        """The rank under which this process's weights are saved: replicas are other ranks only with other experts."""
        across = max(sizes["tp"], sizes["ep"])
        within = self.replica * self.tp_size + self.tp if sizes["ep"] > 1 else self.tp
        return self.pp * across + within

    def agree(self, value: _Value, *, replicas: bool = False) -> _Value:
        """The first rank's `value`; every rank of the replica (or of all, with `replicas`) must call it.

        There is no group of a replica's ranks: it goes along the pipelines first, then along the tensor ranks.
        """
        from vllm.distributed import parallel_state

        groups = [parallel_state.get_pp_group, parallel_state.get_tp_group]
        if replicas:
            groups.append(parallel_state.get_dp_group)
        if not parallel_state.model_parallel_is_initialized():
            return value
        for group in groups:
            value = group().broadcast_object(value, src=0)
        return value

    def node_group(self) -> NodeGroup | None:
        """Those ranks of the replica that run on this node; None where this one is alone there.

        Every rank of the replica must call it.
        """
        from vllm.distributed import parallel_state

        if self.world_size == 1:
            return None
        places = gathered(parallel_state.get_tp_group(), gathered(parallel_state.get_pp_group(), place()))
        name = self.agree(f"vllm-{secrets.token_hex(12)}")  # of no other engine, whatever it loads
        here = [(tp, pp) for tp, stages in enumerate(places) for pp, other in enumerate(stages) if other == place()]
        return None if len(here) < 2 else NodeGroup(name, here.index((self.tp, self.pp)), len(here))

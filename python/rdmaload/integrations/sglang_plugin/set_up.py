"""How this SGLang is set up: the identity of the weights that its ranks hold, and which rank this is.

Weights per rank are kept in one of two states. `as loaded`: after the model's own loading and before SGLang changes
them for its kernels; they suit every kernel and GPU, are saved by `rdmaload save-sharded` and taken by loader.py.
Processed: what SGLang's own remote loader saves and takes, which suits the kernels that they were made for.
"""

from __future__ import annotations

import importlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from rdmaload.errors import LayoutMismatchError
from rdmaload.integrations.identity import check_identity
from rdmaload.integrations.metadata import EngineModel
from rdmaload.integrations.places import gathered, place
from rdmaload.node_group import NodeGroup

__all__ = [
    "AS_LOADED",
    "Ranks",
    "check_arguments",
    "check_as_loaded",
    "check_processed",
    "identity_of",
    "is_as_loaded",
    "sizes_here",
    "version",
]

AS_LOADED = "as loaded"

_DTYPES = {"half": "float16", "float": "float32"}
_Value = TypeVar("_Value")


def version() -> str:
    """This SGLang's version without what a build adds."""
    text = str(getattr(importlib.import_module("sglang.version"), "__version__", "unknown"))
    return re.split(r"\+", text)[0]


@dataclass(frozen=True)
class Ranks:
    """This process among the tensor-parallel ranks of one replica, which hold different weights."""

    rank: int
    size: int
    group: Any
    """SGLang's group of them; None outside of an engine."""

    @classmethod
    def here(cls) -> Ranks:
        """As SGLang has set its groups up; alone where it has none."""
        try:
            state: Any = importlib.import_module("sglang.srt.distributed.parallel_state")
            if not state.model_parallel_is_initialized():
                return cls(0, 1, None)
            group = state.get_tp_group()
        except (ImportError, AttributeError, AssertionError):
            return cls(0, 1, None)
        return cls(group.rank_in_group, group.world_size, group)

    def agree(self, value: _Value) -> _Value:
        """The first rank's `value`; every rank must call it."""
        if self.size == 1:
            return value
        agreed: _Value = self.group.broadcast_object(value, src=0)
        return agreed

    def node_group(self) -> NodeGroup | None:
        """Those ranks that run on this node; None where this one is alone there. Every rank must call it."""
        if self.size == 1:
            return None
        places = gathered(self.group, place())
        name = self.agree(f"sglang-{secrets.token_hex(12)}")  # of no other engine, whatever it loads
        here = [rank for rank, other in enumerate(places) if other == place()]
        return None if len(here) < 2 else NodeGroup(name, here.index(self.rank), len(here))


def sizes_here() -> dict[str, int]:
    """The sizes that decide which part of the weights a rank of this engine holds."""
    parallel = importlib.import_module("sglang.srt.runtime_context").get_parallel()
    return {
        "tp": int(parallel.tp_size),
        "pp": int(parallel.pp_size),
        "ep": int(parallel.ep_size),
        # With data-parallel attention a rank holds more of it than of the rest.
        "attention_tp": int(parallel.attn_tp_size),
        "moe_dense_tp": int(parallel.moe_dense_tp_size or 0),
    }


def identity_of(model_config: Any) -> dict[str, str]:
    """What the tensors depend on besides the parallel sizes."""
    architectures = getattr(model_config.hf_config, "architectures", None) or ["unknown"]
    return {
        "engine": "sglang",
        "version": version(),
        "architecture": str(architectures[0]),
        "quantization": str(model_config.quantization or "none"),
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "stage": AS_LOADED,
    }


def is_as_loaded(found: EngineModel) -> bool:
    """Whether a sharded model holds weights as vLLM or SGLang has loaded them, not yet changed for kernels."""
    return found.store_layout == "rdmaload" and found.identity.get("stage") == AS_LOADED


def check_as_loaded(found: EngineModel, model_config: Any, *, accept_version: bool) -> None:
    """Raise LayoutMismatchError unless the ranks of this engine can take such weights as they are."""
    check_identity(
        found.shown,
        saved=(found.layout, found.identity),
        here=(sizes_here(), identity_of(model_config)),
        ignored=("version",) if accept_version else (),
    )


def check_arguments(found: EngineModel, cfg: Any, *, accept_version: bool) -> None:
    """The same from what the arguments say so far, in the one process whose errors reach the user as they are."""
    if not is_as_loaded(found):
        _check_processed(found, int(getattr(cfg, "tp_size", found.world_size)))
        return
    given: dict[str, object] = {"tp": cfg.tp_size, "pp": cfg.pp_size, "ep": cfg.ep_size}
    layout: Mapping[str, int] = {**found.layout, **{name: int(str(size)) for name, size in given.items() if size}}
    identity = {**found.identity, "engine": "sglang", "version": version()}
    if cfg.dtype != "auto":
        identity["dtype"] = _DTYPES.get(cfg.dtype, cfg.dtype)
    if cfg.quantization:
        identity["quantization"] = cfg.quantization
    check_identity(
        found.shown,
        saved=(found.layout, found.identity),
        here=(layout, identity),
        ignored=("version",) if accept_version else (),
    )


def check_processed(found: EngineModel) -> None:
    """Raise LayoutMismatchError unless SGLang's remote loader can copy the weights of a sharded model as they are."""
    if is_as_loaded(found) and found.identity.get("engine") == "sglang":
        raise LayoutMismatchError(
            f"{found.shown} holds weights as `rdmaload save-sharded --engine sglang` saves them, which this SGLang "
            f"({version()}) has no place for: load the checkpoint that it was made from",
            url=found.shown,
        )
    ranks = Ranks.here()
    _check_processed(found, found.world_size if ranks.group is None else ranks.size)


def _check_processed(found: EngineModel, ranks: int) -> None:
    """SGLang itself would copy a smaller tensor into a part of its own, and go on."""
    if ranks != found.world_size:
        raise LayoutMismatchError(
            f"{found.shown} is sharded over {found.world_size} ranks, this engine has {ranks}: start it with --tp "
            f"{found.world_size}, or load the checkpoint that it was made from",
            url=found.shown,
        )
    engine = found.identity.get("engine", "sglang")
    if engine != "sglang":
        raise LayoutMismatchError(
            f"{found.shown} holds the weights of each rank for another engine:\n  engine: saved for {engine}, here "
            "sglang\nLoad the checkpoint that it was made from, which suits every engine.",
            url=found.shown,
        )

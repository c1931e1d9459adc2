"""How this vLLM is set up: the identity of the weights that its ranks hold, and which rank this is.

The front end compares it with a sharded model before any worker starts; every worker does so again.
"""

from __future__ import annotations

import importlib
import re
import threading
from typing import Any

from rdmaload.errors import LayoutMismatchError, NotSupportedError
from rdmaload.integrations import metadata, names
from rdmaload.integrations.identity import check_destination, check_identity
from rdmaload.integrations.metadata import EngineModel
from rdmaload.integrations.vllm.options import LoaderOptions

__all__ = ["check", "check_destination", "check_front_end", "identity_of", "parallel_of", "resolve", "version"]

_resolved: dict[str, EngineModel] = {}  # Guarded by _lock: by pinned url
_lock = threading.Lock()


def version() -> str:
    """This vLLM's version without what a build adds (0.32.0+cpu is 0.32.0)."""
    text = str(getattr(importlib.import_module("vllm"), "__version__", "unknown"))
    return re.split(r"\+", text)[0]


def resolve(url: str) -> EngineModel:
    """`resolve_model`, remembered for `check_front_end`."""
    found = metadata.resolve_model(url)
    with _lock:
        _resolved[names.engine_name(found.url)] = found
    return found


def parallel_of(parallel: Any) -> dict[str, int]:
    """The sizes that decide which part of the weights a rank holds, of a ParallelConfig or EngineArgs.

    Replicas (dp) hold the same unless experts are spread over them, too.
    """
    tp, pp = int(parallel.tensor_parallel_size), int(parallel.pipeline_parallel_size)
    dp = int(getattr(parallel, "data_parallel_size", 1))
    expert = bool(getattr(parallel, "enable_expert_parallel", False))
    if expert and int(getattr(parallel, "prefill_context_parallel_size", 1)) > 1:
        raise NotSupportedError("sharded models with expert and prefill context parallelism at once are not supported")
    return {"tp": tp, "pp": pp, "ep": tp * dp if expert else 1}


def identity_of(model_config: Any) -> dict[str, str]:
    """What the tensors depend on besides the parallel sizes."""
    return {
        "engine": "vllm",
        "version": version(),
        "architecture": str(model_config.architecture),
        "quantization": str(model_config.quantization or "none"),
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "stage": "as loaded",  # not yet changed for kernels
    }


def check(found: EngineModel, model_config: Any, parallel: Any, options: LoaderOptions) -> None:
    """Raise LayoutMismatchError unless this engine can take a sharded model as it is."""
    sizes = parallel_of(parallel)
    if found.store_layout == "rdmaload":
        ignored = ("version",) if options.accept_version else ()
        here = (sizes, identity_of(model_config))
        check_identity(found.shown, saved=(found.layout, found.identity), here=here, ignored=ignored)
    world_size = world_size_of(parallel)
    if found.world_size != world_size:
        raise LayoutMismatchError(
            f"{found.shown} is sharded over {found.world_size} ranks, this engine has {world_size}", url=found.shown
        )
    if found.store_layout != "rdmaload" and model_config.quantization:
        raise LayoutMismatchError(
            f"{found.shown} has no manifest that would say how its {model_config.quantization} weights were processed: "
            "save it with `rdmaload save-sharded`, or load the checkpoint",
            url=found.shown,
        )


def world_size_of(parallel: Any) -> int:
    """Ranks whose weights differ."""
    sizes = parallel_of(parallel)
    return sizes["pp"] * max(sizes["tp"], sizes["ep"])


def check_front_end(engine_args: Any, model_config: Any) -> None:
    """`check` where the model was resolved, before any worker starts: there an error reaches the user as it is."""
    if str(engine_args.load_format).lower() != "rdmaload":
        return
    options = LoaderOptions.parse(engine_args.model_loader_extra_config)
    with _lock:
        found = _resolved.get(getattr(model_config, "model_weights", ""))
    if found is not None and found.kind == "sharded":
        check(found, model_config, engine_args, options)
    if options.save_to is not None:
        check_destination(options.save_to)

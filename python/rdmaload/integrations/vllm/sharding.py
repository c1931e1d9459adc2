"""save_sharded: start vLLM's workers, let each load its part of a checkpoint and save it, and end them.

No scheduler, no KV cache, no server: only what the executor does to get the weights. The saving itself is the loader's
option `save_to` (loader.py).
"""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rdmaload.errors import NotSupportedError, RdmaloadError, UnavailableError
from rdmaload.integrations import names
from rdmaload.integrations.vllm import hooks, register, set_up

__all__ = ["save_sharded"]


def save_sharded(
    model: str | os.PathLike[str],
    url: str,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    layout: Literal["rdmaload", "sglang"] = "rdmaload",
    save_id: str | None = None,
    engine_args: Mapping[str, object] | None = None,
    loader_options: Mapping[str, object] | None = None,
) -> None:
    """Save the weights of every rank of a vLLM that is started for `model`, a directory or the url of a checkpoint.

    `engine_args` are further arguments of vLLM (dtype, quantization, enable_expert_parallel ...), `loader_options`
    those of the loader. Raises NotSupportedError without a vLLM that can, LayoutMismatchError for weights that
    cannot be saved per rank, UnavailableError when a worker fails: its own log says why.
    """
    set_up.check_destination(url)
    name = os.fspath(model)
    if not names.is_url(name) and not Path(name).is_dir():
        raise NotSupportedError(f"{name} is neither a directory nor a url")
    try:
        arg_utils: Any = importlib.import_module("vllm.engine.arg_utils")
    except ImportError as error:
        raise NotSupportedError(f"save-sharded needs vLLM in this environment: {error}") from error
    problems = hooks.loader_problems()
    if problems:
        raise NotSupportedError(hooks.unsupported(problems))
    register()
    save_id = save_id or f"vllm-{secrets.token_hex(12)}"
    arguments = arg_utils.EngineArgs(
        model=name,
        load_format="rdmaload",
        model_loader_extra_config={
            **(loader_options or {}),
            "save_to": url,
            "save_id": save_id,
            "save_layout": layout,
        },
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        **{"enforce_eager": True, **(engine_args or {})},
    )
    config = arguments.create_engine_config()
    _run_workers(config)


def _run_workers(config: Any) -> None:
    executor_class = importlib.import_module("vllm.v1.executor.abstract").Executor.get_class(config)
    try:
        executor = executor_class(config)
    except RdmaloadError:  # a worker in this process
        raise
    except RuntimeError as error:
        raise UnavailableError(
            f"vLLM's workers could not load and save the model, see their log above: {error}"
        ) from error
    executor.shutdown()

"""vLLM: `vllm serve redis://host:6379/llama`, with nothing patched by hand.

The entry point `vllm.general_plugins` calls `register` once in every process of vLLM, before it looks at the model's
name. It adds the load format `rdmaload` (loader.py) and makes urls valid names of models (hooks.py). For any other
model vLLM does what it does without us. RDMALOAD_VLLM_PLUGIN=0 leaves everything alone; so does a VLLM_PLUGINS
without "rdmaload".
"""

from __future__ import annotations

import logging
import os
import sys

__all__ = ["register"]

_log = logging.getLogger("rdmaload")


def register() -> None:
    """Called by vLLM. Never raises: an exception would end every vLLM on the machine, whatever its model."""
    if os.environ.get("RDMALOAD_VLLM_PLUGIN", "1").lower() in ("0", "false", "off"):
        return
    try:
        _register()
    except Exception:  # the edge to the engine, which has no other
        _log.warning("rdmaload's plug-in for vLLM is switched off by an error", exc_info=True)


def _register() -> None:
    from vllm.model_executor import model_loader

    from rdmaload.integrations.vllm import hooks

    registered = getattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", {})
    problems = hooks.loader_problems()
    if not problems and "rdmaload" not in registered:
        from rdmaload.integrations.vllm.loader import RdmaloadModelLoader

        model_loader.register_model_loader("rdmaload")(RdmaloadModelLoader)
    # Workers are given a finished configuration; importing this there would only cost time.
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    if arg_utils is not None:
        hooks.install(arg_utils, problems)

"""save_sharded: start SGLang, let each rank load its part of a checkpoint and save it, and end SGLang.

The saving itself is the loader's option `save_to` (loader.py). SGLang ends the whole process that started it when a
rank fails, so that it is started in one of its own: `python -m rdmaload.integrations.sglang_plugin.sharding ARGUMENTS`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Literal

from rdmaload import loading
from rdmaload.errors import LayoutMismatchError, NotSupportedError, UnavailableError
from rdmaload.integrations.identity import check_destination
from rdmaload.integrations.sglang_plugin import arguments

__all__ = ["save_sharded"]


def save_sharded(
    model: str | os.PathLike[str],
    url: str,
    *,
    tensor_parallel_size: int = 1,
    layout: Literal["rdmaload", "sglang"] = "rdmaload",
    save_id: str | None = None,
    engine_args: Mapping[str, object] | None = None,
    loader_options: Mapping[str, object] | None = None,
) -> None:
    """Save the weights of every rank of an SGLang that is started for `model`, a directory or the url of a checkpoint.

    `engine_args` are further arguments of SGLang's Engine (dtype, quantization, device ...), in JSON's types;
    `loader_options` those of the loader. Raises NotSupportedError without an SGLang that can, UnavailableError when
    SGLang or a rank fails: its own log says why.
    """
    check_destination(url)
    if importlib.util.find_spec("sglang") is None:
        raise NotSupportedError("save-sharded needs SGLang in this environment: pip install sglang")
    with loading.open(model, **(loader_options or {})) as stored:  # type: ignore[arg-type]  # names of Options
        if stored.kind == "sharded":
            raise LayoutMismatchError(
                f"{stored.url} is sharded already: give the checkpoint that it was made from", url=stored.url
            )
    extra = {
        **(loader_options or {}),
        "save_to": url,
        "save_id": save_id or f"sglang-{secrets.token_hex(12)}",
        "save_layout": layout,
    }
    given: dict[str, Any] = {
        "log_level": "info",
        "skip_server_warmup": True,
        "disable_cuda_graph": True,
        **(engine_args or {}),
        "model_path": os.fspath(model),
        "load_format": "rdmaload",
        "tp_size": tensor_parallel_size,
        "model_loader_extra_config": json.dumps(extra),
    }
    arguments.options_of(given)  # wrong options are refused before anything starts
    # By stdin: a url may hold a password, which a list of processes would show.
    done = subprocess.run([sys.executable, "-m", __name__], input=json.dumps(given), text=True, check=False)
    if done.returncode != 0:
        raise UnavailableError(
            f"SGLang could not load and save the model, see its log above (it ended with {done.returncode})"
        )


def _main() -> None:
    given = json.load(sys.stdin)
    engine_class = importlib.import_module("sglang").Engine
    hooks = importlib.import_module("rdmaload.integrations.sglang_plugin.hooks")
    plugins = importlib.import_module("sglang.srt.plugins")
    plugins.load_plugins()
    problems = hooks.loader_problems()
    if problems:
        raise NotSupportedError(hooks.unsupported(problems))
    engine_class(**given).shutdown()


if __name__ == "__main__":
    _main()

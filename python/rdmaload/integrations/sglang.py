"""SGLang: `python -m sglang.launch_server --model-path redis://host:6379/llama`, with nothing patched by hand.

The entry point `sglang.srt.plugins` calls `register` in every process. It hooks, by SGLang's own registry:

- the arguments, where a url is pinned and named, at a start and for update_weights_from_disk
  (sglang_plugin/arguments.py);
- `get_model_loader`, which gives a loader of ours for a url of ours (sglang_plugin/loader.py);
- `create_remote_connector`, whom SGLang asks for configuration and tokenizer, and for state in its own layout
  (sglang_plugin/connectors.py).

Each calls what it wraps for every other model, with the same arguments. RDMALOAD_SGLANG_PLUGIN=0 leaves everything
alone.
"""

from __future__ import annotations

import os

__all__ = ["register"]


def register() -> None:
    """Called by SGLang, which logs what a plug-in raises and goes on."""
    if os.environ.get("RDMALOAD_SGLANG_PLUGIN", "1").lower() in ("0", "false", "off"):
        return
    from rdmaload.integrations.sglang_plugin import hooks

    hooks.install()

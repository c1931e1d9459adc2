"""What changes in SGLang's arguments for a model of ours, at its start and for update_weights_from_disk.

Both are seen by one process before any rank hears of them: the generation is pinned here, for all of them.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rdmaload.errors import NotSupportedError, RdmaloadError, UrlError
from rdmaload.integrations import names
from rdmaload.integrations.identity import check_destination
from rdmaload.integrations.metadata import EngineModel, resolve_model
from rdmaload.integrations.sglang_plugin import set_up
from rdmaload.integrations.vllm.options import LoaderOptions
from rdmaload.urls import parse_url

__all__ = ["around_source_paths", "around_update", "options_of", "prepare"]

_log = logging.getLogger("rdmaload")

_SOURCE = "rdmaload"  # who decided, in SGLang's record of its arguments


def around_source_paths(server_args: Any, previous: Callable[[Any], None]) -> None:
    overrides = importlib.import_module("sglang.srt.arg_groups.overrides")
    changes = prepare(overrides.resolving_view(server_args))
    if changes:
        overrides.declare_resolution(server_args, _SOURCE, **changes)
    previous(server_args)


def prepare(cfg: Any) -> dict[str, object]:
    """What must change in SGLang's arguments for a model of ours; nothing for any other."""
    changes: dict[str, object] = {}
    draft = getattr(cfg, "speculative_draft_model_path", None)
    if names.is_ours(draft):
        changes["speculative_draft_model_path"] = _pinned(str(draft))
    path = _ours(cfg.model_path, cfg.load_format)
    if path is None:
        return changes
    if cfg.load_format not in ("auto", "remote", "rdmaload", "dummy"):
        raise NotSupportedError(f"--load-format {cfg.load_format} cannot read {names.shown_name(path)}: say rdmaload")
    options = options_of(cfg)
    if parse_url(names.store_url(path)).password:
        _log.warning(
            "%s holds a password, which SGLang shows among its arguments: say ?password_env=NAME or "
            "?password_file=PATH instead",
            names.shown_name(path),
        )
    found = resolve_model(names.store_url(path))
    if found.kind == "sharded":
        set_up.check_arguments(found, cfg, accept_version=options.accept_version)
    if options.save_to is not None:
        check_destination(options.save_to)
    pinned = names.engine_name(found.url)
    changes["model_path"] = pinned
    if cfg.load_format == "rdmaload":
        changes["load_format"] = "auto"  # which SGLang makes "remote", for every url
    if cfg.tokenizer_path in (None, cfg.model_path):
        changes["tokenizer_path"] = pinned
    elif names.is_ours(cfg.tokenizer_path):
        changes["tokenizer_path"] = _pinned(cfg.tokenizer_path)
    if cfg.served_model_name is None:
        # A colon would be an adapter's separator; the rest of the name says which model it is.
        changes["served_model_name"] = names.shown_name(path).partition("://")[2].partition("/")[2] or "model"
    return changes


def options_of(config: Any) -> LoaderOptions:
    """The options in SGLang's `model_loader_extra_config`. Raises UrlError for an unknown name or a wrong value."""
    name = "model_loader_extra_config"
    extra = (config.get(name) if isinstance(config, dict) else getattr(config, name, None)) or {}
    if isinstance(extra, str):
        try:
            extra = json.loads(extra)
        except ValueError as error:
            raise UrlError(f"--model-loader-extra-config is not JSON: {error}") from None
    options = LoaderOptions.parse(extra)
    if options.url is not None:
        raise UrlError("the loader's option url is for vLLM: give SGLang the url as --model-path")
    return options


def around_update(original: Callable[..., Any], manager: Any, request: Any, *arguments: Any, **keywords: Any) -> Any:
    """Around TokenizerManager.update_weights_from_disk, which gives the success, a message and a number."""
    if request.load_format != "rdmaload" and not names.is_ours(request.model_path):
        return original(manager, request, *arguments, **keywords)

    async def update() -> Any:
        try:
            found = await asyncio.to_thread(_resolved_for_update, request.model_path, request.load_format)
        except RdmaloadError as error:
            return False, f"Failed to update weights: {error}", 0
        request.model_path, request.load_format = names.engine_name(found.url), "auto"
        return await original(manager, request, *arguments, **keywords)

    return update()


def _resolved_for_update(path: str, load_format: str | None) -> EngineModel:
    url = _ours(path, load_format)
    assert url is not None
    found = resolve_model(names.store_url(url))
    if found.kind == "sharded":
        raise NotSupportedError(
            f"{found.shown} is sharded: weights cannot be reloaded from it while the engine runs; reload from the "
            "checkpoint that it was made from, or start the engine again",
            url=found.shown,
        )
    return found


def _ours(path: Any, load_format: Any) -> str | None:
    """The url of a model that is loaded by us: by its name, or as the load format asks for it."""
    asked = load_format == "rdmaload"
    if asked and not names.is_url(path) and Path(path).is_dir():
        return Path(path).absolute().as_uri()
    if names.is_ours(path) or (asked and names.is_url(path)):
        return str(path)
    if asked:
        raise NotSupportedError(f"--load-format rdmaload takes a directory or a url, not {path}")
    return None


def _pinned(name: str) -> str:
    return names.engine_name(resolve_model(names.store_url(name)).url)

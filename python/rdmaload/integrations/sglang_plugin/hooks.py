"""The places of SGLang that a url passes, and whether this version has them.

They are looked for before anything is hooked. Without those that every url needs, one of ours ends in one error that
says so and names the way round; without the others, what they are for is left out.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
from collections.abc import Callable
from typing import Any

from rdmaload.errors import NotSupportedError
from rdmaload.integrations import names
from rdmaload.integrations.sglang_plugin import arguments, connectors, loader, set_up

__all__ = ["install", "loader_problems"]

_log = logging.getLogger("rdmaload")

_CONNECTOR = "sglang.srt.connector.create_remote_connector"
_LOADER = "sglang.srt.model_loader.loader"
_UPDATE = "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_weights_from_disk"
_STEP = "handle_model_source_paths"


def install() -> None:
    """Register the hooks of this process."""
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")

    def around(target: str, hook: Callable[..., Any]) -> None:
        registry.HookRegistry.register(target, hook, registry.HookType.AROUND)

    problems = _missing(_CONNECTOR, ("url",))
    problems += _missing("sglang.srt.connector.BaseKVConnector", None)
    problems += _missing("sglang.srt.connector.BaseFileConnector", None)
    if problems:
        _guard(around, problems)
        return
    around(_CONNECTOR, connectors.around_create)
    absent = _hook_arguments(arguments.around_source_paths)
    if absent:
        # Older than 0.5.20: the connector alone serves every url but those of SGLang itself.
        _log.info(
            "this SGLang has no %s: --load-format rdmaload is not there, and a url needs a --served-model-name without "
            "a colon; `rdmaload pull URL DIR` and SGLang's own loader work as well",
            ", no ".join(absent),
        )
    absent = loader_problems()
    if absent:
        _log.info("this SGLang has no %s: urls are read by its remote loader, for a start only", ", no ".join(absent))
        return
    around(f"{_LOADER}.get_model_loader", loader.around_get_model_loader)
    if not _missing(f"{_LOADER}.RemoteModelLoader.save_model", ("model", "model_path", "url")):
        around(f"{_LOADER}.RemoteModelLoader.save_model", loader.around_save_model)
    absent = _missing(_UPDATE, ("self", "obj"))
    if absent:
        _log.info("this SGLang has no %s: update_weights_from_disk takes no urls", absent[0])
    else:
        around(_UPDATE, arguments.around_update)


def loader_problems() -> list[str]:
    """What the loader needs of this SGLang and does not find."""
    default = f"{_LOADER}.DefaultModelLoader"
    return [
        *_missing("sglang.srt.configs.load_config.LoadFormat.AUTO", None),
        *_missing("sglang.srt.runtime_context.get_parallel", ()),
        *_missing(f"{_LOADER}.get_model_loader", ("load_config", "model_config")),
        *_missing(f"{_LOADER}.post_load_weights", ("model",)),
        *_missing(f"{default}.load_model", ("self",)),
        *_missing(f"{default}._get_weights_iterator", ("self", "source")),
        *_missing(f"{default}.load_weights_and_postprocess", ("model", "weights", "target_device")),
        *_missing(f"{default}.load_weights_only", ("model", "weights", "target_device")),
        *_missing(f"{default}.postprocess_weights", ("model", "target_device")),
    ]


def unsupported(problems: list[str]) -> str:
    """The one text for an engine whose hooks have moved."""
    return (
        f"this SGLang ({set_up.version()}) is not one that rdmaload knows: it has no {', no '.join(problems)} as "
        "tested. Copy the model with `rdmaload pull URL DIR` and start SGLang with DIR and its own loader, or use a "
        "supported version (docs/engines.md)"
    )


def _hook_arguments(step: Callable[..., Any]) -> list[str]:
    """Have SGLang call `step` when it looks at the model's path; what is missing for that."""
    try:
        hooks = importlib.import_module("sglang.srt.arg_groups.resolution_hooks")
        choices = importlib.import_module("sglang.srt.arg_groups.choices")
        hooks.register_resolution_hook(_STEP)(step)
        choices.add_load_format_choices(["rdmaload"])
    except (ImportError, AttributeError, ValueError) as error:
        return [f"{_STEP} ({error})"]
    return []


def _guard(around: Callable[[str, Callable[..., Any]], None], problems: list[str]) -> None:
    """Let a url of ours end in one clear error wherever this SGLang looks at it first."""
    text = unsupported(problems)
    _log.warning("%s", text)

    def refuse_arguments(server_args: Any, previous: Callable[[Any], None]) -> None:
        view = getattr(importlib.import_module("sglang.srt.arg_groups.overrides"), "resolving_view", lambda args: args)
        cfg = view(server_args)
        if names.is_ours(cfg.model_path) or cfg.load_format == "rdmaload":
            raise NotSupportedError(text)
        previous(server_args)

    def refuse_url(original: Callable[..., Any], url: Any, *others: Any, **keywords: Any) -> Any:
        if names.is_ours(url):
            raise NotSupportedError(text)
        return original(url, *others, **keywords)

    _hook_arguments(refuse_arguments)
    if not _missing(_CONNECTOR, None):
        around(_CONNECTOR, refuse_url)


def _missing(target: str, needed: tuple[str, ...] | None) -> list[str]:
    """`target` itself, unless it is there and can be called with just these arguments in front of optional ones."""
    try:
        found = pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return [target.removeprefix("sglang.srt.")]
    if needed is not None and not _takes(found, needed):
        return [target.removeprefix("sglang.srt.")]
    return []


def _takes(function: object, needed: tuple[str, ...]) -> bool:
    if not callable(function):
        return False
    parameters = list(inspect.signature(function).parameters.values())
    return tuple(parameter.name for parameter in parameters[: len(needed)]) == needed and all(
        parameter.default is not parameter.empty
        or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.KEYWORD_ONLY)
        for parameter in parameters[len(needed) :]
    )

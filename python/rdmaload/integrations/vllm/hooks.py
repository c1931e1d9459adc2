"""The places of vLLM that a url passes on its way to a ModelConfig, and what we do there.

1. `arg_utils.is_cloud_storage` says yes to our urls, so that vLLM does not look for them on the Hugging Face hub
   (neither in `get_model_path`, nor for speculators).
2. `EngineArgs.create_model_config` gets load format, names and options right before, and checks a sharded model after.
3. `ModelConfig.maybe_pull_model_tokenizer_for_runai` brings the model's files, and puts a directory in the url's place.
4. `EngineArgs.from_cli_args` gives the served model a name without secrets.

Each calls what it wraps for every other model, with the same arguments. They are looked for first (`_problems`): where
one is missing or takes other arguments, none is installed, and a url of ours ends in one error that says so.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

from rdmaload.errors import NotSupportedError, UrlError
from rdmaload.integrations import metadata, names
from rdmaload.integrations.vllm import set_up
from rdmaload.integrations.vllm.options import LoaderOptions
from rdmaload.urls import parse_url

__all__ = ["install", "loader_problems"]

_log = logging.getLogger("rdmaload")

_PULL = "maybe_pull_model_tokenizer_for_runai"
_MARK = "_rdmaload_wraps"


def loader_problems() -> list[str]:
    """What the loader needs of this vLLM and does not find."""
    try:
        found = importlib.import_module("vllm.model_executor.model_loader.default_loader").DefaultModelLoader
    except (ImportError, AttributeError) as error:
        return [f"DefaultModelLoader ({error})"]
    problems = [
        f"DefaultModelLoader.{name}"
        for name, needed in (
            ("load_weights", ("self", "model", "model_config")),
            ("get_all_weights", ("self", "model_config", "model")),
            ("_get_weights_iterator", ("self", "source")),
        )
        if not _takes(getattr(found, name, None), needed)
    ]
    if not hasattr(found, "Source"):
        problems.append("DefaultModelLoader.Source")
    if not hasattr(importlib.import_module("vllm.model_executor.model_loader"), "register_model_loader"):
        problems.append("register_model_loader")
    return problems


def install(arg_utils: Any, problems: list[str]) -> None:
    """Wrap the places above in `vllm.engine.arg_utils`; or what is there of them, to say that `problems` were found."""
    engine_args, model_config = arg_utils.EngineArgs, arg_utils.ModelConfig
    if hasattr(engine_args.create_engine_config, _MARK):
        return
    problems = [*problems, *_problems(arg_utils)]
    if problems:
        _guard(arg_utils, problems)
        return
    _wrap(arg_utils, "is_cloud_storage", lambda original: lambda name: names.is_ours(name) or original(name))
    if hasattr(arg_utils, "get_model_path"):  # before 0.26 it is asked for every name
        _wrap(arg_utils, "get_model_path", _get_model_path)
    _wrap(engine_args, "create_model_config", _create_model_config)
    _wrap(engine_args, "create_engine_config", _create_engine_config)
    _wrap(engine_args, "from_cli_args", _from_cli_args)
    _wrap(model_config, _PULL, _pull)


def _problems(arg_utils: Any) -> list[str]:
    engine_args, model_config = arg_utils.EngineArgs, arg_utils.ModelConfig
    needed: list[tuple[str, object, tuple[str, ...]]] = [
        ("arg_utils.is_cloud_storage", getattr(arg_utils, "is_cloud_storage", None), ("model_or_path",)),
        ("EngineArgs.create_model_config", getattr(engine_args, "create_model_config", None), ("self",)),
        ("EngineArgs.from_cli_args", getattr(engine_args, "from_cli_args", None), ("args",)),
        (f"ModelConfig.{_PULL}", getattr(model_config, _PULL, None), ("self", "model", "tokenizer")),
    ]
    problems = [name for name, function, arguments in needed if not _takes(function, arguments)]
    fields = getattr(model_config, "__dataclass_fields__", {})
    return problems + [f"ModelConfig.{name}" for name in ("model_weights", "tokenizer") if name not in fields]


def _takes(function: object, arguments: tuple[str, ...]) -> bool:
    """Whether a function can be called with just these positional arguments, under these names."""
    if not callable(function):
        return False
    parameters = list(inspect.signature(function).parameters.values())
    named = tuple(parameter.name for parameter in parameters[: len(arguments)])
    return named == arguments and all(
        parameter.default is not parameter.empty or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        for parameter in parameters[len(arguments) :]
    )


def _wrap(owner: Any, name: str, wrapper: Callable[[Any], Callable[..., Any]]) -> None:
    raw = inspect.getattr_static(owner, name)
    original = raw.__func__ if isinstance(raw, classmethod) else raw
    wrapped = functools.wraps(original)(wrapper(original))
    setattr(wrapped, _MARK, True)
    setattr(owner, name, classmethod(wrapped) if isinstance(raw, classmethod) else wrapped)


def _guard(arg_utils: Any, problems: list[str]) -> None:
    """Let a url of ours end in one clear error wherever this vLLM looks at it first."""
    text = unsupported(problems)
    _log.info("%s", text)

    def refusing(original: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(first: Any, *arguments: Any, **keywords: Any) -> Any:
            name = first if isinstance(first, str) else getattr(first, "model", None)
            asked = str(getattr(first, "load_format", "")).lower() == "rdmaload"
            if names.is_ours(name) or asked:
                raise NotSupportedError(text)
            return original(first, *arguments, **keywords)

        return guarded

    for owner, name in (
        (arg_utils, "get_model_path"),
        (arg_utils.EngineArgs, "create_model_config"),
        (arg_utils.EngineArgs, "create_engine_config"),
    ):
        if hasattr(owner, name):
            _wrap(owner, name, refusing)


def unsupported(problems: list[str]) -> str:
    """The one text for an engine whose hooks have moved."""
    return (
        f"this vLLM ({set_up.version()}) is not one that rdmaload knows: it has no {', no '.join(problems)} as tested. "
        "Copy the model with `rdmaload pull URL DIR` and start vLLM with DIR and its own loader, or use a supported "
        "version (docs/engines.md)"
    )


# ---- the hooks ---------------------------------------------------------------------------------


def _get_model_path(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_model_path(model: str, *arguments: Any, **keywords: Any) -> Any:
        return model if names.is_ours(model) else original(model, *arguments, **keywords)

    return get_model_path


def _create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *arguments: Any, **keywords: Any) -> Any:
        prepare(self)  # before the first look at the name, which is in there
        return original(self, *arguments, **keywords)

    return create_engine_config


def _create_model_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_model_config(self: Any, *arguments: Any, **keywords: Any) -> Any:
        ours = prepare(self)
        config = original(self, *arguments, **keywords)
        if ours:
            set_up.check_front_end(self, config)
        return config

    return create_model_config


def prepare(engine_args: Any) -> bool:
    """Make the arguments of an engine fit for a url of ours; whether its model is loaded by us. May be called again."""
    model, load_format = engine_args.model, str(engine_args.load_format).lower()
    asked = load_format == "rdmaload"
    if asked:
        options = LoaderOptions.parse(engine_args.model_loader_extra_config)
        if names.is_url(model) and options.url is not None:
            raise UrlError(f"the model and the loader's option url both name one; keep {names.shown_name(model)}")
    elif not names.is_ours(model):
        return False
    elif load_format == "auto":
        engine_args.load_format = "rdmaload"
        LoaderOptions.parse(engine_args.model_loader_extra_config)
    elif load_format != "dummy":  # which wants the configuration only
        raise NotSupportedError(
            f"--load-format {load_format} cannot read {names.shown_name(model)}: leave it out, or say rdmaload"
        )
    if names.is_url(model):
        _warn_of_password(model)
        if engine_args.served_model_name is None:
            engine_args.served_model_name = names.shown_name(model)
        if engine_args.tokenizer == model:
            engine_args.tokenizer = names.engine_name(model)
        engine_args.model = names.engine_name(model)
    return True


def _warn_of_password(model: str) -> None:
    if parse_url(names.store_url(model)).password:
        _log.warning(
            "%s holds a password, which vLLM shows in its log and at /v1/models: say ?password_env=NAME or "
            "?password_file=PATH instead",
            names.shown_name(model),
        )


def _from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_cli_args(cls: Any, args: Any) -> Any:
        model = str(getattr(args, "model", ""))
        asked = str(getattr(args, "load_format", "")).lower() == "rdmaload" and names.is_url(model)
        if (asked or names.is_ours(model)) and getattr(args, "served_model_name", None) is None:
            args.served_model_name = [names.shown_name(model)]  # else the server would call it by the whole url
        return original(cls, args)

    return from_cli_args


def _pull(original: Callable[..., Any]) -> Callable[..., Any]:
    def maybe_pull_model_tokenizer_for_runai(self: Any, model: str, tokenizer: str) -> Any:
        if not (names.is_ours(model) or names.is_ours(tokenizer)):
            return original(self, model, tokenizer)
        weights = None
        if names.is_ours(tokenizer) and tokenizer != model:
            self.tokenizer = str(metadata.resolve_model(names.store_url(tokenizer)).directory)
        if names.is_ours(model):
            found = set_up.resolve(names.store_url(model))
            weights = names.engine_name(found.url)
            self.model = str(found.directory)
            if tokenizer == model:
                self.tokenizer = self.model
        result = original(self, self.model, self.tokenizer)  # a tokenizer may be in a place that vLLM knows
        if weights is not None:
            self.model_weights = weights
        return result

    return maybe_pull_model_tokenizer_for_runai

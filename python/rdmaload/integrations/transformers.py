"""transformers and PEFT: models and adapters from a url.

    model = from_pretrained(AutoModelForCausalLM, "redis://10.0.0.5/llama", device="cuda:0")
    model = load_adapter(model, "redis://10.0.0.5/llama-lora")

Tensors arrive in their final memory on the device, and transformers makes them the model's parameters without a copy
where their dtype is the wanted one; what it renames, fuses or ties on the way is its own business as with files.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdmaload import loading
from rdmaload.errors import LayoutMismatchError, NotSupportedError
from rdmaload.integrations.metadata import EngineModel, resolve_model
from rdmaload.integrations.modules import materialize

if TYPE_CHECKING:
    import torch

__all__ = ["from_pretrained", "load_adapter", "load_tokenizer", "materialize"]

_SHOWN_NAMES = 5


def from_pretrained(
    auto_class: type[Any],
    url: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    config: object = None,
    strict: bool = True,
    trust_remote_code: bool = False,
    model_kwargs: Mapping[str, object] | None = None,
    **opts: object,
) -> Any:
    """The model at `url` as an instance of `auto_class` (AutoModelForCausalLM, or a model's own class), in eval mode.

    Args:
        device: where the parameters are; another device than "cpu" needs accelerate.
        dtype: None and "auto" keep what the configuration says.
        config: a configuration to use instead of the stored one.
        strict: refuse a model of which parameters are not stored, which transformers would fill with random numbers.
        trust_remote_code: run code that comes with the model.
        model_kwargs: further arguments of transformers' from_pretrained (attn_implementation ...).
        **opts: options of the store (docs/settings.md).

    Raises LayoutMismatchError for missing or differing parameters, NotSupportedError without transformers, or when
    `auto_class` has no model for the configuration, and what `load` raises.
    """
    transformers = _imported("transformers")
    found = _resolved(url, opts)
    if config is None:
        config = transformers.AutoConfig.from_pretrained(found.directory, trust_remote_code=trust_remote_code)
    model_class = _model_class(auto_class, config, found, trust_remote_code)
    arguments: dict[str, object] = dict(model_kwargs or {})
    if dtype is not None:
        arguments["dtype"] = dtype
    if str(device) != "cpu":
        arguments["device_map"] = {"": device}
    with loading.open(found.url, **opts) as stored:  # type: ignore[arg-type]  # names of Options
        state = stored.load(device=device)
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, **arguments
    )
    missing = sorted(report["missing_keys"])
    mismatched = [str(entry) for entry in report["mismatched_keys"]]
    if strict and (missing or mismatched):
        names = missing or mismatched
        more = ", ..." if len(names) > _SHOWN_NAMES else ""
        what = "not stored" if missing else "of another shape"
        raise LayoutMismatchError(
            f"{found.shown}: {len(names)} parameters of {model_class.__name__} are {what} "
            f"({', '.join(names[:_SHOWN_NAMES])}{more}); strict=False leaves them at random numbers",
            url=found.shown,
        )
    if (found.directory / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(found.directory)
    return model


def load_tokenizer(url: str | Path, *, trust_remote_code: bool = False, **opts: object) -> Any:
    """The tokenizer that lies beside the model at `url`. Raises what `pull_files` and transformers raise."""
    found = _resolved(url, opts)
    return _imported("transformers").AutoTokenizer.from_pretrained(found.directory, trust_remote_code=trust_remote_code)


def load_adapter(
    model: Any, url: str | Path, *, adapter_name: str = "default", is_trainable: bool = False, **opts: object
) -> Any:
    """`model` with the PEFT adapter (LoRA and others) at `url`: a PeftModel, or the same one with one adapter more.

    Adapters are small: all their files go into a directory, from which PEFT reads them. Raises NotSupportedError
    without peft, and what `pull_files` and peft raise.
    """
    peft = _imported("peft")
    found = resolve_model(str(url), weights=True, **opts)  # type: ignore[arg-type]  # names of Options
    if isinstance(model, peft.PeftModel):
        model.load_adapter(str(found.directory), adapter_name, is_trainable=is_trainable)
        return model
    return peft.PeftModel.from_pretrained(model, found.directory, adapter_name=adapter_name, is_trainable=is_trainable)


def _resolved(url: str | Path, opts: Mapping[str, object]) -> EngineModel:
    return resolve_model(str(url), **opts)  # type: ignore[arg-type]  # names of Options


def _model_class(auto_class: type[Any], config: Any, found: EngineModel, trust_remote_code: bool) -> type[Any]:
    mapping = getattr(auto_class, "_model_mapping", None)
    if mapping is None:
        return auto_class
    remote = (getattr(config, "auto_map", None) or {}).get(auto_class.__name__)
    if remote is not None and trust_remote_code:
        modules = importlib.import_module("transformers.dynamic_module_utils")
        made: type[Any] = modules.get_class_from_dynamic_module(remote, found.directory)
        return made
    try:
        known = mapping[type(config)]
    except KeyError:
        hint = "; its own code needs trust_remote_code=True" if remote is not None else ""
        raise NotSupportedError(
            f"{found.shown}: {auto_class.__name__} has no model for {type(config).__name__}{hint}", url=found.shown
        ) from None
    chosen: type[Any] = known[0] if isinstance(known, (list, tuple)) else known
    return chosen


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotSupportedError(f"this needs the package {name}: pip install {name} ({error})") from error

"""The parts of SGLang 0.5.23 that our plug-in touches, with their names, signatures and order of calls.

`install(monkeypatch)` puts the modules into sys.modules. Connectors of SGLang's own, whose constructors install signal
handlers, fail when they are constructed or closed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

__all__ = ["FakeSglang", "LoadFormat", "Model", "install"]


class HookType(enum.Enum):
    AROUND = "around"


class LoadFormat(str, enum.Enum):
    AUTO = "auto"
    DUMMY = "dummy"
    REMOTE = "remote"


class BaseConnector:
    def __init__(self, url: str) -> None:
        raise AssertionError("installs signal handlers")

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        raise AssertionError("removes the directory")

    def __enter__(self) -> BaseConnector:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Model(nn.Module):
    """Its own loading doubles what is stored for `packed`, as engines pack weights; kernels negate it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(6), requires_grad=False)
        self.packed = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
        self.calls: list[str] = []

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.get_parameter("packed" if name == "b" else name).copy_(tensor * 2 if name == "b" else tensor)
        self.post_load_weights()

    def post_load_weights(self) -> None:
        self.calls.append("post_load_weights")


class DefaultModelLoader:
    @dataclasses.dataclass
    class Source:
        model_or_path: str
        revision: str | None = None
        prefix: str = ""
        allow_patterns_overrides: list[str] | None = None
        model_config: Any = None

        @classmethod
        def init_new(cls, model_config: Any, model: nn.Module) -> Any:
            patterns = getattr(model, "allow_patterns_overrides", None)
            return cls(model_config.model_path, None, "", patterns, model_config)

    def __init__(self, load_config: Any) -> None:
        assert load_config.load_format == LoadFormat.AUTO
        assert load_config.model_loader_extra_config == {}  # unknown keys are an error
        self.load_config = load_config

    def _get_weights_iterator(self, source: Any, *, resolved_source: Any = None) -> Iterator[tuple[str, torch.Tensor]]:
        yield "own", torch.tensor(float(len(source.model_or_path)))

    def _get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._get_weights_iterator(self.Source.init_new(model_config, model))
        for source in getattr(model, "secondary_weights", ()):
            yield from self._get_weights_iterator(source)

    def load_model(self, *, model_config: Any, device_config: Any) -> nn.Module:
        model = model_config.make_model()
        self.load_weights_and_postprocess(model, self._get_all_weights(model_config, model), torch.device("cpu"))
        return model  # type: ignore[no-any-return]

    @staticmethod
    def load_weights_and_postprocess(model: Any, weights: Any, target_device: Any) -> None:
        DefaultModelLoader.load_weights_only(model, weights, target_device)
        DefaultModelLoader.postprocess_weights(model, target_device)

    @staticmethod
    def load_weights_only(model: Any, weights: Any, target_device: Any) -> None:
        model.load_weights(weights)

    @staticmethod
    def postprocess_weights(model: Any, target_device: Any) -> None:
        model.calls.append("postprocess")
        model.packed.neg_()

    @staticmethod
    def _filter_mtp_weights(weights: Any, prefix: str, index: int) -> Any:
        return ((prefix + name, tensor) for name, tensor in weights if name.endswith(f".{index}"))


class RemoteModelLoader:
    def __init__(self, load_config: Any) -> None:
        assert load_config.load_format == LoadFormat.REMOTE

    saved: ClassVar[list[tuple[str, str]]] = []

    @staticmethod
    def save_model(model: Any, model_path: str, url: str) -> None:
        RemoteModelLoader.saved.append((model_path, url))


def get_model_loader(load_config: Any, model_config: Any = None) -> Any:
    if model_config is not None and getattr(model_config, "quantization", None) == "bitsandbytes":
        return types.SimpleNamespace(reads="files")
    return (
        RemoteModelLoader(load_config)
        if load_config.load_format == LoadFormat.REMOTE
        else DefaultModelLoader(load_config)
    )


def create_remote_connector(url: str, device: str | None = None, **keywords: Any) -> Any:
    return ("theirs", url, device)


class TokenizerManager:
    updates: ClassVar[list[tuple[str, str | None]]] = []

    async def update_weights_from_disk(self, obj: Any, request: Any = None) -> tuple[bool, str, int]:
        self.updates.append((obj.model_path, obj.load_format))
        return True, "done", 0


class FakeSglang:
    """What the plug-in registers, applied at once as SGLang's `apply_hooks` would."""

    def __init__(self) -> None:
        self.hooks: dict[str, Any] = {}
        self.steps: dict[str, Any] = {}
        self.choices: list[str] = ["auto"]
        self.declared: dict[str, object] = {}
        self.kv = type("BaseKVConnector", (BaseConnector,), {})
        self.fs = type("BaseFileConnector", (BaseConnector,), {})
        self.parallel = types.SimpleNamespace(tp_size=1, pp_size=1, ep_size=1, attn_tp_size=1, moe_dense_tp_size=None)
        self.modules = {each.__name__: each for each in self._modules()}

    # ---- what SGLang does ------------------------------------------------------------------------

    def call(self, target: str, original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        hook = self.hooks.get(f"sglang.srt.{target}")
        return original(*arguments, **keywords) if hook is None else hook(original, *arguments, **keywords)

    def create(self, url: str, device: str | None = None) -> Any:
        return self.call("connector.create_remote_connector", create_remote_connector, url, device)

    def start(self, **arguments: Any) -> dict[str, Any]:
        """The arguments after resolution."""
        defaults = {"load_format": "auto", "tokenizer_path": None, "served_model_name": None, "dtype": "auto"}
        defaults |= {"tp_size": 1, "pp_size": 1, "ep_size": 1, "quantization": None}
        given = {**defaults, **arguments}
        self.declared.clear()
        self.steps["handle_model_source_paths"](types.SimpleNamespace(**given), lambda _: None)
        shown = {name: given[name] for name in ("model_path", "load_format", "tokenizer_path", "served_model_name")}
        return {**shown, **self.declared}

    def model_config(self, model_path: str, **more: Any) -> Any:
        """As SGLang's ModelConfig makes it: a url is pulled and remembered."""
        config = types.SimpleNamespace(
            model_path=model_path,
            quantization=None,
            dtype=torch.bfloat16,
            hf_config=types.SimpleNamespace(architectures=["LlamaForCausalLM"]),
            make_model=Model,
        )
        if "://" in model_path:
            client = self.create(model_path)
            client.pull_files(allow_pattern=["*config.json"])
            config.model_weights, config.model_path = model_path, client.get_local_dir()
        vars(config).update(more)
        return config

    def loader(self, config: Any, load_format: LoadFormat = LoadFormat.REMOTE, **extra: Any) -> Any:
        load_config = types.SimpleNamespace(load_format=load_format, model_loader_extra_config=extra)
        return self.call("model_loader.loader.get_model_loader", get_model_loader, load_config, config)

    def load(self, config: Any, **extra: Any) -> Any:
        return self.loader(config, **extra).load_model(model_config=config, device_config=None)

    def update(self, model_path: str, load_format: str | None = None) -> Any:
        request = types.SimpleNamespace(model_path=model_path, load_format=load_format)
        target, manager = "managers.tokenizer_manager.TokenizerManager.update_weights_from_disk", TokenizerManager()
        return asyncio.run(self.call(target, TokenizerManager.update_weights_from_disk, manager, request))

    def save_remote_model(self, model_path: str, url: str) -> None:
        target = "model_loader.loader.RemoteModelLoader.save_model"
        self.call(target, RemoteModelLoader.save_model, Model(), model_path, url)

    # ---- its modules -----------------------------------------------------------------------------

    def _modules(self) -> Iterator[types.ModuleType]:
        def module(name: str, **members: Any) -> types.ModuleType:
            made = types.ModuleType(name)
            made.__dict__.update(members, __path__=[])
            made.__spec__ = importlib.machinery.ModuleSpec(name, None)
            return made

        def register(target: str, hook: Any, hook_type: HookType) -> None:
            assert hook_type is HookType.AROUND
            self.hooks[target] = hook

        for name in (
            "",
            ".srt",
            ".srt.arg_groups",
            ".srt.configs",
            ".srt.managers",
            ".srt.model_loader",
            ".srt.plugins",
        ):
            yield module(f"sglang{name}")
        yield module("sglang.version", __version__="0.5.23")
        registry = types.SimpleNamespace(register=register)
        yield module("sglang.srt.plugins.hook_registry", HookRegistry=registry, HookType=HookType)
        yield module(
            "sglang.srt.arg_groups.resolution_hooks",
            register_resolution_hook=lambda name: lambda step: self.steps.setdefault(name, step),
        )
        yield module("sglang.srt.arg_groups.choices", add_load_format_choices=self.choices.extend)
        yield module(
            "sglang.srt.arg_groups.overrides",
            resolving_view=lambda args: args,
            declare_resolution=lambda args, source, **fields: self.declared.update(fields),
        )
        yield module(
            "sglang.srt.connector",
            BaseKVConnector=self.kv,
            BaseFileConnector=self.fs,
            create_remote_connector=create_remote_connector,
        )
        yield module("sglang.srt.configs.load_config", LoadFormat=LoadFormat)
        yield module("sglang.srt.runtime_context", get_parallel=lambda: self.parallel)
        yield module(
            "sglang.srt.model_loader.loader",
            DefaultModelLoader=DefaultModelLoader,
            RemoteModelLoader=RemoteModelLoader,
            get_model_loader=get_model_loader,
            post_load_weights=lambda model: model.post_load_weights(),
        )
        yield module("sglang.srt.managers.tokenizer_manager", TokenizerManager=TokenizerManager)

    def set_ranks(self, group: Any) -> None:
        """Inside of an engine: its group of tensor-parallel ranks."""
        state = types.ModuleType("sglang.srt.distributed.parallel_state")
        state.__dict__.update(model_parallel_is_initialized=lambda: True, get_tp_group=lambda: group)
        distributed = types.ModuleType("sglang.srt.distributed")
        distributed.__dict__.update(__path__=[], parallel_state=state)
        sys.modules.update({distributed.__name__: distributed, state.__name__: state})
        self.parallel.tp_size = self.parallel.attn_tp_size = group.world_size


def install(monkeypatch: pytest.MonkeyPatch) -> FakeSglang:
    made = FakeSglang()
    for name, module in made.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            monkeypatch.setattr(made.modules[parent], child, module, raising=False)
    for name in ("sglang.srt.distributed", "sglang.srt.distributed.parallel_state"):
        monkeypatch.setitem(sys.modules, name, None)  # outside of an engine
    TokenizerManager.updates.clear()
    RemoteModelLoader.saved.clear()
    return made

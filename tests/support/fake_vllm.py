"""The parts of vLLM 0.32 that our plug-in touches, with their names, signatures and order of calls, without the rest.

`install(monkeypatch)` puts the modules into sys.modules. What a url must not reach (the Hugging Face hub) raises.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

__all__ = ["FakeVllm", "install"]


class HubError(Exception):
    """vLLM has asked the hub for a name."""


def is_cloud_storage(model_or_path: str) -> bool:
    return model_or_path.lower().startswith(("s3://", "gs://", "az://"))


def get_model_path(model: str, revision: str | None = None) -> str:
    if Path(model).exists():
        return model
    raise HubError(model)


@dataclasses.dataclass
class LoadConfig:
    load_format: str = "auto"
    model_loader_extra_config: Any = dataclasses.field(default_factory=dict)
    device: str | None = None
    download_dir: str | None = None
    ignore_patterns: Any = None


@dataclasses.dataclass
class ModelConfig:
    model: str
    tokenizer: str | None = None
    served_model_name: Any = None
    model_weights: str = ""
    dtype: torch.dtype = torch.bfloat16
    quantization: str | None = None
    revision: str | None = None
    runner_type: str = "generate"
    architecture: str = "LlamaForCausalLM"
    load_config: Any = None  # of what is a VllmConfig in vLLM

    def __post_init__(self) -> None:
        name = self.served_model_name or self.model
        self.served_model_name = name[0] if isinstance(name, list) else name
        self.tokenizer = self.tokenizer or self.model
        self.maybe_pull_model_tokenizer_for_runai(self.model, self.tokenizer)
        if not Path(self.model).exists():
            raise HubError(self.model)

    def maybe_pull_model_tokenizer_for_runai(self, model: str, tokenizer: str) -> None:
        if self.model_weights:
            return
        if is_cloud_storage(model) or is_cloud_storage(tokenizer):
            raise HubError(f"runai: {model} {tokenizer}")


@dataclasses.dataclass
class EngineArgs:
    model: str = ""
    tokenizer: str | None = None
    served_model_name: Any = None
    load_format: str = "auto"
    model_loader_extra_config: Any = dataclasses.field(default_factory=dict)
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    dtype: torch.dtype = torch.bfloat16
    quantization: str | None = None
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        from rdmaload.integrations.vllm import register  # what load_general_plugins finds

        register()
        arg_utils: Any = sys.modules["vllm.engine.arg_utils"]
        if arg_utils.offline and not arg_utils.is_cloud_storage(self.model):
            self.model = arg_utils.get_model_path(self.model, None)

    @classmethod
    def from_cli_args(cls, args: Any) -> EngineArgs:
        return cls(**{name: value for name, value in vars(args).items() if value is not None})

    def create_model_config(self) -> ModelConfig:
        arg_utils: Any = sys.modules["vllm.engine.arg_utils"]
        config: ModelConfig = arg_utils.ModelConfig(
            model=self.model,
            tokenizer=self.tokenizer,
            served_model_name=self.served_model_name,
            dtype=self.dtype,
            quantization=self.quantization,
        )
        return config

    def create_engine_config(self, usage_context: Any = None, headless: bool = False) -> ModelConfig:
        arg_utils: Any = sys.modules["vllm.engine.arg_utils"]
        if not arg_utils.is_cloud_storage(self.model) and not Path(self.model).exists():
            raise HubError(f"speculators: {self.model}")
        config = self.create_model_config()
        config.load_config = LoadConfig(self.load_format, self.model_loader_extra_config)
        self.model, self.tokenizer = config.model, config.tokenizer
        if config.model_weights and is_cloud_storage(config.model_weights):
            raise HubError("load_format must be runai_streamer")
        return config


class DefaultModelLoader:
    @dataclasses.dataclass
    class Source:
        model_or_path: str
        revision: str | None
        prefix: str = ""

    def __init__(self, load_config: LoadConfig) -> None:
        if set(load_config.model_loader_extra_config):
            raise ValueError("Unexpected extra config keys")
        if load_config.load_format != "auto":
            raise ValueError(f"Unknown load_format: {load_config.load_format}")
        self.load_config = load_config
        self.local_expert_ids: set[int] | None = None

    def _get_weights_iterator(self, source: Source) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{source.prefix}of.{source.model_or_path}", torch.ones(1)

    def get_all_weights(self, model_config: ModelConfig, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        raise AssertionError("rdmaload's own is used")

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        model.load_weights(self.get_all_weights(model_config, model))


class Group:
    """A group of ranks: `first` is what its first rank sends, and every rank is on a node of its own."""

    def __init__(self, rank: int, size: int, first: Any = None) -> None:
        self.rank_in_group = rank
        self.world_size = size
        self.first = first

    def broadcast_object(self, obj: Any = None, src: int = 0) -> Any:
        assert src == 0
        if self.rank_in_group == 0:
            self.first = obj
            return obj
        return self.first

    @property
    def cpu_group(self) -> Group:
        return self


def all_gather_object(values: list[Any], value: Any, group: Group) -> None:
    """torch.distributed's, for the groups above; a real process group goes its way."""
    if not isinstance(group, Group):
        return _all_gather_object(values, value, group=group)
    values[:] = [value if rank == group.rank_in_group else _of(rank, value) for rank in range(group.world_size)]
    return None


def _of(rank: int, value: Any) -> Any:
    return [_of(rank, each) for each in value] if isinstance(value, list) else f"{rank} {value}"


_all_gather_object = torch.distributed.all_gather_object


class Layers(torch.nn.Module):
    """A model with two layers, one tied name and vLLM's scales."""

    def __init__(self, rows: int = 4) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(rows, 8)
        self.proj = torch.nn.Linear(8, rows, bias=False)
        self.lm_head = torch.nn.Linear(8, rows, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("_k_scale", torch.ones(()))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        state = self.state_dict()
        loaded = set()
        for name, tensor in weights:
            if name in state:
                state[name].copy_(tensor)
            loaded.add(name)
        self.loaded = loaded
        return loaded


def _copy_of(cls: type) -> type:
    members = {name: member for name, member in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, cls.__bases__, members)


class FakeVllm:
    """The modules, and what a test changes of them."""

    def __init__(self) -> None:
        self.formats: dict[str, type] = {"auto": DefaultModelLoader}
        self.make_model: Any = Layers
        self.shut_down = False
        self.arg_utils: Any = types.ModuleType("vllm.engine.arg_utils")
        # Classes of their own for every test, as they are wrapped.
        self.arg_utils.EngineArgs = _copy_of(EngineArgs)
        self.arg_utils.ModelConfig = _copy_of(ModelConfig)
        self.arg_utils.is_cloud_storage = is_cloud_storage
        self.arg_utils.get_model_path = get_model_path
        self.arg_utils.offline = True
        self.parallel_state: Any = types.ModuleType("vllm.distributed.parallel_state")
        self.parallel_state.model_parallel_is_initialized = lambda: True
        self.set_ranks()
        self.loader_module: Any = types.ModuleType("vllm.model_executor.model_loader.default_loader")
        self.loader_module.DefaultModelLoader = DefaultModelLoader

    def set_ranks(self, tp: Group | None = None, pp: Group | None = None, dp: Group | None = None) -> None:
        groups = {"tp": tp or Group(0, 1), "pp": pp or Group(0, 1), "dp": dp or Group(0, 1)}
        for name, group in groups.items():
            setattr(self.parallel_state, f"get_{name}_group", lambda group=group: group)
        sizes = types.SimpleNamespace(
            tensor_parallel_size=groups["tp"].world_size,
            pipeline_parallel_size=groups["pp"].world_size,
            data_parallel_size=groups["dp"].world_size,
            enable_expert_parallel=False,
        )
        self.vllm_config = types.SimpleNamespace(parallel_config=sizes)

    def modules(self) -> dict[str, types.ModuleType]:
        def module(name: str, **members: Any) -> types.ModuleType:
            made = types.ModuleType(name)
            made.__dict__.update(members)
            return made

        def register_model_loader(name: str) -> Any:
            def wrapper(cls: type) -> type:
                assert name not in self.formats, "vLLM warns of this"
                self.formats[name] = cls
                return cls

            return wrapper

        model_loader = module(
            "vllm.model_executor.model_loader",
            register_model_loader=register_model_loader,
            _LOAD_FORMAT_TO_MODEL_LOADER=self.formats,
            __path__=[],
        )
        distributed = module("vllm.distributed", parallel_state=self.parallel_state, __path__=[])
        skips = module(
            "vllm.model_executor.model_loader.ep_weight_filter",
            should_skip_weight=lambda name, experts: (
                ".experts." in name and int(name.split(".experts.")[1].split(".")[0]) not in experts
            ),
        )
        fake = self

        class Executor:
            """Starts the workers, here one in this process."""

            @staticmethod
            def get_class(config: Any) -> type:
                return Executor

            def __init__(self, config: Any) -> None:
                print("an engine logs to stdout")
                loader: Any = fake.formats[config.load_config.load_format]
                loader(config.load_config).load_weights(fake.make_model(), config)

            def shutdown(self) -> None:
                fake.shut_down = True

        platform = types.SimpleNamespace(device_type="cpu")
        made = [
            module("vllm", __version__="0.32.0+cpu", __path__=[]),
            module("vllm.config", get_current_vllm_config=lambda: self.vllm_config),
            module("vllm.engine", __path__=[]),
            self.arg_utils,
            module("vllm.model_executor", model_loader=model_loader, __path__=[]),
            model_loader,
            self.loader_module,
            skips,
            distributed,
            self.parallel_state,
            module("vllm.v1", __path__=[]),
            module("vllm.v1.executor", __path__=[]),
            module("vllm.v1.executor.abstract", Executor=Executor),
            module("vllm.platforms", current_platform=platform),
        ]
        return {each.__name__: each for each in made}

    def loader(self, **extra: Any) -> Any:
        """A loader as vLLM builds it."""
        return self.formats["rdmaload"](LoadConfig("rdmaload", extra))  # type: ignore[call-arg]


def install(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    """A fake vLLM until the test ends, without a hook of ours yet."""
    fake = FakeVllm()
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "rdmaload.integrations.vllm.loader", raising=False)
    monkeypatch.delenv("RDMALOAD_VLLM_PLUGIN", raising=False)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    return fake

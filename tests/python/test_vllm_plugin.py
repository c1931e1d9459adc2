"""The plug-in for vLLM without vLLM: tests/support/fake_vllm.py has its names, signatures and order of calls."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import rdmaload
from rdmaload.cli import main
from rdmaload.errors import LayoutMismatchError, NotFoundError, NotSupportedError, UrlError
from rdmaload.integrations import metadata, names
from rdmaload.integrations.vllm import hooks, register, set_up, sharding
from rdmaload.integrations.vllm.options import LoaderOptions
from rdmaload.integrations.vllm.ranks import Ranks
from rdmaload.node_group import NodeGroup
from tests.support import fake_vllm
from tests.support.fake_vllm import FakeVllm, Group, HubError, Layers


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeVllm]:
    monkeypatch.setenv("RDMALOAD_CACHE_DIR", str(tmp_path / "cache"))
    yield fake_vllm.install(monkeypatch)
    metadata.release()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return _checkpoint(tmp_path / "checkpoint", 0)


def _checkpoint(directory: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    directory.mkdir()
    tensors = {"embed.weight": torch.randn(4, 8), "proj.weight": torch.randn(4, 8)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"seed": seed}))
    return directory


@pytest.fixture
def url(checkpoint: Path, tmp_path: Path) -> str:
    url = f"memory://{tmp_path.name}/llama"
    rdmaload.save(checkpoint, url)
    return url


def _started(vllm: FakeVllm, model: str, **arguments: Any) -> Any:
    """The ModelConfig that a start of vLLM comes to."""
    return vllm.arg_utils.EngineArgs(model=model, **arguments).create_engine_config()


# ---- urls as names of models -------------------------------------------------------------------


@pytest.mark.parametrize("offline", [True, False])
def test_a_url_becomes_a_directory_and_a_pinned_url(vllm: FakeVllm, url: str, offline: bool) -> None:
    vllm.arg_utils.offline = offline
    arguments = vllm.arg_utils.EngineArgs(model=url)
    config = arguments.create_engine_config()
    assert arguments.load_format == "rdmaload"
    assert json.loads((Path(config.model) / "config.json").read_text()) == {"seed": 0}
    assert config.tokenizer == config.model
    assert config.served_model_name == url
    with rdmaload.open(url) as model:
        assert config.model_weights == f"{url}?generation={model.generation}"


def test_other_models_are_left_alone(vllm: FakeVllm, checkpoint: Path) -> None:
    """The same calls with the same arguments give the same objects, with the plug-in and without."""
    register()  # the first EngineArgs does so, too
    arguments = vllm.arg_utils.EngineArgs(model=str(checkpoint), tokenizer="tok", model_loader_extra_config={"a": 1})
    before = dict(vars(arguments))
    config = arguments.create_engine_config()
    assert {**before, "model": config.model} == vars(arguments)
    assert (config.model, config.tokenizer, config.model_weights) == (str(checkpoint), "tok", "")
    with pytest.raises(HubError, match="meta/llama"):
        vllm.arg_utils.EngineArgs(model="meta/llama")
    with pytest.raises(HubError, match="runai: s3://bucket/llama s3://bucket/llama"):
        _started(vllm, "s3://bucket/llama")
    with pytest.raises(HubError, match="xyz://h/m"):  # of nobody
        vllm.arg_utils.EngineArgs(model="xyz://h/m")


def test_an_engine_that_looks_for_every_name_finds_ours(vllm: FakeVllm, url: str, checkpoint: Path) -> None:
    """Before 0.26 `get_model_path` is asked whatever `is_cloud_storage` says."""
    register()
    assert vllm.arg_utils.get_model_path(url, None) == url
    assert vllm.arg_utils.get_model_path(str(checkpoint), None) == str(checkpoint)
    with pytest.raises(HubError):
        vllm.arg_utils.get_model_path("meta/llama", None)


def test_the_kill_switch(vllm: FakeVllm, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDMALOAD_VLLM_PLUGIN", "0")
    with pytest.raises(HubError):
        vllm.arg_utils.EngineArgs(model=url)
    assert "rdmaload" not in vllm.formats


def test_an_object_store_is_ours_only_when_asked_for(
    vllm: FakeVllm, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def resolve(url: str) -> Any:
        opened.append(url)
        return types.SimpleNamespace(url=f"{url}?generation=0", directory=checkpoint, kind="checkpoint")

    monkeypatch.setattr(metadata, "resolve_model", resolve)
    config = _started(vllm, "s3://bucket/llama", load_format="rdmaload")
    assert opened == ["s3://bucket/llama"]
    assert config.model == str(checkpoint)
    assert config.model_weights == "rdmaload+s3://bucket/llama?generation=0"  # or vLLM would want runai_streamer
    assert config.served_model_name == "s3://bucket/llama"


def test_a_tokenizer_from_another_url(vllm: FakeVllm, url: str, tmp_path: Path) -> None:
    other = f"memory://{tmp_path.name}/other"
    rdmaload.save(_checkpoint(tmp_path / "other", 1), other)
    config = _started(vllm, url, tokenizer=other)
    assert json.loads((Path(config.tokenizer) / "config.json").read_text()) == {"seed": 1}
    assert json.loads((Path(config.model) / "config.json").read_text()) == {"seed": 0}


def test_a_load_format_that_cannot_read_urls_is_refused(vllm: FakeVllm, url: str) -> None:
    with pytest.raises(NotSupportedError, match="--load-format tensorizer cannot read memory://"):
        _started(vllm, url, load_format="tensorizer")


def test_a_missing_model_is_one_clear_error(vllm: FakeVllm, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing"):
        _started(vllm, f"memory://{tmp_path.name}/nothing")


def test_secrets_are_in_no_name(vllm: FakeVllm, url: str, caplog: pytest.LogCaptureFixture) -> None:
    register()
    shown = names.shown_name("redis://me:secret@h:6379/llama?password=other")
    assert shown == "redis://h:6379/llama"
    args = types.SimpleNamespace(model="redis://me:secret@h:6379/llama", load_format="auto", served_model_name=None)
    vllm.arg_utils.offline = False
    arguments = vllm.arg_utils.EngineArgs.from_cli_args(args)
    assert args.served_model_name == ["redis://h:6379/llama"]
    with caplog.at_level(logging.WARNING, "rdmaload"):
        hooks.prepare(arguments)
    assert "password_env" in caplog.text
    assert "secret" not in caplog.text
    args = types.SimpleNamespace(model="meta/llama", load_format="auto", served_model_name=None)
    vllm.arg_utils.EngineArgs.from_cli_args(args)
    assert args.served_model_name is None


def test_an_engine_without_a_command_line_names_no_secret(vllm: FakeVllm, tmp_path: Path) -> None:
    arguments = vllm.arg_utils.EngineArgs(model=f"memory://me:secret@{tmp_path.name}/llama?connections=2")
    assert hooks.prepare(arguments)
    assert arguments.served_model_name == f"memory://{tmp_path.name}/llama"
    arguments.served_model_name = "mine"
    assert hooks.prepare(arguments)
    assert arguments.served_model_name == "mine"


def _without_field(fake: FakeVllm, name: str) -> None:
    fields = fake.arg_utils.ModelConfig.__dataclass_fields__
    fake.arg_utils.ModelConfig.__dataclass_fields__ = {each: fields[each] for each in fields if each != name}


def _with_method(fake: FakeVllm, name: str, method: Any) -> None:
    default = fake.loader_module.DefaultModelLoader
    fake.loader_module.DefaultModelLoader = type("DefaultModelLoader", (default,), {name: method})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda fake: _without_field(fake, "model_weights"), "ModelConfig.model_weights"),
        (lambda fake: _without_field(fake, "tokenizer"), "ModelConfig.tokenizer"),
        (
            lambda fake: setattr(fake.arg_utils.EngineArgs, "create_model_config", lambda self, of: None),
            "EngineArgs.create_model_config",
        ),
        (
            lambda fake: setattr(fake.arg_utils, "is_cloud_storage", lambda model_or_path, more: None),
            "arg_utils.is_cloud_storage",
        ),
        (
            lambda fake: _with_method(fake, "get_all_weights", lambda self, model: None),
            "DefaultModelLoader.get_all_weights",
        ),
        (
            lambda fake: _with_method(fake, "_get_weights_iterator", lambda self, source, more: None),
            "DefaultModelLoader._get_weights_iterator",
        ),
    ],
)
def test_every_place_is_looked_for_with_its_arguments(vllm: FakeVllm, change: Any, said: str) -> None:
    def problems() -> list[str]:
        return [*hooks.loader_problems(), *hooks._problems(vllm.arg_utils)]

    assert problems() == []
    change(vllm)
    assert problems() == [said]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda fake: delattr(fake.arg_utils, "is_cloud_storage"), "arg_utils.is_cloud_storage"),
        (lambda fake: delattr(fake.arg_utils.EngineArgs, "from_cli_args"), "EngineArgs.from_cli_args"),
        (
            lambda fake: setattr(
                fake.arg_utils.ModelConfig, "maybe_pull_model_tokenizer_for_runai", lambda self, model, also: None
            ),
            "ModelConfig.maybe_pull_model_tokenizer_for_runai",
        ),
        (
            lambda fake: setattr(fake.loader_module, "DefaultModelLoader", type("DefaultModelLoader", (), {})),
            "DefaultModelLoader.load_weights",
        ),
    ],
)
@pytest.mark.parametrize("offline", [True, False])
def test_a_hook_that_has_moved_is_one_clear_error(
    vllm: FakeVllm, url: str, checkpoint: Path, change: Any, said: str, offline: bool
) -> None:
    vllm.arg_utils.offline = False  # a plug-in comes too late for the first look, whatever it does
    change(vllm)
    register()
    vllm.arg_utils.offline = offline and hasattr(vllm.arg_utils, "is_cloud_storage")
    with pytest.raises(NotSupportedError, match=r"this vLLM \(0\.32\.0\).*rdmaload pull URL DIR") as caught:
        _started(vllm, url)
    assert said in str(caught.value)
    with pytest.raises(NotSupportedError, match="this vLLM"):
        _started(vllm, str(checkpoint), load_format="rdmaload")
    if hasattr(vllm.arg_utils, "is_cloud_storage"):
        assert _started(vllm, str(checkpoint)).model == str(checkpoint)


def test_registering_never_raises(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it fails
    register()
    assert "switched off" in caplog.text


def test_another_node_makes_its_own_directory(vllm: FakeVllm, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _started(vllm, url)
    shutil.rmtree(config.model)
    made = config.model
    default = vllm.loader_module.DefaultModelLoader
    monkeypatch.setattr(default, "load_model", lambda self, *arguments, **keywords: None, raising=False)
    vllm.loader().load_model(vllm_config=None, model_config=config, prefix="")
    assert config.model == made
    assert (Path(made) / "config.json").is_file()


def test_what_workers_are_sent_can_be_pickled(
    vllm: FakeVllm, url: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of another process or node get the finished configuration, and errors of the rank that pins."""
    arguments = vllm.arg_utils.EngineArgs(model=url, model_loader_extra_config={"connections": 2})
    config = arguments.create_engine_config()
    for each in (arguments, config, config.load_config):
        assert pickle.loads(pickle.dumps(vars(each))) == vars(each)
        for name, value in vars(each).items():  # nothing of ours, which a worker might have to import first
            assert not type(value).__module__.startswith("rdmaload"), name
    failed = Group(0, 2)
    vllm.set_ranks(tp=failed)
    config = vllm.arg_utils.ModelConfig(str(checkpoint))
    config.model = f"memory://{tmp_path.name}/nothing"
    with pytest.raises(NotFoundError) as raised:
        list(vllm.loader().get_all_weights(config, Layers()))
    received = pickle.loads(pickle.dumps(failed.first))
    assert type(received) is NotFoundError
    assert (str(received), received.url, received.key) == (str(raised.value), raised.value.url, raised.value.key)


# ---- options -----------------------------------------------------------------------------------


def test_unknown_options_are_refused_by_name(vllm: FakeVllm, url: str) -> None:
    with pytest.raises(UrlError, match="unknown option conections for load format rdmaload: did you mean connections"):
        _started(vllm, url, model_loader_extra_config={"conections": 2})
    with pytest.raises(UrlError, match="unknown option sav_to"):
        LoaderOptions.parse({"sav_to": "redis://h/m"})
    with pytest.raises(UrlError, match="device must be one of auto, cpu, target, not 'gpu'"):
        LoaderOptions.parse({"device": "gpu"})
    with pytest.raises(UrlError, match="read_once must be one of auto, on, off, not 'yes'"):
        LoaderOptions.parse({"read_once": "yes"})
    with pytest.raises(UrlError, match="accept_version must be a bool, not 'true'"):
        LoaderOptions.parse({"accept_version": "true"})
    with pytest.raises(UrlError, match="connections must be a whole number"):
        LoaderOptions.parse({"connections": "many"})
    with pytest.raises(UrlError, match="names and values, not a list"):
        LoaderOptions.parse([])


def test_a_url_given_twice_is_refused(vllm: FakeVllm, url: str) -> None:
    with pytest.raises(UrlError, match="both name one"):
        _started(vllm, url, load_format="rdmaload", model_loader_extra_config={"url": url})


# ---- a checkpoint ------------------------------------------------------------------------------


def _loaded(vllm: FakeVllm, config: Any, **extra: Any) -> Layers:
    model = Layers()
    vllm.loader(**extra).load_weights(model, config)
    return model


def test_a_checkpoint_goes_through_the_models_own_loading(vllm: FakeVllm, url: str) -> None:
    model = _loaded(vllm, _started(vllm, url))
    assert torch.equal(model.embed.weight, rdmaload.load(url)["embed.weight"])
    assert model.loaded == {"embed.weight", "proj.weight"}


def test_a_directory_and_the_option_url(vllm: FakeVllm, checkpoint: Path, url: str, tmp_path: Path) -> None:
    config = _started(vllm, str(checkpoint), load_format="rdmaload")
    assert torch.equal(_loaded(vllm, config).proj.weight, rdmaload.load(checkpoint)["proj.weight"])
    metadata = tmp_path / "metadata"
    metadata.mkdir()
    config = vllm.arg_utils.ModelConfig(str(metadata))
    assert torch.equal(_loaded(vllm, config, url=url).proj.weight, rdmaload.load(url)["proj.weight"])
    draft = vllm.arg_utils.ModelConfig(str(checkpoint), runner_type="draft")
    assert vllm.loader(url=f"memory://{tmp_path.name}/nothing")._url(draft) == str(checkpoint)


def test_every_rank_reads_the_generation_that_was_resolved_first(vllm: FakeVllm, url: str, tmp_path: Path) -> None:
    """A save publishes between the start and the ranks' opens, and between two ranks."""
    old = rdmaload.load(url)
    config = _started(vllm, url)
    vllm.set_ranks(tp=Group(0, 2))
    first = _loaded(vllm, config)
    rdmaload.save(_checkpoint(tmp_path / "new", 7), url)
    vllm.set_ranks(tp=Group(1, 2))
    second = _loaded(vllm, config)
    assert not torch.equal(rdmaload.load(url)["proj.weight"], old["proj.weight"])
    assert torch.equal(first.proj.weight, old["proj.weight"])
    assert torch.equal(second.proj.weight, old["proj.weight"])
    assert json.loads((Path(config.model) / "config.json").read_text()) == {"seed": 0}


def test_ranks_agree_on_the_generation_of_a_reload(vllm: FakeVllm, url: str, tmp_path: Path) -> None:
    config = _started(vllm, url)
    config.model, config.model_weights = url, ""  # what reload_weights does
    group = Group(0, 2)
    vllm.set_ranks(tp=group)
    first = dict(vllm.loader().get_all_weights(config, Layers()))
    rdmaload.save(_checkpoint(tmp_path / "new", 7), url)
    vllm.set_ranks(tp=Group(1, 2, group.first))
    second = dict(vllm.loader().get_all_weights(config, Layers()))
    assert torch.equal(first["proj.weight"], second["proj.weight"])
    vllm.set_ranks()
    third = dict(vllm.loader().get_all_weights(config, Layers()))
    assert not torch.equal(first["proj.weight"], third["proj.weight"])


def test_all_ranks_hear_that_the_first_cannot_open(vllm: FakeVllm, tmp_path: Path, checkpoint: Path) -> None:
    register()
    config = vllm.arg_utils.ModelConfig(str(checkpoint))
    config.model = f"memory://{tmp_path.name}/nothing"
    group = Group(0, 2)
    vllm.set_ranks(tp=group)
    with pytest.raises(NotFoundError):
        list(vllm.loader().get_all_weights(config, Layers()))
    vllm.set_ranks(tp=Group(1, 2, group.first))
    with pytest.raises(NotFoundError):
        list(vllm.loader().get_all_weights(config, Layers()))


def test_what_the_model_does_not_want_is_not_read(vllm: FakeVllm, tmp_path: Path) -> None:
    directory = tmp_path / "moe"
    directory.mkdir()
    experts = {f"layer.experts.{number}.weight": torch.ones(100) for number in range(4)}
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, directory / "model-1.safetensors")
    save_file(experts, directory / "model-2.safetensors")
    config = _started(vllm, str(directory), load_format="rdmaload")
    model = Layers()
    loader = vllm.loader()
    loader.local_expert_ids = {1}
    model.is_unused_checkpoint_weight = lambda name: name == "b"  # type: ignore[assignment]
    assert {name for name, _ in loader.get_all_weights(config, model)} == {"a", "layer.experts.1.weight"}
    model.allow_patterns_overrides = ["model-1*"]  # type: ignore[assignment]
    assert {name for name, _ in loader.get_all_weights(config, model)} == {"a"}


def test_a_draft_model_reads_for_itself(vllm: FakeVllm, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every rank need load one."""
    monkeypatch.setattr(Ranks, "node_group", lambda _: pytest.fail("it waits for the others"))
    vllm.set_ranks(tp=Group(0, 2))
    config = _started(vllm, url)
    config.runner_type = "draft"
    assert torch.equal(_loaded(vllm, config).proj.weight, rdmaload.load(url)["proj.weight"])


def test_a_draft_model_takes_those_of_its_targets_options_that_its_store_knows(
    vllm: FakeVllm, checkpoint: Path
) -> None:
    register()
    draft = vllm.arg_utils.ModelConfig(str(checkpoint), runner_type="draft")
    with vllm.loader(url="redis://127.0.0.1:1/m", db=3, threads=3)._open(draft) as model:
        assert "proj.weight" in model.tensors
        assert model._connector.options.threads == 3
    target = vllm.arg_utils.ModelConfig(str(checkpoint), runner_type="generate")
    with pytest.raises(UrlError, match="db would have no effect on file"):
        vllm.loader(db=3)._open(target)


@pytest.mark.parametrize(
    ("read_once", "expected"), [("auto", [True, False]), ("on", [True, True]), ("off", [False] * 2)]
)
def test_a_directory_is_read_by_every_rank_unless_told_otherwise(
    vllm: FakeVllm, url: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, read_once: str, expected: list[bool]
) -> None:
    register()
    loader = vllm.loader(read_once=read_once)
    together = []

    def weights(model: Any, *, node: NodeGroup | None, **_: Any) -> Iterator[Any]:
        together.append(node is not None)
        return iter(())

    monkeypatch.setattr(sys.modules[type(loader).__module__], "checkpoint_weights", weights)
    monkeypatch.setattr(Ranks, "node_group", lambda _: NodeGroup("run", 0, 2))
    for name in (url, str(checkpoint)):
        list(loader.get_all_weights(_started(vllm, name, load_format="rdmaload"), Layers()))
    assert together == expected


def test_what_is_more_than_tensors_is_refused(vllm: FakeVllm, url: str) -> None:
    config = _started(vllm, url)
    config.quantization = "torchao"
    with pytest.raises(NotSupportedError, match=r"torchao checkpoints.*rdmaload pull"):
        _loaded(vllm, config)


def test_weights_from_elsewhere_are_loaded_by_vllm(vllm: FakeVllm, url: str) -> None:
    config = _started(vllm, url)
    model = Layers()
    source = vllm.loader_module.DefaultModelLoader.Source
    model.secondary_weights = [source("vision", None, "tower.")]  # type: ignore[assignment]
    assert "tower.of.vision" in dict(vllm.loader().get_all_weights(config, model))
    model.secondary_weights = [source(config.model, None)]  # type: ignore[assignment]
    with pytest.raises(NotSupportedError, match="rdmaload pull"):
        list(vllm.loader().get_all_weights(config, model))


# ---- sharded -----------------------------------------------------------------------------------


def _save_ranks(vllm: FakeVllm, config: Any, target: str, size: int = 2, **extra: Any) -> list[Layers]:
    models = []
    first = None
    for rank in range(size):
        group = Group(rank, size, first)
        vllm.set_ranks(tp=group)
        model = Layers()
        with torch.no_grad():
            model._k_scale.fill_(2.0 + rank)  # type: ignore[operator]
        loader = vllm.loader(save_to=target, **extra)
        loader.load_weights(model, config)
        first = group.first
        models.append(model)
    return models


def test_ranks_save_and_load_their_state(vllm: FakeVllm, url: str, tmp_path: Path) -> None:
    target = f"memory://{tmp_path.name}/sharded"
    config = _started(vllm, url)
    saved = _save_ranks(vllm, config, target)
    with rdmaload.open(target) as model:
        assert (model.kind, model.world_size) == ("sharded", 2)
        assert model.manifest is not None
        assert dict(model.manifest.layout) == {"tp": 2, "pp": 1, "ep": 1}
        assert model.manifest.identity["version"] == "0.32.0"
        assert model.rank_tensors(0).keys() == {"embed.weight", "proj.weight", "lm_head.weight", "_k_scale"}
    config = _started(vllm, target, tensor_parallel_size=2)
    assert (Path(config.model) / "model.safetensors").is_file()  # the checkpoint's header
    assert json.loads((Path(config.model) / "config.json").read_text()) == {"seed": 0}
    for rank, expected in enumerate(saved):
        vllm.set_ranks(tp=Group(rank, 2))
        loaded = _loaded(vllm, config).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.state_dict().items())
        assert float(loaded["_k_scale"]) == 2.0 + rank
    with pytest.raises(NotSupportedError, match="reload"):
        list(vllm.loader().get_all_weights(config, Layers()))


def test_another_replica_and_a_draft_model_save_nothing(vllm: FakeVllm, url: str, tmp_path: Path) -> None:
    target = f"memory://{tmp_path.name}/sharded"
    config = _started(vllm, url)
    vllm.set_ranks(dp=Group(1, 2))  # the first replica saves the same
    vllm.loader(save_to=target).load_weights(Layers(), config)
    vllm.set_ranks()
    config.runner_type = "draft"
    vllm.loader(save_to=target).load_weights(Layers(), config)
    with pytest.raises(NotFoundError):
        rdmaload.open(target)


def test_a_save_that_has_a_name_waits_for_no_rank(
    vllm: FakeVllm, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank may have failed to load meanwhile, and would never come to agree on anything."""
    monkeypatch.setattr(Ranks, "agree", lambda *_, **__: pytest.fail("it waits"))
    target = f"memory://{tmp_path.name}/sharded"
    config = _started(vllm, url)
    for rank in range(2):
        vllm.set_ranks(tp=Group(rank, 2))
        vllm.loader(save_to=target, save_id="mine", read_once="off").load_weights(Layers(), config)
    with rdmaload.open(target) as model:
        assert model.world_size == 2


def test_another_identity_is_refused_before_any_worker_starts(vllm: FakeVllm, url: str, tmp_path: Path) -> None:
    target = f"memory://{tmp_path.name}/sharded"
    _save_ranks(vllm, _started(vllm, url), target)
    with pytest.raises(LayoutMismatchError) as caught:
        _started(vllm, target, tensor_parallel_size=4, dtype=torch.float16, quantization="fp8")
    for line in ("tp: saved for 2, here 4", "dtype: saved for bfloat16, here float16"):
        assert f"  {line}\n" in str(caught.value)
    assert "quantization: saved for none, here fp8" in str(caught.value)
    # And by every worker.
    config = _started(vllm, target, tensor_parallel_size=2)
    vllm.set_ranks()
    with pytest.raises(LayoutMismatchError, match="tp: saved for 2, here 1"):
        _loaded(vllm, config)


def test_another_version_is_refused_unless_it_is_accepted(
    vllm: FakeVllm, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f"memory://{tmp_path.name}/sharded"
    _save_ranks(vllm, _started(vllm, url), target, 1)
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.33.0")
    with pytest.raises(LayoutMismatchError, match=r"version: saved for 0\.32\.0, here 0\.33\.0"):
        _started(vllm, target)
    config = _started(vllm, target, model_loader_extra_config={"accept_version": True})
    vllm.set_ranks()
    _loaded(vllm, config, accept_version=True)


def test_a_checkpoint_is_not_taken_for_a_ranks_state(vllm: FakeVllm, url: str, tmp_path: Path) -> None:
    """The state of a model that has other tensors than the engine's, of the same identity."""
    target = f"memory://{tmp_path.name}/sharded"
    config = _started(vllm, url)
    _save_ranks(vllm, config, target, 1)
    vllm.set_ranks()
    model = Layers()
    model.more = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(LayoutMismatchError, match="1 not stored \\(more\\)"):
        vllm.loader().load_weights(model, _started(vllm, target))


def test_scales_that_another_engine_does_not_save_keep_their_default(vllm: FakeVllm, tmp_path: Path, url: str) -> None:
    target = f"memory://{tmp_path.name}/from-sglang"
    state = {name: tensor for name, tensor in Layers().state_dict().items() if name != "_k_scale"}
    rdmaload.save(state, target, layout="sglang", rank=0, world_size=1)
    register()
    config = vllm.arg_utils.ModelConfig(str(tmp_path))
    config.model_weights = target
    model = Layers()
    model.attn = torch.nn.Module()  # type: ignore[assignment]
    model.attn.register_buffer("_k_scale", torch.ones(()))  # type: ignore[operator, union-attr]
    del model._k_scale
    vllm.loader().load_weights(model, config)
    assert torch.equal(model.proj.weight, state["proj.weight"])
    assert float(model.attn._k_scale) == 1.0  # type: ignore[arg-type]
    vllm.set_ranks(tp=Group(0, 2))  # a rank would find its names, and rows of another size or, worse, of the same
    with pytest.raises(LayoutMismatchError, match="sharded over 1 ranks, this engine has 2"):
        vllm.loader(read_once="off").load_weights(model, config)
    vllm.set_ranks()
    config.quantization = "fp8"
    with pytest.raises(LayoutMismatchError, match="no manifest"):
        vllm.loader().load_weights(model, config)


def test_weights_that_come_late_are_neither_saved_nor_loaded(vllm: FakeVllm, url: str, tmp_path: Path) -> None:
    target = f"memory://{tmp_path.name}/sharded"
    config = _started(vllm, url)
    model = Layers()
    model.proj.quant_method = types.SimpleNamespace(uses_meta_device=True)  # type: ignore[assignment]
    with pytest.raises(LayoutMismatchError, match="proj is quantised while it is loaded"):
        vllm.loader(save_to=target).load_weights(model, config)
    model = Layers()
    model.late = torch.nn.Parameter(torch.empty(2, device="meta"))
    with pytest.raises(LayoutMismatchError, match="late is quantised while it is loaded"):
        vllm.loader(save_to=target).load_weights(model, config)


def test_a_save_without_room_for_the_identity_is_refused(vllm: FakeVllm, url: str, tmp_path: Path) -> None:
    with pytest.raises(NotSupportedError, match="keeps plain files"):
        sharding.save_sharded(url, str(tmp_path / "out"))
    with pytest.raises(NotSupportedError, match="keeps plain files"):
        _started(vllm, url, load_format="rdmaload", model_loader_extra_config={"save_to": str(tmp_path / "out")})
    with pytest.raises(NotSupportedError, match="neither a directory nor a url"):
        sharding.save_sharded("meta/llama", "memory://x/y")


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "sizes", "expected"),
    [
        ((1, 2), (0, 1), (1, 2), {"tp": 2, "pp": 1, "ep": 1}, 1),
        ((1, 2), (2, 3), (0, 1), {"tp": 2, "pp": 3, "ep": 1}, 5),
        ((1, 2), (0, 1), (1, 2), {"tp": 2, "pp": 1, "ep": 4}, 3),
    ],
)
def test_the_rank_that_weights_are_saved_under(
    vllm: FakeVllm, tp: Any, pp: Any, dp: Any, sizes: dict[str, int], expected: int
) -> None:
    vllm.set_ranks(Group(*tp), Group(*pp), Group(*dp))
    assert Ranks.here().weights_rank(sizes) == expected


def test_replicas_hold_the_same_unless_experts_are_spread_over_them() -> None:
    sizes = types.SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=3, data_parallel_size=4)
    assert set_up.parallel_of(sizes) == {"tp": 2, "pp": 3, "ep": 1}
    assert set_up.world_size_of(sizes) == 6
    sizes.enable_expert_parallel = True
    assert set_up.parallel_of(sizes) == {"tp": 2, "pp": 3, "ep": 8}
    assert set_up.world_size_of(sizes) == 24
    sizes.prefill_context_parallel_size = 2
    with pytest.raises(NotSupportedError, match="context parallelism"):
        set_up.parallel_of(sizes)


def test_save_sharded_from_the_command_line(
    vllm: FakeVllm, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = f"memory://{tmp_path.name}/sharded"
    command = ["save-sharded", "--model", str(checkpoint), "--url", target, "--engine-arg", "quantization=null"]
    assert main([*command, "--json"]) == 0
    output = capfd.readouterr()
    assert "an engine logs" in output.err
    report = json.loads(output.out)  # and nothing else
    assert report["world_size"] == 1
    assert report["layout"] == {"tp": 1, "pp": 1, "ep": 1}
    assert report["identity"]["quantization"] == "none"
    assert vllm.shut_down
    with rdmaload.open(target) as model:
        assert torch.equal(model.load(rank=0)["proj.weight"], rdmaload.load(checkpoint)["proj.weight"])
        assert "config.json" in {file.path for file in model.files}


def test_exit_codes_of_save_sharded(
    vllm: FakeVllm, checkpoint: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f"memory://{tmp_path.name}/sharded"
    command = ["save-sharded", "--model", str(checkpoint), "--url", target]

    def late() -> Layers:
        model = Layers()
        model.proj.quant_method = types.SimpleNamespace(uses_meta_device=True)  # type: ignore[assignment]
        return model

    vllm.make_model = late
    assert main(command) == 7
    vllm.make_model = Layers
    assert main(command) == 0
    # What was sharded for another set-up is no source either.
    again = ["save-sharded", "--model", target, "--url", f"{target}-2"]
    assert main([*again, "-tp", "2"]) == 7
    assert main([*command, "-tp", "0"]) == 2
    assert main([*command, "--engine-arg", "load_format=dummy"]) == 2
    assert main([*command, "--engine-arg", "dtype"]) == 2
    assert main([*command, "-o", "conections=2"]) == 2
    assert main(["save-sharded", "--model", "meta/llama", "--url", target]) == 2
    assert main(["save-sharded", "--model", f"{url}-not", "--url", target]) == 3
    assert main(["save-sharded", "--model", str(checkpoint), "--url", str(tmp_path / "out")]) == 8

    def dies() -> Layers:
        raise RuntimeError("worker died")

    vllm.make_model = dies
    assert main(command) == 6
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", None)
    assert main(command) == 8

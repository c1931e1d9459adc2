"""The plug-in for SGLang without SGLang: fakes with the names and signatures of its plug-in road and connectors."""

from __future__ import annotations

import enum
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import rdmaload
from rdmaload.errors import LayoutMismatchError, NotFoundError, NotSupportedError
from rdmaload.integrations import metadata, sglang
from tests.support.servers import RedisServer


class HookType(enum.Enum):
    AROUND = "around"


class BaseConnector:
    def __init__(self, url: str) -> None:
        raise AssertionError("installs signal handlers")

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        raise AssertionError("removes the directory")


class Fake:
    """What the plug-in registers, and SGLang's own connector function behind it."""

    def __init__(self) -> None:
        self.hooks: dict[str, Any] = {}
        self.steps: dict[str, Any] = {}
        self.choices: list[str] = ["auto"]
        self.declared: dict[str, object] = {}
        self.kv = type("BaseKVConnector", (BaseConnector,), {})
        self.fs = type("BaseFileConnector", (BaseConnector,), {})

    def create(self, url: str, device: str | None = None) -> Any:
        def original(url: str, device: str | None = None) -> Any:
            return ("theirs", url, device)

        return self.hooks["sglang.srt.connector.create_remote_connector"](original, url, device)

    def start(self, **arguments: Any) -> dict[str, Any]:
        """The arguments after resolution."""
        defaults = {"load_format": "auto", "tokenizer_path": None, "served_model_name": None}
        args = types.SimpleNamespace(**{**defaults, **arguments})
        self.steps["handle_model_source_paths"](args, lambda _: None)
        return {**vars(args), **self.declared}

    def modules(self) -> dict[str, types.ModuleType]:
        def module(name: str, **members: Any) -> types.ModuleType:
            made = types.ModuleType(name)
            made.__dict__.update(members, __path__=[])
            return made

        def register(target: str, hook: Any, hook_type: HookType) -> None:
            assert hook_type is HookType.AROUND
            self.hooks[target] = hook

        registry = types.SimpleNamespace(register=register)
        made = [
            *(module(name) for name in ("sglang", "sglang.srt", "sglang.srt.plugins", "sglang.srt.arg_groups")),
            module("sglang.srt.plugins.hook_registry", HookRegistry=registry, HookType=HookType),
            module(
                "sglang.srt.arg_groups.resolution_hooks",
                register_resolution_hook=lambda name: lambda step: self.steps.setdefault(name, step),
            ),
            module("sglang.srt.arg_groups.choices", add_load_format_choices=self.choices.extend),
            module(
                "sglang.srt.arg_groups.overrides",
                resolving_view=lambda args: args,
                declare_resolution=lambda args, source, **fields: self.declared.update(fields),
            ),
            module("sglang.srt.connector", BaseKVConnector=self.kv, BaseFileConnector=self.fs),
        ]
        return {each.__name__: each for each in made}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Fake]:
    made = Fake()
    for name, module in made.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("RDMALOAD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("RDMALOAD_SGLANG_PLUGIN", raising=False)
    sglang._classes.cache_clear()
    sglang.register()
    yield made
    sglang._classes.cache_clear()
    metadata.release()


@pytest.fixture
def url(tmp_path: Path) -> str:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 3)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"seed": 0}))
    url = f"memory://{tmp_path.name}/org/llama"
    rdmaload.save(directory, url)
    return url


def test_a_url_is_pinned_and_named(fake: Fake, url: str) -> None:
    with rdmaload.open(url) as model:
        pinned = f"{url}?generation={model.generation}"
    assert fake.start(model_path=url) == {
        "model_path": pinned,
        "tokenizer_path": pinned,
        "load_format": "auto",
        "served_model_name": "org/llama",  # SGLang refuses a colon
    }


def test_the_load_format_makes_directories_ours(fake: Fake, tmp_path: Path, url: str) -> None:
    assert fake.choices == ["auto", "rdmaload"]
    found = fake.start(model_path=str(tmp_path / "checkpoint"), load_format="rdmaload", served_model_name="x")
    assert found["model_path"] == f"file://{tmp_path}/checkpoint"
    assert (found["load_format"], found["served_model_name"]) == ("auto", "x")
    with pytest.raises(NotSupportedError, match="takes a directory or a url, not meta/llama"):
        fake.start(model_path="meta/llama", load_format="rdmaload")
    with pytest.raises(NotSupportedError, match="--load-format gguf cannot read"):
        fake.start(model_path=url, load_format="gguf")


def test_an_object_store_is_ours_only_when_asked_for(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = types.SimpleNamespace(url="s3://bucket/llama")
    monkeypatch.setattr(sglang, "resolve_model", lambda url: resolved)
    assert fake.start(model_path="s3://bucket/llama", load_format="rdmaload")["model_path"] == (
        "rdmaload+s3://bucket/llama"
    )
    fake.declared.clear()
    assert fake.start(model_path="s3://bucket/llama")["model_path"] == "s3://bucket/llama"


def test_other_models_are_left_alone(fake: Fake, tmp_path: Path) -> None:
    for path in ("meta/llama", str(tmp_path), "s3://bucket/m", "xyz://h/m"):
        fake.start(model_path=path, load_format="auto")
        assert fake.declared == {}
    assert fake.create("s3://bucket/m", "cuda") == ("theirs", "s3://bucket/m", "cuda")
    assert fake.create("instance://h/m") == ("theirs", "instance://h/m", None)


def test_the_kill_switch(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.hooks.clear()
    monkeypatch.setenv("RDMALOAD_SGLANG_PLUGIN", "0")
    sglang.register()
    assert fake.hooks == {}


def test_an_older_sglang_has_the_connector_alone(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "sglang.srt.arg_groups.resolution_hooks", None)
    fake.hooks.clear()
    with caplog.at_level("INFO", "rdmaload"):
        sglang.register()
    assert list(fake.hooks) == ["sglang.srt.connector.create_remote_connector"]
    assert "--served-model-name" in caplog.text


def test_a_checkpoint_is_a_file_connector(fake: Fake, url: str) -> None:
    client = fake.create(url)
    assert isinstance(client, fake.fs)
    client.pull_files(allow_pattern=["*config.json"])
    directory = Path(client.get_local_dir())
    assert json.loads((directory / "config.json").read_text()) == {"seed": 0}
    assert {name: tensor.tolist() for name, tensor in client.weight_iterator()} == {
        "a": [0, 1, 2, 3, 4, 5],
        "b": [[1, 1, 1], [1, 1, 1]],
    }
    client.close()
    assert directory.is_dir()


def _ranks(url: str, **more: Any) -> None:
    shared = torch.arange(4.0)
    for rank in range(2):
        state = {"z.embed": shared, "head": shared, "w": torch.full((3,), float(rank)), "empty": torch.empty(0)}
        rdmaload.save(state, url, rank=rank, world_size=2, **more)


@pytest.mark.parametrize("layout", ["sglang", "rdmaload"])
def test_a_sharded_model_is_a_key_value_connector(fake: Fake, tmp_path: Path, layout: str) -> None:
    url = f"memory://{tmp_path.name}/sharded"
    _ranks(url, **({"layout": layout} if layout == "sglang" else {"save_id": "s"}))
    client = fake.create(url)
    assert isinstance(client, fake.kv)
    for rank in range(2):
        found = {name: tensor.tolist() for name, tensor in client.weight_iterator(rank)}
        assert found == {
            "head": [0, 1, 2, 3],
            "w": [rank] * 3,
        }  # what SGLang looks for: one of tied names, no empty ones
    with pytest.raises(LayoutMismatchError, match="there is no rank 2"):
        next(client.weight_iterator(2))
    if layout == "rdmaload":
        with pytest.raises(NotSupportedError, match="not in SGLang's layout"):
            client.set("k", torch.ones(1))


def test_sglangs_own_saves_go_on_working(fake: Fake, tmp_path: Path) -> None:
    with RedisServer() as server:
        url = server.url("m")
        assert fake.create(url, "cpu") == ("theirs", url, "cpu")  # nothing is there: it may be about to save
        rdmaload.save({"w": torch.ones(1)}, url, layout="sglang")
        client = fake.create(url)
        written: list[Any] = []
        own = types.SimpleNamespace(set=lambda *pair: written.append(pair), close=lambda: written.append("closed"))
        client._make_own = lambda: own
        client.set("m/keys/rank_0/w", 5)
        client.close()
        client.close()
        assert written == [("m/keys/rank_0/w", 5), "closed"]
    with pytest.raises(NotFoundError):  # no scheme of SGLang's
        fake.create(f"memory://{tmp_path.name}/nothing")


def test_other_ranks_or_another_engine_are_refused(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://{tmp_path.name}/sharded"
    _ranks(url, save_id="s", identity={"engine": "vllm"})
    with pytest.raises(LayoutMismatchError, match="engine: saved for vllm, here"):
        next(fake.create(url).weight_iterator(0))
    distributed = types.ModuleType("sglang.srt.distributed")
    distributed.get_tensor_model_parallel_world_size = lambda: 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang.srt.distributed", distributed)
    with pytest.raises(LayoutMismatchError, match="sharded over 2 ranks, this engine has 1"):
        next(fake.create(url).weight_iterator(0))

"""The plug-in for SGLang without SGLang: fakes with the names and signatures of its plug-in road and connectors."""

from __future__ import annotations

import json
import pickle
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
from rdmaload.integrations import metadata, sglang
from rdmaload.integrations.sglang_plugin import arguments, connectors, loader, sharding
from tests.support.fake_sglang import FakeSglang, LoadFormat, Model, RemoteModelLoader, TokenizerManager, install
from tests.support.servers import RedisServer


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeSglang]:
    made = install(monkeypatch)
    monkeypatch.setenv("RDMALOAD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("RDMALOAD_SGLANG_PLUGIN", raising=False)
    _forget()
    sglang.register()
    yield made
    _forget()
    metadata.release()


def _forget() -> None:
    """Classes that were derived from those of an earlier fake."""
    connectors._classes.cache_clear()
    loader._class.cache_clear()


@pytest.fixture
def url(tmp_path: Path) -> str:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 3)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"seed": 0}))
    url = f"memory://{tmp_path.name}/org/llama"
    rdmaload.save(directory, url)
    return url


def test_a_url_is_pinned_and_named(fake: FakeSglang, url: str) -> None:
    with rdmaload.open(url) as model:
        pinned = f"{url}?generation={model.generation}"
    assert fake.start(model_path=url) == {
        "model_path": pinned,
        "tokenizer_path": pinned,
        "load_format": "auto",
        "served_model_name": "org/llama",  # SGLang refuses a colon
    }


def test_the_load_format_makes_directories_ours(fake: FakeSglang, tmp_path: Path, url: str) -> None:
    assert fake.choices == ["auto", "rdmaload"]
    found = fake.start(model_path=str(tmp_path / "checkpoint"), load_format="rdmaload", served_model_name="x")
    assert found["model_path"] == f"file://{tmp_path}/checkpoint"
    assert (found["load_format"], found["served_model_name"]) == ("auto", "x")
    with pytest.raises(NotSupportedError, match="takes a directory or a url, not meta/llama"):
        fake.start(model_path="meta/llama", load_format="rdmaload")
    with pytest.raises(NotSupportedError, match="--load-format gguf cannot read"):
        fake.start(model_path=url, load_format="gguf")


def test_an_object_store_is_ours_only_when_asked_for(fake: FakeSglang, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = types.SimpleNamespace(url="s3://bucket/llama", kind="checkpoint")
    monkeypatch.setattr(arguments, "resolve_model", lambda url: resolved)
    assert fake.start(model_path="s3://bucket/llama", load_format="rdmaload")["model_path"] == (
        "rdmaload+s3://bucket/llama"
    )
    fake.declared.clear()
    assert fake.start(model_path="s3://bucket/llama")["model_path"] == "s3://bucket/llama"


def test_other_models_are_left_alone(fake: FakeSglang, tmp_path: Path) -> None:
    for path in ("meta/llama", str(tmp_path), "s3://bucket/m", "xyz://h/m"):
        fake.start(model_path=path, load_format="auto")
        assert fake.declared == {}
    assert fake.create("s3://bucket/m", "cuda") == ("theirs", "s3://bucket/m", "cuda")
    assert fake.create("instance://h/m") == ("theirs", "instance://h/m", None)


def test_the_loader_of_another_model_is_sglangs(fake: FakeSglang, tmp_path: Path) -> None:
    for path in (str(tmp_path), "meta/llama"):
        assert type(fake.loader(fake.model_config(path), LoadFormat.AUTO)).__name__ == "DefaultModelLoader"
    for load_format in (LoadFormat.AUTO, LoadFormat.REMOTE):
        config = types.SimpleNamespace(model_path="/x", model_weights="s3://bucket/m", quantization=None)
        expected = "RemoteModelLoader" if load_format is LoadFormat.REMOTE else "DefaultModelLoader"
        assert type(fake.loader(config, load_format)).__name__ == expected
    assert type(fake.call("model_loader.loader.get_model_loader", lambda *a: a, 1, None)) is tuple
    assert fake.update("/dir", "auto") == (True, "done", 0)
    assert fake.update("s3://bucket/m") == (True, "done", 0)
    assert TokenizerManager.updates == [("/dir", "auto"), ("s3://bucket/m", None)]
    fake.save_remote_model("/dir", "redis://h/m")
    assert RemoteModelLoader.saved == [("/dir", "redis://h/m")]


def test_the_kill_switch(fake: FakeSglang, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.hooks.clear()
    monkeypatch.setenv("RDMALOAD_SGLANG_PLUGIN", "0")
    sglang.register()
    assert fake.hooks == {}


def test_an_older_sglang_has_the_connector_alone(
    fake: FakeSglang, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "sglang.srt.arg_groups.resolution_hooks", None)
    fake.hooks.clear()
    with caplog.at_level("INFO", "rdmaload"):
        sglang.register()
    assert "sglang.srt.connector.create_remote_connector" in fake.hooks
    assert "--served-model-name" in caplog.text


def test_a_checkpoint_is_a_file_connector(fake: FakeSglang, url: str) -> None:
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
def test_a_sharded_model_is_a_key_value_connector(fake: FakeSglang, tmp_path: Path, layout: str) -> None:
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


def test_sglangs_own_saves_go_on_working(fake: FakeSglang, tmp_path: Path) -> None:
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


def test_other_ranks_or_another_engine_are_refused(
    fake: FakeSglang, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{tmp_path.name}/sharded"
    _ranks(url, save_id="s", identity={"engine": "vllm"})
    with pytest.raises(LayoutMismatchError, match="engine: saved for vllm, here"):
        next(fake.create(url).weight_iterator(0))
    fake.set_ranks(types.SimpleNamespace(rank_in_group=0, world_size=1))
    with pytest.raises(LayoutMismatchError, match="sharded over 2 ranks, this engine has 1"):
        next(fake.create(url).weight_iterator(0))


# ---- its loader --------------------------------------------------------------------------------


def test_a_checkpoint_goes_through_the_models_own_loading(fake: FakeSglang, url: str) -> None:
    config = fake.model_config(str(fake.start(model_path=url)["model_path"]))
    model = fake.load(config)
    assert model.a.tolist() == [0, 1, 2, 3, 4, 5]
    assert model.packed.tolist() == [[-2] * 3] * 2
    assert model.calls == ["post_load_weights", "postprocess"]
    reading = fake.loader(config)
    assert isinstance(reading, sys.modules["sglang.srt.model_loader.loader"].DefaultModelLoader)
    source = reading.Source.init_new(config, Model())
    source.prefix, source.allow_patterns_overrides = "language_model.", ["*.none"]
    assert list(reading._get_weights_iterator(source)) == []
    source.allow_patterns_overrides = ["model*"]
    assert [name for name, _ in reading._get_weights_iterator(source)] == ["language_model.a", "language_model.b"]
    assert [name for name, _ in reading._get_weights_iterator(reading.Source("/elsewhere"))] == ["own"]
    with pytest.raises(NotSupportedError, match="another part of its directory"):
        reading._get_weights_iterator(reading.Source(config.model_path))
    with pytest.raises(NotSupportedError, match="overlap"):
        reading.resolve_model_weights(config, Model())


def test_a_save_between_the_arguments_and_a_ranks_load(fake: FakeSglang, tmp_path: Path, url: str) -> None:
    name = str(fake.start(model_path=url)["model_path"])
    save_file({"a": torch.full((6,), 7.0), "b": torch.zeros(2, 3)}, tmp_path / "checkpoint" / "model.safetensors")
    rdmaload.save(tmp_path / "checkpoint", url)
    assert fake.load(fake.model_config(name)).a.tolist() == [0, 1, 2, 3, 4, 5]
    assert fake.load(fake.model_config(url)).a.tolist() == [7] * 6


def test_a_loader_of_sglang_that_takes_other_files(fake: FakeSglang, url: str) -> None:
    with pytest.raises(NotSupportedError, match="rdmaload pull"):
        fake.loader(fake.model_config(url, quantization="bitsandbytes"))


def test_dummy_weights_stay_dummy(fake: FakeSglang, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = fake.model_config(url)
    original = lambda *given: given  # noqa: E731
    load_config = types.SimpleNamespace(load_format=LoadFormat.DUMMY, model_loader_extra_config={})
    given = fake.call("model_loader.loader.get_model_loader", original, load_config, config)
    assert given == (load_config, config)


def test_options_of_the_loader(fake: FakeSglang, url: str) -> None:
    extra = '{"connections": 2, "window_bytes": 4096}'
    assert fake.start(model_path=url, model_loader_extra_config=extra)["model_path"] != url
    with pytest.raises(UrlError, match=r"unknown option conections .* did you mean connections"):
        fake.start(model_path=url, model_loader_extra_config='{"conections": 2}')
    with pytest.raises(UrlError, match="not JSON"):
        fake.start(model_path=url, model_loader_extra_config="{")
    with pytest.raises(UrlError, match="give SGLang the url as --model-path"):
        fake.start(model_path=url, model_loader_extra_config={"url": url})
    with pytest.raises(UrlError, match="unknown option conections"):
        fake.loader(fake.model_config(url), conections=2)
    fake.start(model_path="meta/llama", model_loader_extra_config='{"num_threads": 2}')  # none of our business


def test_what_travels_to_the_ranks_can_be_pickled(fake: FakeSglang, url: str) -> None:
    """SGLang's processes are spawned with their arguments; each then asks for the plug-in and a loader itself."""
    found = fake.start(model_path=url)
    assert pickle.loads(pickle.dumps(found)) == found
    assert all(isinstance(value, str) for value in found.values())
    for hook in [*fake.hooks.values(), *fake.steps.values()]:
        assert pickle.loads(pickle.dumps(hook)) is hook


def test_a_draft_model_is_pinned(fake: FakeSglang, url: str) -> None:
    with rdmaload.open(url) as model:
        pinned = f"{url}?generation={model.generation}"
    fake.start(model_path="meta/llama", speculative_draft_model_path=url)
    assert fake.declared == {"speculative_draft_model_path": pinned}
    draft = fake.model_config(pinned)
    assert fake.loader(draft, LoadFormat.AUTO).rdmaload_found.url == pinned  # SGLang keeps the target's format


def test_a_password_is_warned_of(
    fake: FakeSglang, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = types.SimpleNamespace(url="redis://:secret@h/m", kind="checkpoint")
    monkeypatch.setattr(arguments, "resolve_model", lambda url: found)
    fake.start(model_path="redis://:secret@h/m")
    assert "password_env" in caplog.text
    assert "secret" not in caplog.text


# ---- update_weights_from_disk ------------------------------------------------------------------


def test_an_update_from_a_url(fake: FakeSglang, tmp_path: Path, url: str) -> None:
    with rdmaload.open(url) as model:
        pinned = f"{url}?generation={model.generation}"
    assert fake.update(url) == (True, "done", 0)
    assert fake.update(str(tmp_path / "checkpoint"), "rdmaload") == (True, "done", 0)
    assert TokenizerManager.updates == [(pinned, "auto"), (f"file://{tmp_path}/checkpoint", "auto")]
    config = fake.model_config("/elsewhere")
    config.model_path = pinned
    reading = fake.loader(config, LoadFormat.AUTO)
    model = Model()
    source = reading.Source.init_new(config, model)
    reading.load_weights_and_postprocess(model, reading._get_weights_iterator(source), None)
    assert model.a.tolist() == [0, 1, 2, 3, 4, 5]
    fake.save_remote_model(pinned, "redis://h/saved")  # whose files are those of the url
    directory = metadata.resolve_model(url).directory
    assert RemoteModelLoader.saved == [(str(directory), "redis://h/saved")]


def test_an_update_that_cannot_be_is_told_before_a_weight_is_touched(fake: FakeSglang, tmp_path: Path) -> None:
    done, text, _ = fake.update(f"memory://{tmp_path.name}/nothing")
    assert not done
    assert "nothing" in text
    _ranks(f"memory://{tmp_path.name}/sharded", save_id="s")
    done, text, _ = fake.update(f"memory://{tmp_path.name}/sharded")
    assert not done
    assert "cannot be reloaded" in text
    done, text, _ = fake.update("meta/llama", "rdmaload")  # which its ranks would end at
    assert not done
    assert "takes a directory or a url, not meta/llama" in text
    assert TokenizerManager.updates == []
    config = fake.model_config("/elsewhere")  # it has gone since it was pinned
    config.model_path = f"memory://{tmp_path.name}/nothing"
    reading = fake.loader(config, LoadFormat.AUTO)
    with pytest.raises(NotFoundError):
        reading._get_weights_iterator(reading.Source.init_new(config, Model()))


def test_an_engine_of_ours_is_updated_from_a_directory(fake: FakeSglang, url: str) -> None:
    config = fake.model_config(url)
    config.model_path = "/elsewhere"
    assert type(fake.loader(config, LoadFormat.REMOTE)).__name__ == "DefaultModelLoader"


# ---- weights per rank --------------------------------------------------------------------------


def test_ranks_save_what_they_have_loaded(fake: FakeSglang, url: str, tmp_path: Path) -> None:
    """Before kernels change it; and the same set-up loads it, without the model's own loading."""
    target = f"memory://{tmp_path.name}/per-rank"
    saving = fake.load(fake.model_config(url), save_to=target)
    with rdmaload.open(target) as stored:
        assert (stored.kind, stored.world_size) == ("sharded", 1)
        assert stored.manifest is not None
        assert stored.manifest.identity == {
            "engine": "sglang",
            "version": "0.5.23",
            "architecture": "LlamaForCausalLM",
            "quantization": "none",
            "dtype": "bfloat16",
            "stage": "as loaded",
        }
        assert stored.manifest.layout == {"tp": 1, "pp": 1, "ep": 1, "attention_tp": 1, "moe_dense_tp": 0}
        assert stored.load()["packed"].tolist() == [[2] * 3] * 2
        assert {file.path for file in stored.files} >= {"config.json"}
    fake.start(model_path=target)
    loaded = fake.load(fake.model_config(target))
    assert loaded.calls == ["post_load_weights", "postprocess"]
    for name, tensor in saving.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_another_set_up_is_refused(fake: FakeSglang, url: str, tmp_path: Path) -> None:
    target = f"memory://{tmp_path.name}/per-rank"
    config = fake.model_config(url)
    fake.load(config, save_to=target)
    with pytest.raises(LayoutMismatchError, match="tp: saved for 1, here 2"):
        fake.start(model_path=target, tp_size=2)
    with pytest.raises(LayoutMismatchError, match=r"dtype: saved for bfloat16, here float16\n"):
        fake.start(model_path=target, dtype="half")
    with pytest.raises(LayoutMismatchError, match="quantization: saved for none, here fp8"):
        fake.start(model_path=target, quantization="fp8")
    with pytest.raises(LayoutMismatchError, match="dtype: saved for bfloat16, here float32"):
        fake.loader(fake.model_config(target, dtype=torch.float32))
    fake.parallel.attn_tp_size = 4
    with pytest.raises(LayoutMismatchError, match="attention_tp: saved for 1, here 4"):
        fake.loader(fake.model_config(target))
    fake.parallel.attn_tp_size = 1
    sys.modules["sglang.version"].__dict__["__version__"] = "0.6.0"
    with pytest.raises(LayoutMismatchError, match=r"version: saved for 0\.5\.23, here 0\.6\.0"):
        fake.start(model_path=target)
    fake.start(model_path=target, model_loader_extra_config={"accept_version": True})
    assert fake.load(fake.model_config(target), accept_version=True).a.tolist() == [0, 1, 2, 3, 4, 5]


def test_sglangs_layout_holds_what_its_own_loader_expects(fake: FakeSglang, url: str, tmp_path: Path) -> None:
    """Weights as SGLang has processed them; its remote loader reads them, and no loader of ours."""
    target = f"memory://{tmp_path.name}/theirs"
    fake.load(fake.model_config(url), save_to=target, save_layout="sglang")
    with rdmaload.open(target) as stored:
        assert stored.store_layout == "sglang"
        assert stored.load(rank=0)["packed"].tolist() == [[-2] * 3] * 2
    assert type(fake.loader(fake.model_config(target))) is RemoteModelLoader


def test_where_ranks_cannot_be_saved(fake: FakeSglang, url: str, tmp_path: Path) -> None:
    with pytest.raises(NotSupportedError, match="Redis or Valkey"):
        fake.start(model_path=url, model_loader_extra_config={"save_to": str(tmp_path / "dir")})
    fake.parallel.pp_size = 2
    with pytest.raises(LayoutMismatchError, match="pipeline stages"):
        fake.load(fake.model_config(url), save_to=f"memory://{tmp_path.name}/x")

    def on_meta() -> Model:
        model = Model()
        model.late = torch.nn.Parameter(torch.empty(1, device="meta"))
        return model

    fake.parallel.pp_size = 1
    with pytest.raises(LayoutMismatchError, match="late is made while the model is loaded"):
        fake.load(fake.model_config(url, make_model=on_meta), save_to=f"memory://{tmp_path.name}/x")


def test_save_sharded_from_the_command_line(
    fake: FakeSglang, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SGLang is started in a process of its own, whose place this one takes."""

    def start(command: list[str], *, input: str, **keywords: Any) -> Any:
        assert command[1:] == ["-m", "rdmaload.integrations.sglang_plugin.sharding"]
        assert "memory://" not in " ".join(command)  # a url may hold a password
        given = json.loads(input)
        assert (given["tp_size"], given["device"]) == (1, "cpu")
        if given.get("dtype") == "float32":
            return types.SimpleNamespace(returncode=-9)
        name = str(fake.start(**{**given, "dtype": "auto"})["model_path"])
        fake.load(fake.model_config(name), **json.loads(given["model_loader_extra_config"]))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(sharding.subprocess, "run", start)
    target = f"memory://{tmp_path.name}/per-rank"
    command = ["save-sharded", "--engine", "sglang", "--url", target, "--engine-arg", "device=cpu", "--json"]
    assert main([*command, "--model", url]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["world_size"], report["identity"]["engine"]) == (1, "sglang")
    assert main([*command, "--model", url, "--url", f"{target}-theirs", "--layout", "sglang"]) == 0
    capsys.readouterr()
    assert main([*command, "--model", url, "--engine-arg", "dtype=float32"]) == 6
    assert "see its log above" in capsys.readouterr().err
    assert main([*command, "--model", url, "-pp", "2"]) == 2
    assert main([*command, "--model", f"{url}-not"]) == 3
    assert main([*command, "--model", target]) == 7
    monkeypatch.setitem(sys.modules, "sglang", None)
    assert main([*command, "--model", url]) == 8


# ---- a version whose places have moved ---------------------------------------------------------


@pytest.mark.parametrize("lost", ["create_remote_connector", "BaseKVConnector"])
def test_without_what_every_url_needs_there_is_one_error(
    fake: FakeSglang, url: str, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    monkeypatch.delattr(fake.modules["sglang.srt.connector"], lost)
    fake.hooks.clear()
    fake.steps.clear()
    sglang.register()
    with pytest.raises(NotSupportedError, match=rf"no connector\.{lost} as tested\. .*`rdmaload pull URL DIR`"):
        fake.start(model_path=url)
    with pytest.raises(NotSupportedError, match=lost):
        fake.start(model_path="/a/directory", load_format="rdmaload")
    fake.start(model_path="meta/llama")
    assert fake.declared == {}
    if lost != "create_remote_connector":
        with pytest.raises(NotSupportedError, match=lost):
            fake.create(url)
        assert fake.create("s3://bucket/m") == ("theirs", "s3://bucket/m", None)


def test_without_the_loaders_place_the_remote_loader_serves(
    fake: FakeSglang, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = f"memory://{tmp_path.name}/per-rank"
    fake.load(fake.model_config(url), save_to=target)
    module = fake.modules["sglang.srt.model_loader.loader"]
    monkeypatch.setattr(module, "get_model_loader", lambda config, other: None)
    fake.hooks.clear()
    with caplog.at_level("INFO", "rdmaload"):
        sglang.register()
    assert "no model_loader.loader.get_model_loader" in caplog.text
    assert list(fake.hooks) == ["sglang.srt.connector.create_remote_connector"]
    assert [name for name, _ in fake.create(url).weight_iterator()] == ["a", "b"]
    with pytest.raises(LayoutMismatchError, match="has no place for"):  # not as its remote loader would copy it
        next(fake.create(target).weight_iterator(0))


def test_without_the_place_of_updates(
    fake: FakeSglang, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(TokenizerManager, "update_weights_from_disk")
    fake.hooks.clear()
    with caplog.at_level("INFO", "rdmaload"):
        sglang.register()
    assert "update_weights_from_disk takes no urls" in caplog.text
    assert "sglang.srt.model_loader.loader.get_model_loader" in fake.hooks

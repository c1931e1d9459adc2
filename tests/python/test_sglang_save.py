"""save(..., layout="sglang"): what an independent reader finds, what is refused, and what failures leave."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import safetensors.torch
import torch

import rdmaload
from rdmaload.connectors import registry
from rdmaload.connectors.memory import MemoryConnector
from rdmaload.errors import (
    AlreadyExistsError,
    FormatError,
    IntegrityError,
    LayoutMismatchError,
    NotSupportedError,
    UnavailableError,
)
from rdmaload.urls import parse_url
from tests.support.servers import RedisServer
from tests.support.sglang_values import read_files, read_rank, same_tensors, sample_tensors, write_files, write_rank
from tests.support.stores import Die, Killed, ScriptedConnector


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator:
    with redis_server.client() as client:
        yield client


def test_a_state_dict_becomes_the_bytes_that_sglang_writes(client, redis_url, model):
    tensors = sample_tensors() | {"two": torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "scalar": torch.tensor(3.5)}
    stats = rdmaload.save(tensors, redis_url, layout="sglang")
    for name, tensor in tensors.items():
        expected = safetensors.torch.save({"tensor_bytes": tensor})
        assert client.get(f"{model}/keys/rank_0/{name}") == expected, name
    assert [client.strlen(f"{model}/keys/rank_0/{name}") for name in ("two", "scalar")] == [84, 76]
    assert same_tensors(read_rank(client, model, 0), tensors)
    assert (stats.published, stats.files, stats.generation) == (True, len(tensors), None)
    assert stats.bytes == sum(client.strlen(f"{model}/keys/rank_0/{name}") for name in tensors)
    assert same_tensors(rdmaload.load(redis_url), tensors)


def test_nothing_else_lies_among_a_ranks_keys_or_files(client, redis_url, model):
    rdmaload.save({"w": torch.ones(2)}, redis_url, layout="sglang")
    keys = {key.decode() for key in client.scan_iter(f"{model}/*")}
    assert keys == {f"{model}/keys/rank_0/w", f"{model}/saving/sglang/rank_0"}


def test_ranks_are_saved_one_by_one(client, redis_url, model):
    ranks = [sample_tensors(seed) for seed in range(2)]
    for rank in (1, 0):
        rdmaload.save(ranks[rank], redis_url, layout="sglang", rank=rank, world_size=2)
    for rank, tensors in enumerate(ranks):
        assert same_tensors(read_rank(client, model, rank), tensors)
        assert same_tensors(rdmaload.load(redis_url, rank=rank), tensors)


def test_of_tied_tensors_the_smallest_name_is_kept(client, redis_url, model):
    weight = torch.arange(12.0).reshape(3, 4)
    square = torch.arange(6.0).reshape(2, 3).t()
    state = {
        "z.embed": weight,
        "lm_head": weight,
        "rows": weight[1:],  # a part of the same memory
        "strided": square,
        "strided.twin": square,
        "empty": torch.empty(0, 3),
    }
    rdmaload.save(state, redis_url, layout="sglang")
    assert sorted(read_rank(client, model, 0)) == ["lm_head", "strided", "strided.twin"]
    assert torch.equal(read_rank(client, model, 0)["strided"], square)


def test_a_module_is_saved(client, redis_url, model):
    module = torch.nn.Linear(3, 2)
    rdmaload.save(module, redis_url, layout="sglang")
    assert same_tensors(read_rank(client, model, 0), module.state_dict())


def test_a_directory_is_saved_as_rank_0_with_its_text_files(client, redis_url, model, tmp_path, caplog):
    tensors = sample_tensors()
    names = sorted(tensors)
    for number, group in enumerate((names[:3], names[3:])):
        path = tmp_path / f"model-{number}.safetensors"
        safetensors.torch.save_file({name: tensors[name] for name in group}, path)
    (tmp_path / "config.json").write_text('{"a": "ü"}')
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "modeling.py").write_text("x = 1\n")
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xfe\x00")
    (tmp_path / ".hidden.json").write_text("{}")
    weight_map = {name: f"model-{number}.safetensors" for number in range(2) for name in (names[:3], names[3:])[number]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with caplog.at_level(logging.WARNING, "rdmaload"):
        rdmaload.save(tmp_path, redis_url, layout="sglang")
    assert same_tensors(read_rank(client, model, 0), tensors)
    assert read_files(client, model) == {"config.json": '{"a": "ü"}', "modeling.py": "x = 1\n", "merges.txt": ""}
    assert "tokenizer.model is not text" in caplog.text


def test_two_files_of_one_base_name_are_refused(client, redis_url, model, tmp_path):
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.json").write_text("{}")
    with pytest.raises(NotSupportedError, match=r"a/same.json and b/same.json have one base name"):
        rdmaload.save(tmp_path, redis_url, layout="sglang")
    assert not list(client.scan_iter(f"{model}/*"))


def test_copies_between_the_layouts_keep_every_byte(client, redis_server, redis_url, model, tiny_checkpoint):
    there, back = (redis_server.url(f"{model}-{name}") for name in ("there", "back"))
    rdmaload.save(tiny_checkpoint.directory, redis_url)
    rdmaload.save(redis_url, there, layout="sglang")
    rdmaload.save(there, back)
    expected = rdmaload.load(redis_url)
    assert same_tensors(read_rank(client, f"{model}-there", 0), expected)
    assert same_tensors(rdmaload.load(back), expected)
    other = redis_server.url(f"{model}-other")
    rdmaload.save(there, other, layout="sglang")
    assert same_tensors(read_rank(client, f"{model}-other", 0), expected)


def test_all_ranks_of_a_sharded_source_are_saved_at_once(client, redis_url, model, tmp_path):
    ranks = [sample_tensors(seed) for seed in range(2)]
    for rank, tensors in enumerate(ranks):
        safetensors.torch.save_file(tensors, tmp_path / f"model-rank-{rank}-part-0.safetensors")
    rdmaload.save(tmp_path, redis_url, layout="sglang")
    for rank, tensors in enumerate(ranks):
        assert same_tensors(read_rank(client, model, rank), tensors)


def test_tied_names_of_a_stored_model_are_written_once(client, redis_server, redis_url, model):
    weight = torch.arange(4.0)
    source = redis_server.url(f"{model}-source")
    rdmaload.save({"z": weight, "a": weight}, source)
    rdmaload.save(source, redis_url, layout="sglang")
    assert list(read_rank(client, model, 0)) == ["a"]


# ---- replacing -----------------------------------------------------------------------------------


def test_a_replaced_model_leaves_no_key_behind(client, redis_url, model, tmp_path):
    for rank in range(3):
        write_rank(client, model, rank, {"old": torch.ones(2), "both": torch.ones(2)})
    write_files(client, model, {"config.json": "old", "stale.json": "old"})
    safetensors.torch.save_file({"both": torch.zeros(3), "new": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("new")
    rdmaload.save(tmp_path, redis_url, layout="sglang")
    assert {name: tensor.numel() for name, tensor in read_rank(client, model, 0).items()} == {"both": 3, "new": 1}
    assert [read_rank(client, model, rank) for rank in (1, 2)] == [{}, {}]
    assert read_files(client, model) == {"config.json": "new"}


def test_a_rank_replaces_its_own_keys_only(client, redis_url, model):
    for rank in range(3):
        write_rank(client, model, rank, {"old": torch.ones(2)})
    write_files(client, model, {"config.json": "old"})
    rdmaload.save({"new": torch.ones(1)}, redis_url, layout="sglang", rank=1, world_size=2)
    assert [sorted(read_rank(client, model, rank)) for rank in range(3)] == [["old"], ["new"], ["old"]]
    rdmaload.save({"new": torch.ones(1)}, redis_url, layout="sglang", rank=0, world_size=2)
    assert [sorted(read_rank(client, model, rank)) for rank in range(3)] == [["new"], ["new"], []]
    assert read_files(client, model) == {"config.json": "old"}  # a state dict has no files to put in its place


def test_without_overwrite_an_existing_model_stays(client, redis_url, model):
    write_rank(client, model, 0, {"old": torch.ones(2)})
    before = {key: client.get(key) for key in client.scan_iter(f"{model}/*")}
    with pytest.raises(AlreadyExistsError, match="overwrite=False"):
        rdmaload.save({"new": torch.ones(1)}, redis_url, layout="sglang", overwrite=False)
    assert {key: client.get(key) for key in client.scan_iter(f"{model}/*")} == before
    rdmaload.save({"new": torch.ones(1)}, redis_url, layout="sglang", overwrite=False, rank=1, world_size=2)


def test_a_model_in_format_1_is_not_shadowed(client, redis_url, model):
    rdmaload.save({"old": torch.ones(2)}, redis_url)
    with pytest.raises(AlreadyExistsError, match=r"format 1.*rdmaload rm"):
        rdmaload.save({"new": torch.ones(1)}, redis_url, layout="sglang")
    assert rdmaload.load(redis_url).keys() == {"old"}
    assert not list(client.scan_iter(f"{model}/keys/*"))


@pytest.mark.parametrize("arguments", [{}, {"overwrite": False}, {"rank": 1, "world_size": 2, "save_id": "step-1"}])
def test_format_1_does_not_shadow_what_sglang_loads(client, redis_url, model, arguments):
    write_rank(client, model, 3, {"old": torch.ones(2)})
    with pytest.raises(AlreadyExistsError, match=r"SGLang's layout \(.*/keys/rank_3/old\).*rdmaload rm") as caught:
        rdmaload.save({"new": torch.ones(1)}, redis_url, **arguments)
    assert caught.value.key == f"{model}/keys/rank_3/old"
    assert [key.decode() for key in client.scan_iter(f"{model}/*")] == [f"{model}/keys/rank_3/old"]
    rdmaload.remove(redis_url)
    assert rdmaload.save({"new": torch.ones(1)}, redis_url).published
    assert rdmaload.load(redis_url).keys() == {"new"}


def test_format_1_saves_where_nothing_of_sglang_is(client, redis_url, model):
    client.set(f"{model}/keys/rank_x/w", b"another model's")
    client.set(f"{model}/keys/ranked", b"another model's")
    rdmaload.save({"new": torch.ones(1)}, redis_url)
    write_rank(client, model, 0, {"later": torch.ones(2)})
    rdmaload.save({"newer": torch.ones(1)}, redis_url)  # a manifest is there: nobody looks for more
    assert rdmaload.load(redis_url).keys() == {"newer"}


def test_only_a_save_that_replaces_nothing_looks_for_sglangs_keys(monkeypatch):
    seen = []

    def script(kind, key, effect):
        seen.append((kind, key))
        return effect()

    monkeypatch.setitem(registry._registered, "counting", _Store)
    monkeypatch.setattr(_Store, "script", staticmethod(script))
    for looks in (1, 0):
        seen.clear()
        rdmaload.save({"w": torch.ones(1)}, "counting://counting/m")
        assert seen.count(("list", "m/keys/rank_")) == looks
        before = seen[: seen.index(("list", "m/keys/rank_"))] if looks else []
        assert not [call for call in before if call[0] == "set"]


def test_a_user_who_may_not_list_keys_saves_with_a_warning(caplog):
    with RedisServer(users=["alice on >pw ~* +@all -scan"]) as server:
        url = f"redis://alice:pw@{server.host}:{server.port}/m"
        with caplog.at_level(logging.WARNING, "rdmaload"):
            rdmaload.save({"w": torch.ones(1)}, url)
        assert "whether SGLang has saved a model" in caplog.text
        assert rdmaload.load(url).keys() == {"w"}


def test_a_model_cannot_be_copied_onto_itself(client, redis_server, redis_url, model):
    tensors = sample_tensors()
    write_rank(client, model, 0, tensors)
    for _ in range(2):  # without a note of ours, and with one
        with pytest.raises(IntegrityError, match="may be the same model"):
            rdmaload.save(redis_url, redis_url.replace("127.0.0.1", "localhost"), layout="sglang")
        assert same_tensors(rdmaload.load(redis_url), tensors)
        client.set(f"{model}/saving/sglang/rank_0", b"complete 1")


# ---- refused before anything is written ----------------------------------------------------------


@pytest.mark.parametrize("configurable", [True, False])
def test_a_tensor_above_the_servers_limit_is_refused_before_anything_is_written(configurable, monkeypatch):
    users = [] if configurable else ["default on nopass ~* +@all -config"]
    with RedisServer(users=users, args=["--proto-max-bulk-len", "2mb"]) as server, server.client() as client:
        state = {"small": torch.ones(2), "large": torch.zeros(2 * 2**20, dtype=torch.uint8)}
        url = server.url("m")
        if not configurable:
            monkeypatch.setattr("rdmaload.connectors.redis.RedisConnector.max_value_bytes", 2**20)
        with pytest.raises(NotSupportedError) as caught:
            rdmaload.save(state, url, layout="sglang")
        text = str(caught.value)
        assert "m/keys/rank_0/large" in text
        assert str(2 * 2**20 + 88) in text
        assert str(2 * 2**20 if configurable else 2**20) in text
        assert "without layout='sglang'" in text
        assert client.dbsize() == 0
        del state["large"]
        rdmaload.save(state, url, layout="sglang")
        assert same_tensors(read_rank(client, "m", 0), state)


def test_a_server_that_takes_more_is_given_more(monkeypatch):
    monkeypatch.setattr("rdmaload.connectors.redis.RedisConnector.max_value_bytes", 1000)
    with RedisServer() as server, server.client() as client:
        state = {"w": torch.zeros(5000)}
        rdmaload.save(state, server.url("m"), layout="sglang")
        assert same_tensors(read_rank(client, "m", 0), state)


def test_dtypes_that_sglang_cannot_load_are_refused(client, redis_url, model):
    scales = torch.zeros(4, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(NotSupportedError, match="tensor scales has dtype F8_E8M0"):
        rdmaload.save({"scales": scales, "w": torch.ones(2)}, redis_url, layout="sglang")
    assert not list(client.scan_iter(f"{model}/*"))
    with pytest.raises(KeyError):  # the reason: this is what SGLang's reader does
        safetensors.torch.load(safetensors.torch.save({"tensor_bytes": scales}))


def test_every_other_dtype_of_torch_is_read_back(client, redis_url, model, all_dtypes_checkpoint, tmp_path):
    tensors = {
        name: tensor
        for name, tensor in rdmaload.load(all_dtypes_checkpoint.directory).items()
        if tensor.dtype not in (torch.float8_e8m0fnu, getattr(torch, "float4_e2m1fn_x2", None))
        and tensor.numel()
        and "F4" not in name.upper()
        and "F6" not in name.upper()
    }
    assert len(tensors) > 20
    rdmaload.save(tensors, redis_url, layout="sglang")
    assert same_tensors(read_rank(client, model, 0), tensors)


@pytest.mark.parametrize("arguments", [{"save_id": "a"}, {"chunk_bytes": 1000}])
def test_arguments_that_the_layout_has_no_use_for_are_refused(redis_url, arguments):
    with pytest.raises(ValueError, match="leave out save_id and chunk_bytes"):
        rdmaload.save({"w": torch.ones(1)}, redis_url, layout="sglang", **arguments)


def test_other_layouts_and_stores_are_refused(redis_url, tmp_path):
    with pytest.raises(NotSupportedError, match="'rdmaload' and 'sglang'"):
        rdmaload.save({"w": torch.ones(1)}, redis_url, layout="hpkv")  # type: ignore[arg-type]
    with pytest.raises(NotSupportedError, match="keeps files"):
        rdmaload.save({"w": torch.ones(1)}, tmp_path, layout="sglang")
    with pytest.raises(FormatError, match="no tensors to save"):
        rdmaload.save({}, redis_url, layout="sglang")


def test_a_name_that_sglang_takes_for_a_pattern_is_warned_of(redis_server, model, caplog):
    with caplog.at_level(logging.WARNING, "rdmaload"):
        rdmaload.save({"w": torch.ones(1)}, redis_server.url(f"{model}[1]"), layout="sglang")
    assert "pattern" in caplog.text


# ---- saves that end halfway ----------------------------------------------------------------------


class _Store(ScriptedConnector):
    script = staticmethod(lambda kind, key, effect: effect())


def _in(name: str, model: str = "m") -> MemoryConnector:
    return MemoryConnector(parse_url(f"memory://{name}/{model}"))


def test_wherever_a_save_dies_nobody_takes_the_rest_for_a_model(monkeypatch):
    monkeypatch.setitem(registry._registered, "dying", _Store)
    old = {f"old{number}": torch.full((4,), 1.0) for number in range(3)} | {"both": torch.ones(2)}
    new = {f"new{number}": torch.full((4,), 2.0) for number in range(3)} | {"both": torch.zeros(2)}
    opened = {"old": 0, "new": 0, "refused": 0}
    for at in range(1, 100):
        store = f"dying-{at}"
        monkeypatch.setattr(_Store, "script", staticmethod(lambda kind, key, effect: effect()))
        rdmaload.save(old, f"dying://{store}/m", layout="sglang", connections=1)
        die = Die(at)
        monkeypatch.setattr(_Store, "script", staticmethod(die))
        try:
            rdmaload.save(new, f"dying://{store}/m", layout="sglang", connections=1)
        except Killed:
            pass
        else:
            break
        finally:
            monkeypatch.setattr(_Store, "script", staticmethod(lambda kind, key, effect: effect()))
        try:
            loaded = rdmaload.load(f"memory://{store}/m")
        except UnavailableError:
            opened["refused"] += 1
            rdmaload.save(new, f"memory://{store}/m", layout="sglang")  # the way out
            assert same_tensors(rdmaload.load(f"memory://{store}/m"), new)
        else:
            which = "old" if same_tensors(loaded, old) else "new"
            opened[which] += 1
            assert same_tensors(loaded, old if which == "old" else new)
    assert opened["refused"] >= len(new)
    assert opened["old"] >= 1
    assert opened["new"] >= 1


def test_two_saves_at_once_end_with_one_error_at_least(monkeypatch):
    monkeypatch.setitem(registry._registered, "racing", _Store)
    started = []

    def script(kind, key, effect):
        result = effect()
        if kind == "set" and key == "m/keys/rank_0/first" and not started:
            started.append(key)
            rdmaload.save({"second": torch.ones(2)}, "memory://racing/m", layout="sglang")
        return result

    monkeypatch.setattr(_Store, "script", staticmethod(script))
    with pytest.raises(UnavailableError, match="at the same time"):
        rdmaload.save({"first": torch.ones(2)}, "racing://racing/m", layout="sglang")
    assert started
    with pytest.raises(UnavailableError, match="being saved, or its save died"):
        rdmaload.open("memory://racing/m")


def test_a_source_that_changes_meanwhile_leaves_no_model(client, redis_url, model, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.ones(100)}, path)
    calls = []

    def touch(progress: rdmaload.Progress) -> None:
        calls.append(progress)

    import rdmaload._sglang_save as module

    original = module.SglangSave._finish
    try:
        module.SglangSave._finish = lambda self, save_id: pytest.fail("published")  # type: ignore[method-assign]
        send = module.SglangSave._send

        def changing(self, values):
            send(self, values)
            path.write_bytes(path.read_bytes()[:-4] + b"abcd")

        module.SglangSave._send = changing  # type: ignore[method-assign]
        with pytest.raises(IntegrityError, match="changed"):
            rdmaload.save(tmp_path, redis_url, layout="sglang", progress=touch)
    finally:
        module.SglangSave._finish = original  # type: ignore[method-assign]
        module.SglangSave._send = send  # type: ignore[method-assign]
    with pytest.raises(UnavailableError):
        rdmaload.open(redis_url)


# ---- ranks that are missing, and ranks of other saves --------------------------------------------


def _save_rank(url: str, rank: int, world_size: int) -> None:
    rdmaload.save(_rank_state(rank), url, layout="sglang", rank=rank, world_size=world_size)


def _rank_state(rank: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), float(rank))}


@pytest.mark.parametrize(
    ("world_size", "saved", "named"),
    [
        (2, [0], "rank 1 there"),
        (2, [1], "rank 0 there"),
        (4, [0, 3], "rank 1, 2 there"),
        (11, [10], "rank 0, 1, 2, 3, 4, 5, 6, 7 and 2 more there"),
    ],
)
def test_no_rank_is_taken_for_the_model_while_others_are_missing(redis_url, model, world_size, saved, named):
    for rank in saved:
        _save_rank(redis_url, rank, world_size)
    for use in (rdmaload.load, rdmaload.open, lambda url: rdmaload.load(url, rank=saved[0])):
        with pytest.raises(
            UnavailableError, match=f"saved for {world_size} ranks, and of {named}.*world_size="
        ) as caught:
            use(redis_url)
        assert f"{model}/saving/sglang/" in str(caught.value)
    for rank in set(range(world_size)) - set(saved):
        _save_rank(redis_url, rank, world_size)
    with pytest.raises(LayoutMismatchError, match="say which one with rank="):
        rdmaload.load(redis_url)
    for rank in range(world_size):
        assert same_tensors(rdmaload.load(redis_url, rank=rank), _rank_state(rank))


def test_a_rank_that_was_lost_is_missed(client, redis_url, model):
    for rank in range(2):
        _save_rank(redis_url, rank, 2)
    client.delete(f"{model}/keys/rank_1/w")
    with pytest.raises(UnavailableError, match="of rank 1 there is nothing"):
        rdmaload.open(redis_url)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (3, 1), (1, 3)])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_model_saved_again_for_other_ranks_opens_when_all_are_there(
    client, redis_url, model, before, after, backwards
):
    for rank in range(before):
        _save_rank(redis_url, rank, before)
    order = list(reversed(range(after))) if backwards else list(range(after))
    for rank in order[:-1]:
        _save_rank(redis_url, rank, after)
        with pytest.raises(UnavailableError):
            rdmaload.open(redis_url)
    _save_rank(redis_url, order[-1], after)
    with rdmaload.open(redis_url) as opened:
        assert opened.world_size == after
    keys = {key.decode() for key in client.scan_iter(f"{model}/*")}
    assert keys == {
        key for rank in range(after) for key in (f"{model}/keys/rank_{rank}/w", f"{model}/saving/sglang/rank_{rank}")
    }


def test_ranks_of_two_saves_are_told_from_a_model(redis_url):
    _save_rank(redis_url, 0, 1)
    _save_rank(redis_url, 1, 2)
    with pytest.raises(UnavailableError, match=r"different world sizes \(rank 0 of 1, 1 of 2\)"):
        rdmaload.open(redis_url)


def test_what_sglang_saves_over_ours_is_taken_as_it_is(client, redis_url, model):
    for rank in range(2):
        _save_rank(redis_url, rank, 2)
    for rank in range(3):
        write_rank(client, model, rank, {"w": torch.full((2,), 7.0)})
    with rdmaload.open(redis_url) as opened:
        assert opened.world_size == 3
        assert opened.load(rank=2)["w"].tolist() == [7, 7]


def test_the_world_size_costs_no_command(redis_server, redis_url, client, model):
    def commands() -> int:
        before = client.info("stats")["total_commands_processed"]
        rdmaload.open(redis_url).close()
        return client.info("stats")["total_commands_processed"] - before

    _save_rank(redis_url, 0, 1)
    marked = commands()
    client.set(f"{model}/saving/sglang/rank_0", b"complete 0123")  # a note without one
    assert commands() == marked


def test_remove_takes_what_a_rank_has_left(client, redis_url, model):
    _save_rank(redis_url, 1, 2)
    assert rdmaload.remove(redis_url) == 2
    assert not list(client.scan_iter(f"{model}/*"))


def test_memory_stays_within_the_window(client, redis_url, model):
    tensors = {f"t{number}": torch.full((50_000,), float(number)) for number in range(12)}
    rdmaload.save(tensors, redis_url, layout="sglang", window_bytes=250_000, connections=4)
    assert same_tensors(read_rank(client, model, 0), tensors)


def test_the_command_line_saves_the_layout(client, redis_url, model, tmp_path, capsys):
    from rdmaload.cli import main

    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert main(["save", "--layout", "sglang", str(tmp_path), redis_url]) == 0
    assert "saved 1 value" in capsys.readouterr().out
    assert list(read_rank(client, model, 0)) == ["w"]
    assert main(["save", "--layout", "sglang", "--save-id", "x", str(tmp_path), redis_url]) == 2
    assert main(["save", "--layout", "sglang", "--no-overwrite", str(tmp_path), redis_url]) == 1
    assert main(["save", "--layout", "sglang", "--rank", "1", "--world-size", "2", str(tmp_path), redis_url]) == 0
    assert list(read_rank(client, model, 1)) == ["w"]
    assert rdmaload.models(redis_url).count(model) == 1
    client.srem("rdmaload:models", model)

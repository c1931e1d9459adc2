"""Models that SGLang saved, read: every operation, and every way in which such a model can be damaged."""

from __future__ import annotations

import json
import logging
import struct
import threading
from collections.abc import Iterator

import pytest
import safetensors.torch
import torch

import rdmaload
from rdmaload.cli import main
from rdmaload.connectors import registry
from rdmaload.connectors.memory import MemoryConnector
from rdmaload.errors import (
    AuthenticationError,
    FormatError,
    IntegrityError,
    LayoutMismatchError,
    NotFoundError,
    PartialLoadError,
    UnavailableError,
)
from rdmaload.urls import parse_url
from tests.support import resp
from tests.support.fault_proxy import FaultProxy
from tests.support.faults import Stall
from tests.support.scripted_server import ScriptedServer, answers_from
from tests.support.servers import RedisServer
from tests.support.sglang_values import same_tensors, sample_tensors, write_files, write_rank

FILES = {"config.json": '{"model_type": "llama"}', "modeling.py": "# Ünïcode\n", "empty.json": ""}


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator:
    with redis_server.client() as client:
        yield client


def value(tensor: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A value with any header."""
    text = (json.dumps(tensor) if not isinstance(tensor, str) else tensor).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ONE = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def test_a_model_that_sglang_saved_is_loaded_byte_by_byte(client, redis_url, model, caplog):
    tensors = sample_tensors()
    write_rank(client, model, 0, tensors)
    write_files(client, model, FILES)
    stats = rdmaload.LoadStats()
    with caplog.at_level(logging.WARNING, "rdmaload"), rdmaload.open(redis_url) as opened:
        assert (opened.kind, opened.world_size, opened.generation) == ("sharded", 1, None)
        assert opened.store_layout == "sglang"
        loaded = opened.load(stats=stats)
        assert opened.tensors["model.layers.0.bias"].file == "keys/rank_0/model.layers.0.bias.safetensors"
    assert same_tensors(loaded, tensors)
    assert "neither checksums nor an atomic publish" in caplog.text
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert (stats.bytes, stats.verified_bytes, stats.unverified_bytes) == (total, 0, total)
    assert (stats.path, stats.generation, stats.copied_bytes) == ("resp-tcp", None, 0)


def test_values_of_every_documented_size(client, redis_url, model):
    tensors = {"a": torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "b": torch.tensor(3.5), "c": torch.empty(0, 3)}
    write_rank(client, model, 0, tensors)
    assert [client.strlen(f"{model}/keys/rank_0/{name}") for name in "abc"] == [84, 76, 80]
    loaded = rdmaload.load(redis_url)
    assert same_tensors(loaded, tensors)
    assert list(loaded["c"].shape) == [0, 3]


def test_each_rank_loads_its_own_tensors(client, redis_url, model):
    ranks = [sample_tensors(seed) for seed in range(3)]
    ranks[2]["only.here"] = torch.arange(5)
    for rank, tensors in enumerate(ranks):
        write_rank(client, model, rank, tensors)
    for rank, tensors in enumerate(ranks):
        assert same_tensors(rdmaload.load(redis_url, rank=rank), tensors)
    with pytest.raises(LayoutMismatchError, match="sharded over 3 ranks: say which"):
        rdmaload.load(redis_url)
    with pytest.raises(LayoutMismatchError, match="no rank 3"):
        rdmaload.load(redis_url, rank=3)


def test_ten_ranks_and_more_are_told_apart(client, redis_url, model):
    for rank in range(12):
        write_rank(client, model, rank, {"w": torch.full((3,), rank)})
    assert [rdmaload.load(redis_url, rank=rank)["w"][0].item() for rank in range(12)] == list(range(12))


def test_a_missing_rank_is_named(client, redis_url, model):
    for rank in (0, 2):
        write_rank(client, model, rank, {"w": torch.ones(1)})
    with pytest.raises(FormatError, match="ranks 0, 2 but none of rank 1"):
        rdmaload.open(redis_url)


def test_the_iterator_and_load_into_and_patterns(client, redis_url, model):
    tensors = sample_tensors()
    write_rank(client, model, 0, tensors)
    for borrow in (False, True):
        seen = {
            name: tensor.clone()
            for name, tensor in rdmaload.weight_iterator(redis_url, window_bytes=100_000, borrow=borrow)
        }
        assert same_tensors(seen, tensors)
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    stats = rdmaload.load_into(targets, redis_url)
    assert same_tensors(targets, tensors)
    assert stats.copied_bytes == 0
    chosen = rdmaload.load(redis_url, include="*.layers.0.*", exclude="*bias")
    assert chosen.keys() == {"model.layers.0.mlp.weight", "model.layers.0.attn.k_scale"}


def test_files_are_pulled_by_their_base_names(client, redis_url, model, tmp_path):
    write_rank(client, model, 0, {"w": torch.ones(2)})
    write_files(client, model, FILES)
    rdmaload.pull_files(redis_url, tmp_path / "all")
    assert {path.name: path.read_text() for path in (tmp_path / "all").iterdir()} == FILES
    rdmaload.pull_files(redis_url, tmp_path / "some", allow_pattern="*.py")
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["modeling.py"]
    rdmaload.pull_files(redis_url, tmp_path / "weights", allow_pattern="*.safetensors")
    pulled = tmp_path / "weights" / "keys" / "rank_0" / "w.safetensors"
    assert pulled.read_bytes() == client.get(f"{model}/keys/rank_0/w")


def test_a_pull_says_which_way_weights_become_a_directory_that_loads(
    client, redis_url, model, tmp_path, caplog, capsys
):
    tensors = sample_tensors()
    write_rank(client, model, 0, tensors)
    write_files(client, model, FILES)
    for allow in (None, "*.json", ["*.json", "*.py"]):
        rdmaload.pull_files(redis_url, tmp_path / "texts", allow_pattern=allow)
    rdmaload.pull_files(redis_url, tmp_path / "texts", allow_pattern="*", ignore_pattern="*.safetensors")
    assert "rdmaload save" not in caplog.text
    for allow in ("*", "*.safetensors", "keys/rank_0/*bias*"):
        caplog.clear()
        rdmaload.pull_files(redis_url, tmp_path / "all", allow_pattern=allow)
        assert f"`rdmaload save {redis_url} {tmp_path}/all`" in caplog.text
    with pytest.raises(NotFoundError, match="no weight files"):  # what the warning is about
        rdmaload.load(tmp_path / "all")
    assert main(["pull", redis_url, str(tmp_path / "cli")]) == 0
    assert f"rdmaload save {redis_url} {tmp_path}/cli" in capsys.readouterr().err
    assert main(["save", redis_url, str(tmp_path / "way")]) == 0
    assert same_tensors(rdmaload.load(tmp_path / "way"), tensors)
    assert (tmp_path / "way" / "config.json").read_text() == FILES["config.json"]


@pytest.mark.parametrize("allow", ["model*.safetensors", ["*.json", "model-00001-of-00002.safetensors"], "*.bin"])
def test_weight_files_that_the_layout_does_not_have_are_not_left_out_silently(
    client, redis_url, model, tmp_path, allow
):
    write_rank(client, model, 0, {"w": torch.ones(2)})
    write_files(client, model, FILES)
    with pytest.raises(NotFoundError, match=r"no weight file that matches (model|\*).*`rdmaload save .*/none`"):
        rdmaload.pull_files(redis_url, tmp_path / "none", allow_pattern=allow)
    assert not (tmp_path / "none").exists()


def test_verify_reads_every_value_and_says_that_nothing_could_be_compared(client, redis_url, model):
    write_rank(client, model, 0, sample_tensors())
    write_files(client, model, FILES)
    with rdmaload.open(redis_url) as opened:
        stats = opened.verify()
        assert stats.verified_bytes == 0
        assert stats.unverified_bytes == stats.bytes == sum(file.size for file in opened.files)
    with pytest.raises(IntegrityError, match="has no checksums, and verify='require'"):
        rdmaload.load(redis_url, verify="require")


@pytest.mark.parametrize("name", ["a*b", "a[b]c", "a?c", "a\\b", "org/a[0-9]*"])
def test_a_name_with_pattern_characters_means_itself(client, redis_server, model, name):
    name = f"{model}-{name}"
    write_rank(client, name, 0, {"w": torch.ones(2)})
    write_rank(
        client,
        name.replace("*", "xx").replace("[b]", "b").replace("?", "b").replace("\\", ""),
        1,
        {"w": torch.zeros(2)},
    )
    loaded = rdmaload.load(redis_server.url(name))
    assert loaded["w"].tolist() == [1, 1]


def test_a_manifest_wins_over_sglangs_keys(client, redis_url, model):
    rdmaload.save({"ours": torch.ones(2)}, redis_url)
    write_rank(client, model, 0, {"theirs": torch.zeros(2)})
    with rdmaload.open(redis_url) as opened:
        assert opened.store_layout == "rdmaload"
        assert opened.load().keys() == {"ours"}


def test_without_keys_of_a_rank_there_is_no_model(client, redis_url, model):
    write_files(client, model, FILES)
    client.set(f"{model}/keys/rank_00/w", b"x")
    client.set(f"{model}/keys/rank_x/w", b"x")
    client.set(f"{model}-2/keys/rank_0/w", b"x")
    with pytest.raises(NotFoundError, match="there is no model"):
        rdmaload.open(redis_url)


def test_a_pinned_model_is_never_sglangs(client, redis_url, model):
    write_rank(client, model, 0, {"w": torch.ones(2)})
    for pin in ({"generation": "0" * 32}, {"manifest_sha256": "0" * 64}):
        with pytest.raises(NotFoundError):
            rdmaload.open(redis_url, **pin)


def test_keys_saved_to_a_url_with_a_slash_at_its_end_are_pointed_at(client, redis_url, model):
    write_rank(client, f"{model}/", 0, {"w": torch.ones(2)})
    with pytest.raises(NotFoundError, match="ends with a slash"):
        rdmaload.open(redis_url)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        value("", length=0),
        value("{", length=1),
        value({"tensor_bytes": ONE}, b"abcd", length=2**63),
        value({"tensor_bytes": ONE}, b"abcd", length=2**40),
        value({"tensor_bytes": ONE}, b"abcd" + bytes(70_000), length=65_537),
        value({"tensor_bytes": ONE}, b"abc"),
        value({"tensor_bytes": ONE}, b"abcde"),
        value({"other": ONE}, b"abcd"),
        value({"tensor_bytes": ONE, "second": {"dtype": "U8", "shape": [0], "data_offsets": [4, 4]}}, b"abcd"),
        value({}),
        value("[1, 2]"),
        value("not json"),
        value('{"tensor_bytes": {"dtype": "U8", "shape": [9223372036854775807, 4], "data_offsets": [0, 4]}}', b"abcd"),
        value({"tensor_bytes": {"dtype": "U8", "shape": [4], "data_offsets": [2**62, 2**62 + 4]}}, b"abcd"),
        value({"tensor_bytes": {"dtype": "Q9", "shape": [4], "data_offsets": [0, 4]}}, b"abcd"),
    ],
)
def test_a_value_that_is_no_such_tensor_is_refused_by_its_key(client, redis_url, model, content):
    write_rank(client, model, 0, {"good": torch.ones(2)})
    client.set(f"{model}/keys/rank_0/bad", content)
    with pytest.raises(FormatError) as caught:
        rdmaload.load(redis_url)
    assert caught.value.key == f"{model}/keys/rank_0/bad"
    assert f"{model}/keys/rank_0/bad" in str(caught.value)


def test_a_long_header_with_metadata_is_read(client, redis_url, model):
    header = json.dumps({"__metadata__": {"note": "x" * 5_000}, "tensor_bytes": ONE})
    client.set(f"{model}/keys/rank_0/w", value(header, b"abcd"))
    assert rdmaload.load(redis_url)["w"].tolist() == list(b"abcd")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../b", "a//b", "./a"])
def test_a_name_that_would_lead_out_of_a_directory_is_refused(client, redis_url, model, name):
    write_rank(client, model, 0, {name: torch.ones(2)})
    with pytest.raises(FormatError, match=r"path .* (segment|absolute)"):
        rdmaload.open(redis_url)


def test_a_value_of_another_kind_is_not_taken_for_a_tensor(client, redis_url, model):
    write_rank(client, model, 0, {"w": torch.ones(2)})
    client.lpush(f"{model}/keys/rank_0/list", "x")
    assert rdmaload.load(redis_url).keys() == {"w"}


# ---- a model that changes while it is read -------------------------------------------------------


def _replaced(client, model: str, name: str, how: str) -> None:
    key = f"{model}/keys/rank_0/{name}"
    if how == "removed":
        client.delete(key)
    else:
        tensor = {
            "longer": torch.ones(3_000_000, dtype=torch.bfloat16),
            "shorter": torch.ones(2_000_000, dtype=torch.uint8),
            "tiny": torch.ones(2),
            "of another dtype": torch.ones(1_500_000, dtype=torch.float16),
        }[how]
        write_rank(client, model, 0, {name: tensor})


@pytest.mark.parametrize("how", ["removed", "longer", "shorter", "tiny", "of another dtype"])
@pytest.mark.parametrize("operation", ["load", "weight_iterator", "load_into", "verify"])
def test_a_value_replaced_after_the_model_was_opened_is_noticed(client, redis_url, model, how, operation):
    write_rank(client, model, 0, {"w": torch.zeros(1_500_000, dtype=torch.bfloat16), "x": torch.ones(2)})
    targets = {"w": torch.empty(1_500_000, dtype=torch.bfloat16), "x": torch.empty(2)}
    with rdmaload.open(redis_url) as opened:
        _replaced(client, model, "w", how)
        read = {
            "load": opened.load,
            "weight_iterator": lambda: list(opened.weight_iterator()),
            "load_into": lambda: opened.load_into(targets),
            "verify": opened.verify,
        }[operation]
        with pytest.raises((IntegrityError, NotFoundError, PartialLoadError), match=f"{model}/keys/rank_0/w") as caught:
            read()
        assert "pen it again" in str(caught.value)


def test_a_value_replaced_in_the_middle_of_the_load_is_noticed(client, redis_server, model):
    write_rank(client, model, 0, {"w": torch.zeros(8_000_000, dtype=torch.uint8)})
    with (
        FaultProxy(redis_server.host, redis_server.port, Stall(after=3_000_000)) as proxy,
        rdmaload.open(proxy.url(model, "inactivity_timeout=0.5&retry_timeout=5&connections=1")) as opened,
    ):

        def replace() -> None:
            assert proxy.wait_for_fault()
            write_rank(client, model, 0, {"w": torch.ones(9_000_000, dtype=torch.uint8)})
            proxy.set_faults()

        thread = threading.Thread(target=replace)
        thread.start()
        with pytest.raises(IntegrityError, match="changed or removed while the model was read"):
            opened.load()
        thread.join()


def test_a_model_that_a_save_of_ours_has_begun_is_not_opened(client, redis_url, model):
    write_rank(client, model, 0, {"w": torch.ones(2)})
    client.set(f"{model}/saving/sglang/rank_0", b"saving 1234")
    with pytest.raises(UnavailableError, match="rank 0 is being saved, or its save died halfway"):
        rdmaload.open(redis_url)
    client.set(f"{model}/saving/sglang/rank_0", b"complete 1")
    with rdmaload.open(redis_url) as opened:
        client.set(f"{model}/saving/sglang/rank_0", b"complete 2")
        with pytest.raises(IntegrityError, match="changed or removed while"):
            opened.load()


@pytest.mark.parametrize(("size", "in_flight"), [(400_000_000, 4 << 20), (3_000_000, 200_000)])
def test_no_reply_is_longer_than_the_bytes_in_flight_allow(size, in_flight):
    header = value(f'{{"tensor_bytes":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,{size}]}}}}')
    total = len(header) + size
    longest = 0
    key = b"m/keys/rank_0/w"

    def answer(words: list[bytes]) -> bytes:
        nonlocal longest
        name = words[0].upper()
        if name == b"SCAN":
            return resp.array([resp.bulk(b"0"), resp.array([resp.bulk(key), resp.bulk(key)])])
        if name == b"STRLEN":
            return b":%d\r\n" % (total if words[1] == key else 0)
        if name == b"GETRANGE":
            start, end = int(words[2]), min(int(words[3]), total - 1)
            if words[1] != key:
                return resp.bulk(b"")
            longest = max(longest, end + 1 - start)
            return resp.bulk((header[start : end + 1]).ljust(end + 1 - start, b"\x07"))
        return answers_from({})(words)

    with (
        ScriptedServer(answer) as server,
        rdmaload.open(server.url("m"), bytes_in_flight=in_flight, connections=2) as opened,
    ):
        tensors = opened.load()
    assert tensors["w"].numel() == size
    assert tensors["w"].min() == tensors["w"].max() == 7
    assert in_flight // 8 < longest <= in_flight // 2
    assert not any(words[0] == b"GET" and words[1] == key for words in server.commands)


def test_scan_may_repeat_keys(client, redis_server, model):
    tensors = {f"t{number}": torch.full((4,), number) for number in range(5)}
    write_rank(client, model, 0, tensors)
    keys = [f"{model}/keys/rank_0/{name}".encode() for name in tensors]
    values = {key.decode(): client.get(key) for key in keys}

    def answer(words: list[bytes]) -> bytes | None:
        name = words[0].upper()
        if name == b"SCAN":  # two pages with keys in common, one of them twice on a page
            first = words[1] == b"0"
            page = [keys[0], keys[1], keys[1], keys[2]] if first else [keys[2], keys[3], keys[4], keys[0]]
            return resp.array([resp.bulk(b"7" if first else b"0"), resp.array([resp.bulk(key) for key in page])])
        if name == b"GETRANGE":
            held = values.get(words[1].decode(), b"")
            return resp.bulk(held[int(words[2]) : int(words[3]) + 1])
        return answers_from(values)(words)

    with ScriptedServer(answer) as server:
        assert same_tensors(rdmaload.load(server.url(model)), tensors)


def test_a_user_who_may_not_list_keys_is_told_so(model):
    users = ["alice on >pw ~* +@all -scan"]
    with RedisServer(users=users) as server:
        with pytest.raises(NotFoundError, match=r"cannot be seen.*ACL") as caught:
            rdmaload.open(f"redis://alice:pw@{server.host}:{server.port}/m")
        assert not isinstance(caught.value, AuthenticationError)


def test_any_key_value_store_holds_such_a_model(model):
    tensors = sample_tensors()

    class Client:
        def __init__(self, connector: MemoryConnector) -> None:
            self.connector = connector

        def set(self, key: str, content: bytes) -> None:
            self.connector.set(key, content)

    url = f"memory://sglang/{model}"
    with MemoryConnector(parse_url(url)) as connector:
        write_rank(Client(connector), model, 0, tensors)  # type: ignore[arg-type]
        assert same_tensors(rdmaload.load(url), tensors)
        rdmaload.remove(url)


def test_a_model_of_thousands_of_values_takes_few_round_trips(redis_server, client, model):
    write_rank(client, model, 0, {f"t{number}": torch.tensor([number]) for number in range(2_000)})
    with FaultProxy(redis_server.host, redis_server.port) as proxy:
        loaded = rdmaload.load(proxy.url(model))
    assert [loaded[f"t{number}"].item() for number in range(2_000)] == list(range(2_000))


# ---- as a source, and among other models ---------------------------------------------------------


def test_a_copy_is_a_model_like_any_other(client, redis_server, redis_url, model, tmp_path):
    ranks = [sample_tensors(seed) for seed in range(2)]
    for rank, tensors in enumerate(ranks):
        write_rank(client, model, rank, tensors)
    write_files(client, model, {**FILES, "model.safetensors.index.json": '{"weight_map": {"a": "gone.safetensors"}}'})
    copy = redis_server.url(f"{model}-copy")
    stats = rdmaload.save(redis_url, copy)
    assert stats.published
    rdmaload.save(redis_url, tmp_path)
    for url in (copy, str(tmp_path)):
        with rdmaload.open(url) as opened:
            assert (opened.kind, opened.world_size) == ("sharded", 2)
        for rank, tensors in enumerate(ranks):
            assert same_tensors(rdmaload.load(url, rank=rank), tensors)
    assert (tmp_path / "config.json").read_text() == FILES["config.json"]
    assert (tmp_path / "empty.json").read_text() == ""
    assert not (tmp_path / "model.safetensors.index.json").exists()


class _Changing(MemoryConnector):
    """A store in which a value grows when the first range of another is read."""

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        found = super().get_range(key, offset, length)
        if self.model == "source" and key.endswith("/w"):
            other = "source/keys/rank_0/x"
            self.set(other, (self.get(other) or b"") + b"more")
        return found


def test_a_value_that_changes_while_it_is_copied_ends_the_copy(monkeypatch):
    monkeypatch.setitem(registry._registered, "changing", _Changing)
    with _Changing(parse_url("changing://sglang/source")) as connector:
        for name in ("w", "x"):
            content = safetensors.torch.save({"tensor_bytes": torch.zeros(50_000)})
            connector.set(f"source/keys/rank_0/{name}", content)
    with pytest.raises(IntegrityError, match="changed or removed while"):
        rdmaload.save("changing://sglang/source", "changing://sglang/copy")
    with pytest.raises(NotFoundError):
        rdmaload.open("changing://sglang/copy")


def test_remove_takes_every_key_of_the_model_and_no_other(client, redis_server, redis_url, model):
    for rank in range(2):
        write_rank(client, model, rank, sample_tensors())
    write_files(client, model, FILES)
    other = redis_server.url(f"{model}/below")
    rdmaload.save({"w": torch.ones(2)}, other)
    client.set(f"{model}/keys/notes", b"x")
    assert rdmaload.remove(redis_url) == 2 * len(sample_tensors()) + len(FILES)
    left = {key.decode() for key in client.scan_iter(f"{model}/*") if b"/below/" not in key}
    assert left == {f"{model}/keys/notes"}
    assert rdmaload.load(other)["w"].tolist() == [1, 1]
    with pytest.raises(NotFoundError):
        rdmaload.remove(redis_url)


def test_remove_leaves_files_alone_where_there_are_no_ranks(client, redis_server, redis_url, model):
    rdmaload.save({"w": torch.ones(2)}, redis_server.url(f"{model}/files"))
    rdmaload.save({"w": torch.ones(2)}, redis_url)
    rdmaload.remove(redis_url)
    assert rdmaload.load(redis_server.url(f"{model}/files"))["w"].tolist() == [1, 1]


def test_prune_leaves_such_a_model_alone(client, redis_url, model):
    write_rank(client, model, 0, sample_tensors())
    client.set(f"{model}/saving/sglang/rank_0", b"complete 1")
    assert rdmaload.prune(redis_url, force=True).keys == 0
    assert same_tensors(rdmaload.load(redis_url), sample_tensors())


def test_a_scan_finds_such_models(client, redis_server, redis_url, model):
    write_rank(client, model, 0, {"w": torch.ones(2)})
    assert model not in rdmaload.models(redis_url)
    assert model in rdmaload.models(redis_url, scan=True)
    assert model in rdmaload.models(redis_url)
    rdmaload.remove(redis_url)
    assert model not in rdmaload.models(redis_url)


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    from rdmaload.cli import main

    code = main(list(arguments))
    return code, capsys.readouterr().out


def test_the_command_line_shows_the_layout(client, redis_url, model, capsys):
    write_rank(client, model, 0, {"w": torch.ones(2), "v": torch.ones(3)})
    write_files(client, model, FILES)
    code, out = _run(capsys, "info", redis_url)
    assert code == 0
    assert "SGLang's layout: one value per tensor" in out
    assert "without checksums" in out
    code, out = _run(capsys, "info", "--json", redis_url)
    document = json.loads(out)
    assert (document["store_layout"], document["tensors"], document["checksums"]) == ("sglang", 2, None)
    code, out = _run(capsys, "ls", "--json", redis_url)
    document = json.loads(out)
    assert document["store_layout"] == "sglang"
    assert {file["path"] for file in document["files"] if not file["weights"]} == FILES.keys()
    code, out = _run(capsys, "verify", redis_url)
    assert code == 0
    assert "no checksum was compared" in out
    assert _run(capsys, "verify", "-o", "verify=require", redis_url)[0] == 4
    code, out = _run(capsys, "rm", "--yes", redis_url)
    assert (code, "5 keys" in out) == (0, True)

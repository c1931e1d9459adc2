"""The commands through main(): what they do, print and report as JSON, and their exit codes."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import struct
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rdmaload
from rdmaload import Progress
from rdmaload.cli import main
from rdmaload.cli.arguments import redact_arguments
from rdmaload.cli.exits import UsageError, exit_code
from rdmaload.connectors.memory import MemoryConnector, forget_store
from rdmaload.urls import parse_url
from tests.support.checkpoints import Checkpoint
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import RedisServer

STORE = "memory://cli-tests"


@pytest.fixture(autouse=True)
def fresh_store() -> Iterator[None]:
    yield
    forget_store("cli-tests")


@pytest.fixture
def saved(tiny_checkpoint: Checkpoint) -> str:
    """The url of the tiny checkpoint in a store of this process."""
    url = f"{STORE}/org/tiny"
    rdmaload.save(tiny_checkpoint.directory, url)
    return url


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The document of a command that must succeed and write nothing else."""
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    document = json.loads(out)
    assert isinstance(document, dict)
    return document


def run_failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and message of a command that must say one line on stderr and nothing on stdout."""
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rdmaload: ")
    assert err.count("\n") == 1
    return code, err


def same_files(one: Path, other: Path) -> bool:
    files = sorted(path.name for path in one.iterdir())
    return files == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in files
    )


# Each command


def test_a_checkpoint_goes_through_redis_and_back(
    redis_url: str, tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(tiny_checkpoint.directory)
    document = run_json(capsys, "save", directory, redis_url)
    assert document["bytes"] == tiny_checkpoint.file_bytes
    assert document["published"] is True
    generation = document["generation"]

    document = run_json(capsys, "load", redis_url, "--against", directory)
    assert document["tensors"] == len(tiny_checkpoint.tensors)
    assert document["bytes"] == document["compared_bytes"] == tiny_checkpoint.bytes
    assert document["verified_bytes"] >= tiny_checkpoint.bytes
    assert document["path"] == "resp-tcp"
    assert document["generation"] == generation

    document = run_json(capsys, "verify", redis_url)
    assert document["verified_bytes"] == tiny_checkpoint.file_bytes
    assert document["unverified_bytes"] == 0

    run_json(capsys, "pull", redis_url, str(tmp_path / "all"))
    assert same_files(tiny_checkpoint.directory, tmp_path / "all")

    assert run_json(capsys, "rm", redis_url, "--yes")["keys"] > 0
    assert run_failing(capsys, "load", redis_url)[0] == 3


def test_results_are_for_people_without_json(
    saved: str, tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(tiny_checkpoint.directory)
    for arguments, words in (
        (["save", directory, saved], ["saved 9 files", "2.5 MB in", "/s)"]),
        (["load", saved, "--against", directory], ["loaded 38 tensors", "by CRC32C", "equal to the files"]),
        (["pull", saved, str(tmp_path)], ["pulled", str(tmp_path), "2.5 MB in"]),
        (["verify", saved], ["verified 9 files", "2.5 MB by CRC32C"]),
        (["verify", directory], ["read 9 files", "unverified 2.5 MB"]),
        (["info", saved], ["checkpoint", "BF16", "3 weight files", "1,044,480 bytes"]),
        (["prune", saved, "--force"], ["1 generation", "0 dead saves"]),
        (["rm", saved, "--yes"], [f"removed {saved}"]),
    ):
        assert main(arguments) == 0, arguments
        out, err = capsys.readouterr()
        assert err == ""
        for word in words:
            assert word in out, arguments


def test_save_copies_between_stores(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = run_json(capsys, "save", saved, f"{STORE}/copy", "--chunk-bytes", "64KiB")
    assert document["chunks"] > 9
    assert run_json(capsys, "info", f"{STORE}/copy")["chunk_bytes"] == 65536


def test_ranks_save_together_and_load_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{STORE}/sharded"
    for rank in range(2):
        rdmaload.save({"w": torch.full((4,), rank)}, tmp_path / str(rank), rank=rank, world_size=2, save_id="x")
        arguments = ["--rank", str(rank), "--world-size", "2", "--save-id", "step-1"]
        document = run_json(capsys, "save", str(tmp_path / str(rank)), url, *arguments)
        assert document["published"] is (rank == 1)
    code, message = run_failing(capsys, "load", url)
    assert code == 7
    assert "rank" in message
    assert run_json(capsys, "load", url, "--rank", "1", "--against", str(tmp_path / "1"))["tensors"] == 1
    document = run_json(capsys, "info", url, "--tensors")
    assert (document["kind"], document["world_size"], document["tensors"]) == ("sharded", 2, 2)
    assert [tensor["rank"] for tensor in document["tensor_list"]] == [0, 1]
    assert run_failing(capsys, "load", url, "--rank", "2")[0] == 7


def test_load_selects_tensors(saved: str, tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--include", "*.layers.0.*", "--include", "*norm*", "--exclude", "*mlp*"]
    directory = str(tiny_checkpoint.directory)
    document = run_json(capsys, "load", saved, *arguments, "--against", directory)
    names = [name for name in tiny_checkpoint.tensors if (".layers.0." in name or "norm" in name) and "mlp" not in name]
    assert document["tensors"] == len(names)


def test_load_compares_every_dtype(all_dtypes_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(all_dtypes_checkpoint.directory)
    rdmaload.save(directory, f"{STORE}/dtypes")
    document = run_json(capsys, "load", f"{STORE}/dtypes", "--against", directory)
    assert document["compared_bytes"] == all_dtypes_checkpoint.bytes


def test_a_tied_name_that_the_files_lack_is_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensor = torch.arange(6.0)
    rdmaload.save({"a": tensor, "b": tensor}, f"{STORE}/tied")
    rdmaload.save({"a": tensor}, tmp_path)
    document = run_json(capsys, "load", f"{STORE}/tied", "--against", str(tmp_path))
    assert (document["tensors"], document["compared_bytes"]) == (2, 24)
    document = run_json(capsys, "info", f"{STORE}/tied")
    assert (document["tensors"], document["tied"], document["tensor_bytes"]) == (2, 1, 24)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"w": torch.tensor([1.0, 2.0, 3.5])}, "differs from"),
        ({"w": torch.tensor([[1.0, 2.0, 3.0]])}, "F32 [1, 3]"),
        ({"w": torch.tensor([1, 2, 3], dtype=torch.int32)}, "I32"),
        ({"v": torch.tensor([1.0, 2.0, 3.0])}, "which the model lacks"),
        ({"w": torch.tensor([1.0, 2.0, 3.0]), "v": torch.ones(1)}, "which the model lacks"),
    ],
)
def test_load_against_other_files_is_a_mismatch(
    files: dict[str, torch.Tensor], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rdmaload.save({"w": torch.tensor([1.0, 2.0, 3.0])}, f"{STORE}/w")
    rdmaload.save(files, tmp_path)
    code, message = run_failing(capsys, "load", f"{STORE}/w", "--against", str(tmp_path))
    assert code == 4
    assert words in message


def test_the_first_different_byte_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = torch.zeros(1000, dtype=torch.uint8)
    rdmaload.save({"w": values}, f"{STORE}/w")
    values[789] = 1
    rdmaload.save({"w": values}, tmp_path)
    _, message = run_failing(capsys, "load", f"{STORE}/w", "--against", str(tmp_path))
    assert "at byte 789 of the tensor" in message


def test_pull_leaves_weights_out(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def pulled(*arguments: str) -> set[str]:
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        run_json(capsys, "pull", saved, str(target), *arguments)
        return {path.name for path in target.iterdir()}

    assert "tokenizer.json" in pulled("--no-weights")
    assert not any(name.endswith(".safetensors") for name in pulled("--no-weights"))
    assert pulled("--include", "config.json", "--include", "*.safetensors", "--no-weights") == {"config.json"}
    assert pulled("--include", "*token*", "--exclude", "*_config*") == {"tokenizer.json", "special_tokens_map.json"}
    assert run_failing(capsys, "pull", saved, str(tmp_path / "x"), "--include", "nothing")[0] == 3


def test_ls_lists_models_and_files(saved: str, tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    rdmaload.save(tiny_checkpoint.directory, f"{STORE}/other")
    assert run_json(capsys, "ls", STORE) == {"url": STORE, "models": ["org/tiny", "other"]}
    assert run_json(capsys, "ls", f"{STORE}/org")["models"] == ["org/tiny"]
    files = {path.name: path.stat().st_size for path in tiny_checkpoint.directory.iterdir()}
    for url in (saved, str(tiny_checkpoint.directory)):
        document = run_json(capsys, "ls", url)
        assert {file["path"]: file["size"] for file in document["files"]} == files
    assert main(["ls", STORE]) == 0
    assert capsys.readouterr().out == "org/tiny\nother\n"
    assert run_failing(capsys, "ls", f"{STORE}/nobody")[0] == 3
    for url in ("/no/such/place", "file:///no/such/place"):
        for more in ([], ["--scan"]):
            code, message = run_failing(capsys, "ls", url, *more)
            assert (code, "/no/such/place" in message) == (3, True)


def test_ls_scan_finds_what_the_list_lost(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    with MemoryConnector(parse_url(saved)) as connector:
        connector.delete("rdmaload:models/org/tiny")
    assert run_json(capsys, "ls", STORE)["models"] == []
    assert run_json(capsys, "ls", STORE, "--scan")["models"] == ["org/tiny"]
    assert run_json(capsys, "ls", STORE)["models"] == ["org/tiny"]


def test_info_describes_a_model(saved: str, tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    document = run_json(capsys, "info", saved)
    assert (document["kind"], document["world_size"], document["format"]) == ("checkpoint", 1, 1)
    assert document["tensors"] == len(tiny_checkpoint.tensors)
    assert document["dtypes"]["BF16"]["bytes"] == document["tensor_bytes"] == tiny_checkpoint.bytes
    assert document["bytes"] == tiny_checkpoint.file_bytes
    assert document["chunk_bytes"] == 2**20 - 4096
    assert document["checksums"] == "crc32c"
    assert "tensor_list" not in document
    tensors = run_json(capsys, "info", saved, "--tensors")["tensor_list"]
    shapes = {tensor["name"]: tuple(tensor["shape"]) for tensor in tensors}
    assert shapes == {name: spec.shape for name, spec in tiny_checkpoint.tensors.items()}
    document = run_json(capsys, "info", str(tiny_checkpoint.directory))
    assert (document["generation"], document["chunk_bytes"], document["checksums"]) == (None, None, None)


def test_info_of_a_model_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert run_json(capsys, "info", str(tmp_path))["tensors"] == 0


def test_names_cannot_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "\x1b[2Jx").write_text("")
    for command in ("ls", "info"):
        assert main([command, str(tmp_path)]) == 0
        assert "\x1b" not in capsys.readouterr().out


def test_prune_takes_a_grace(saved: str, tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    rdmaload.save(tiny_checkpoint.directory, saved)
    document = run_json(capsys, "prune", saved)
    assert (document["generations"], document["waiting"]) == (0, 1)
    assert run_json(capsys, "prune", saved, "--grace", "2h")["waiting"] == 1
    assert run_json(capsys, "prune", saved, "--grace", "0s")["generations"] == 1


@pytest.mark.parametrize(("answer", "removed"), [("y\n", True), ("YES\n", True), ("n\n", False), ("", False)])
def test_rm_asks_on_a_terminal(
    answer: str,
    removed: bool,
    saved: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert main(["rm", saved]) == (0 if removed else 1)
    assert f"remove {saved} (9 files, 2.5 MB)? [y/N]" in capsys.readouterr().err
    assert rdmaload.models(STORE) == ([] if removed else ["org/tiny"])


def test_rm_does_not_ask_where_nobody_answers(
    saved: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    code, message = run_failing(capsys, "rm", saved)
    assert code == 2
    assert "--yes" in message
    assert rdmaload.models(STORE) == ["org/tiny"]


# Exit codes


def test_what_cannot_be_reached_is_6(redis_server: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    with FaultProxy(redis_server.host, redis_server.port, mode="refuse") as proxy:
        url = proxy.url("m", "connect_timeout=0.05")
        assert run_failing(capsys, "info", url, "--quiet")[0] == 6
        assert run_failing(capsys, "ls", url, "--quiet")[0] == 6
    with FaultProxy(redis_server.host, redis_server.port, mode="never_accept") as proxy:
        assert run_failing(capsys, "info", proxy.url("m", "connect_timeout=0.05"), "--quiet")[0] == 6


def test_what_is_missing_is_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for url in (f"{STORE}/none", str(tmp_path / "none")):
        for command in ("load", "info", "verify", "ls"):
            assert run_failing(capsys, command, url)[0] == 3
        assert run_failing(capsys, "pull", url, str(tmp_path / "target"))[0] == 3
    assert run_failing(capsys, "rm", "--yes", f"{STORE}/none")[0] == 3
    assert run_failing(capsys, "save", str(tmp_path / "none"), f"{STORE}/m")[0] == 3


def test_a_pinned_generation_that_is_gone_is_3(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_failing(capsys, "load", saved, "-o", f"generation={'0' * 32}")[0] == 3


def test_a_flipped_bit_is_4(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    with MemoryConnector(parse_url(saved)) as connector:
        key = next(key for key in connector.list("org/tiny/chunks/") if key.endswith("/0"))
        value = bytearray(connector.get(key) or b"")
        value[len(value) // 2] ^= 4
        connector.set(key, value)
    code, message = run_failing(capsys, "verify", saved)
    assert code == 4
    assert key in message


def test_what_has_no_checksum_can_be_refused(tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(tiny_checkpoint.directory)
    assert run_json(capsys, "verify", directory)["unverified_bytes"] == tiny_checkpoint.file_bytes
    assert run_failing(capsys, "verify", directory, "-o", "verify=require")[0] == 4


def test_what_is_there_already_is_1(
    saved: str, tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(tiny_checkpoint.directory)
    assert run_failing(capsys, "save", directory, saved, "--no-overwrite")[0] == 1


def test_what_is_missing_in_this_release_is_8(
    tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_failing(capsys, "load", "redis+cluster://h/m")[0] == 8
    assert run_failing(capsys, "load", "nosuch://h/m")[0] == 8
    assert run_failing(capsys, "rm", "--yes", str(tiny_checkpoint.directory))[0] == 8


def test_wrong_usage_is_2(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([], "COMMAND"),
        (["lod", saved], "'lod'"),
        (["load"], "URL"),
        (["load", saved, "--nosuch"], "--nosuch"),
        (["load", saved, "-o", "conections=2"], "did you mean connections"),
        (["load", saved, "-o", "rank=2"], "unknown option rank"),
        (["load", saved, "-o", "progress=2"], "unknown option progress"),
        (["load", saved, "-o", "connections"], "connections=VALUE"),
        (["load", saved, "-o", "connections=0"], "from 1"),
        (["load", saved, "-o", "verify=off", "-o", "verify=off"], "twice"),
        (["load", f"{saved}?verify=off", "-o", "verify=auto"], "different values"),
        (["load", f"{saved}?conections=2"], "did you mean connections"),
        (["load", saved, "--rank", "-1"], "--rank"),
        (["load", "redis://h/7"], "?db=7"),
        (["load", saved, "--against", "redis://h/m"], "local directory"),
        (["verify", saved, "-o", "verify=off"], "verify=off"),
        (["pull", saved, "redis://h/m"], "local directory"),
        (["prune", saved, "--grace", "soon"], "'soon'"),
        (["save", ".", saved, "--rank", "0"], "--world-size"),
        (["save", ".", saved, "--rank", "2", "--world-size", "2", "--save-id", "x"], "0 to 1"),
        (["save", ".", saved, "--rank", "0", "--world-size", "2"], "--save-id"),
        (["save", ".", saved, "--save-id", "a b"], "--save-id"),
        (["save", saved, f"{STORE}/x", "--rank", "0", "--world-size", "1"], "leave out"),
        (["save", ".", saved, "--chunk-bytes", "0"], "1 byte"),
        (["save", ".", saved, "--chunk-bytes", "1MiB", "-o", "chunk_bytes=1MiB"], "keep one"),
        (["doctor", "-o", "db=1"], "give its url"),
    ):
        code, message = run_failing(capsys, *arguments)
        assert code == 2, arguments
        assert words in message, arguments


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError(), 2),
        (rdmaload.UrlError(), 2),
        (rdmaload.NotFoundError(), 3),
        (rdmaload.StaleGenerationError(), 3),
        (rdmaload.IntegrityError(), 4),
        (rdmaload.FormatError(), 4),
        (rdmaload.AuthenticationError(), 5),
        (rdmaload.UnavailableError(), 6),
        (rdmaload.LoadTimeoutError(), 6),
        (rdmaload.LayoutMismatchError(), 7),
        (rdmaload.NotSupportedError(), 8),
        (rdmaload.AlreadyExistsError(), 1),
        (rdmaload.MemoryLimitError(), 1),
        (rdmaload.DeviceError(), 1),
        (rdmaload.RdmaloadError(), 1),
        (rdmaload.PartialLoadError(), 1),
        (PermissionError(), 5),
        (OSError(), 1),
        (ValueError(), 1),
    ],
)
def test_each_error_has_its_code(error: Exception, code: int) -> None:
    assert exit_code(error) == code
    partial = rdmaload.PartialLoadError()
    partial.__cause__ = error
    assert exit_code(partial) == code


def test_interrupted_is_130(saved: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rdmaload.model.Model.verify", interrupted)
    assert run_failing(capsys, "verify", saved) == (130, "rdmaload: interrupted\n")
    assert main(["verify", saved, "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 130


def test_a_failure_is_one_document_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", f"{STORE}/none", "--json"]) == 3
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert (error["type"], error["url"], error["key"]) == ("NotFoundError", f"{STORE}/none", "none/manifest")
    assert error["exit_code"] == 3
    assert err == f"rdmaload: {error['message']}\n"
    assert main(["lod", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


def test_a_bug_is_one_line_and_a_traceback_only_with_debug(
    saved: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object, **keywords: object) -> None:
        raise AttributeError("no such\nthing")

    monkeypatch.setattr("rdmaload.model.Model.verify", broken)
    code, message = run_failing(capsys, "verify", saved)
    assert (code, message) == (1, "rdmaload: AttributeError: no such\\nthing\n")
    assert main(["--debug", "verify", saved]) == 1
    assert "Traceback" in capsys.readouterr().err


# Secrets


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("hf://org/model@rev/1", "hf://org/model@rev/1"),
        ("hf://org/model@", "hf://org/model@"),
        ("hf://me:s3cret@org/model", "hf://***@org/model"),
        ("https://h/m@1/a b@c", "https://h/m@1/a b@c"),
        ("https://me:s3cret@h/m@1?sig=s3cret", "https://me:***@h/m@1?sig=***"),
        ("s3://bucket/m@1", "s3://bucket/m@1"),
        ("file:///models/a:b@c", "file:///models/a:b@c"),
        ("/models/a:b@c", "/models/a:b@c"),
        ("redis://me:s3cret@h/m", "redis://me:***@h/m"),
        ("redis://me:s3/cret@h/m", "redis://me:***@h/m"),
        ("endpoint_url=http://me:s3cret@h", "endpoint_url=http://me:***@h"),
        ("--listing=http://h/a@b.txt", "--listing=http://h/a@b.txt"),
        ("password=s3cret://x", "password=***"),
    ],
)
def test_an_argument_is_quoted_whole_but_for_its_secrets(argument: str, shown: str) -> None:
    assert redact_arguments(f"cannot read {argument}: no", [argument]) == f"cannot read {shown}: no"


def test_a_name_with_an_at_sign_is_shown_in_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for url in (f"file://{tmp_path}/none@1", f"{tmp_path}/none@1", "memory://store/none@1"):
        code, message = run_failing(capsys, "info", url)
        assert code == 3
        assert "none@1" in message


def test_secrets_are_never_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "hunter2-%2F-s3cret"
    with RedisServer(password="another") as server:
        place = f"{server.host}:{server.port}"
        url = f"redis://:{secret}@{place}/m"
        plain = f"redis://{place}/m"
        for code, arguments in (
            (5, ["load", url]),
            (5, ["ls", f"redis://:{secret}@{place}"]),
            (5, ["info", plain, "-o", f"password={secret}"]),
            (5, ["info", f"{plain}?password={secret}"]),
            (5, ["save", str(Path(__file__).parent), url]),
            (5, ["prune", url]),
            (5, ["rm", "--yes", url]),
            (5, ["doctor", url]),
            (2, [url]),
            (2, ["load", plain, url]),
            (2, ["load", plain, f"--password={secret}"]),
            (2, ["load", plain, f"-o password={secret}", f"password={secret}"]),
            (2, ["load", url, "-o", f"password={secret}x"]),
            (2, ["load", f"redis://:{secret}@{place}/m?nosuch=1"]),
            (2, ["load", f"redis://:{secret}@{place}/"]),
            (2, ["load", f"redis://:{secret}/x@{place}/m"]),
            (2, ["doctor", f"redis://:{secret}@{place}:x/m"]),
            (8, ["load", f"redis+cluster://:{secret}@{place}/m"]),
        ):
            for more in ([], ["--json"], ["--debug"]):
                assert main([*arguments, *more]) == code, arguments
                out, err = capsys.readouterr()
                assert "s3cret" not in out + err, arguments


def test_the_right_password_works_and_is_not_shown(
    tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "password").write_text("s3cret\n")
    with RedisServer(password="s3cret") as server:
        plain = f"redis://{server.host}:{server.port}/m"
        for url, options in (
            (server.url("m"), []),
            (plain, ["-o", "password=s3cret"]),
            (plain, ["-o", f"password_file={tmp_path / 'password'}"]),
        ):
            directory = str(tiny_checkpoint.directory)
            for command in (["save", directory, url], ["load", url], ["info", url], ["ls", url], ["doctor", url]):
                for more in ([], ["--json"], ["--debug"]):
                    assert main([*command, *options, *more]) == 0, command
                    out, err = capsys.readouterr()
                    assert "s3cret" not in out + err, command


# What shows while it works


def test_there_is_no_bar_where_nobody_looks(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rdmaload.cli.progress._DELAY_SECONDS", 0)
    assert main(["verify", saved]) == 0
    assert capsys.readouterr().err == ""
    for arguments in (["--quiet"], ["--json"]):
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        assert main(["verify", saved, *arguments]) == 0
        assert terminal.getvalue() == ""


def test_a_bar_on_a_terminal_shows_bytes_rate_and_time_left(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rdmaload.cli.progress._DELAY_SECONDS", 0)
    monkeypatch.setattr("rdmaload.cli.progress._INTERVAL_SECONDS", 0)
    for arguments in (
        ["verify", saved],
        ["load", saved],
        ["pull", saved, str(tmp_path)],
        ["save", saved, f"{STORE}/copy"],
    ):
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        assert main(arguments) == 0
        shown = terminal.getvalue()
        assert f"{arguments[0]}: 100%" in shown
        assert "MB" in shown
        assert "B/s, 0:00 left" in shown


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 100), (1, 100), (24, 0), (24, 100)])
def test_a_bar_fits_a_real_terminal_of_any_size(
    rows: int, columns: int, saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rdmaload.cli.progress._DELAY_SECONDS", 0)
    master, slave = os.openpty()  # without a size, as `script` makes one where there is no terminal
    with open(master, "rb", buffering=0) as reader:
        with open(slave, "w") as terminal:
            if (rows, columns) != (0, 0):
                fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            monkeypatch.setattr("sys.stderr", terminal)
            assert main(["verify", saved]) == 0
            monkeypatch.undo()
        shown = b""
        with contextlib.suppress(OSError):  # EIO: all of what was written has been read
            while more := reader.read(1 << 16):
                shown += more
    drawn = [line for line in shown.decode().split("\r") if "verify:" in line]
    assert "verify: 100%" in drawn[-1]
    assert {len(line) for line in drawn} == {(columns or 80) - 1}  # the last column stays free


def test_a_log_gets_a_line_now_and_then(
    saved: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rdmaload.cli.progress._LINE_SECONDS", 0)
    assert main(["verify", saved]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"rdmaload: verify: 100%, (\d+) of \1 files, (\S+ MB) of \2, \S+ .?B/s, 0:00 left", lines[-1])
    assert all(re.match(r"rdmaload: verify: +\d+%, ", line) for line in lines)
    assert main(["verify", saved, "--quiet"]) == 0
    assert main(["verify", saved, "--json"]) == 0
    assert capsys.readouterr().err == ""


def test_a_stage_is_named_and_percentages_are_rounded_down(capsys: pytest.CaptureFixture[str]) -> None:
    from rdmaload.cli import progress as shown

    almost = Progress("save", 999, 1000, 1, 1, 5.0, rate=0.5, stage="publish", skipped_bytes=0)
    assert shown._head("save", almost) == "save (publish):  99"
    assert shown._tail(almost) == "999 bytes of 1.0 kB, 0 bytes/s, 0:02 left"
    assert shown._tail(Progress("load", 0, 7200_000, 0, 1, 5.0)) == "0 bytes of 7.2 MB, 0 bytes/s, ? left"
    assert shown._clock(7261.5) == "2:01:02"


def test_warnings_are_lines_of_ours(tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    with RedisServer(maxmemory="100mb", maxmemory_policy="allkeys-lru") as server:
        command = ["save", str(tiny_checkpoint.directory), server.url("m")]
        assert main(command) == 0
        assert "rdmaload: warning: " in capsys.readouterr().err
        assert main([*command, "--quiet"]) == 0
        assert capsys.readouterr().err == ""

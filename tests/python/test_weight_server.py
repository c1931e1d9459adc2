"""The weight server as a store of models: the whole road over it, other people's clients, the limit, exports."""

from __future__ import annotations

import logging
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import redis
import torch
from safetensors.torch import load_file, save_file

import rdmaload
from rdmaload import _core
from rdmaload.cli import main
from rdmaload.errors import AuthenticationError, IntegrityError, NotFoundError, StaleGenerationError, UnavailableError
from rdmaload.exports import export_directories, model_directories
from tests.support.checkpoints import Checkpoint
from tests.support.weight_server import WeightServer


def content(checkpoint: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in checkpoint.glob("*.safetensors"):
        found.update(load_file(path))
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def raw(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:  # values may be NaN
        return tensor.dtype, tensor.shape, tensor.flatten().view(torch.uint8).numpy().tobytes()

    return a.keys() == b.keys() and all(raw(a[name]) == raw(b[name]) for name in a)


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_checkpoint_comes_back_and_can_be_replaced_pruned_and_removed(
    weight_server: WeightServer, model: str, tiny_checkpoint: Checkpoint, tmp_path: Path, protocol: int
) -> None:
    url = weight_server.url(model, protocol=protocol, connections=3)
    saved = rdmaload.save(tiny_checkpoint.directory, url)
    stats = rdmaload.LoadStats()
    assert same(rdmaload.load(url, stats=stats), content(tiny_checkpoint.directory))
    assert (stats.path, stats.unverified_bytes) == ("resp-tcp", 0)
    assert stats.verified_bytes > 0
    rdmaload.pull_files(url, tmp_path / "copy")
    assert (tmp_path / "copy" / "config.json").read_bytes() == (tiny_checkpoint.directory / "config.json").read_bytes()

    reader = rdmaload.open(url)
    with reader:
        again = rdmaload.save({"w": torch.ones(3)}, url)
        assert again.generation != saved.generation
        assert same(reader.load(), content(tiny_checkpoint.directory))  # the old generation, until it is pruned
        assert rdmaload.prune(url, force=True).generations == 1
        with pytest.raises(StaleGenerationError):
            reader.load()
    assert same(rdmaload.load(url), {"w": torch.ones(3)})
    assert model in rdmaload.models(weight_server.url(""))
    assert rdmaload.remove(url) > 0
    with pytest.raises(NotFoundError):
        rdmaload.load(url)
    assert model not in rdmaload.models(weight_server.url(""))


def test_sglangs_layout_is_kept_too(weight_server: WeightServer, model: str) -> None:
    state = {"a": torch.arange(300_000), "b": torch.tensor(1.5)}
    url = weight_server.url(model)
    rdmaload.save(state, url, layout="sglang")
    assert same(rdmaload.load(url), state)


def test_ranks_save_and_load_their_own(weight_server: WeightServer, model: str) -> None:
    url = weight_server.url(model)
    for rank in range(2):
        rdmaload.save({"w": torch.full((1000,), float(rank))}, url, rank=rank, world_size=2, save_id="together")
    for rank in range(2):
        assert same(rdmaload.load(url, rank=rank), {"w": torch.full((1000,), float(rank))})


def test_what_does_not_fit_is_refused_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with WeightServer(max_memory=3_000_000) as server, caplog.at_level(logging.WARNING, "rdmaload"):
        rdmaload.save({"w": torch.ones(200_000)}, server.url("small"))
        with pytest.raises(UnavailableError, match="full; raise its maxmemory"):
            rdmaload.save({"w": torch.ones(2_000_000)}, server.url("large"))
        assert "do not fit beside" in caplog.text
        assert same(rdmaload.load(server.url("small")), {"w": torch.ones(200_000)})
        rdmaload.remove(server.url("large"))
        with server.client() as client:
            assert int(client.info("memory")["used_memory_rss"]) <= 3_000_000


def test_a_password_is_asked_for(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret\n")
    with WeightServer(password_file=secret, password="s3cret") as server:
        rdmaload.save({"w": torch.ones(3)}, server.url("m"))
        assert same(rdmaload.load(server.url("m")), {"w": torch.ones(3)})
        for bad in ("", ":wrong@", "other:s3cret@"):
            with pytest.raises(AuthenticationError):
                rdmaload.load(f"redis://{bad}127.0.0.1:{server.port}/m")
        command = ["redis-cli", "-p", str(server.port), "--no-auth-warning", "-a", "s3cret", "PING"]
        assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "PONG\n"


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_py_works(weight_server: WeightServer, model: str, protocol: int) -> None:
    value = random.Random(1).randbytes(3_000_000)
    with weight_server.client(protocol=protocol, client_name="tester") as client:
        assert client.ping()
        assert client.echo("x") == b"x"
        assert client.set(f"{model}/a", value)
        assert client.get(f"{model}/a") == value
        assert client.getrange(f"{model}/a", 10, 19) == value[10:20]
        assert client.getrange(f"{model}/a", -5, -1) == value[-5:]
        assert client.strlen(f"{model}/a") == len(value)
        assert client.set(f"{model}/a", b"2", nx=True) is None
        assert client.set(f"{model}/b", b"2", xx=True) is None
        assert client.set(f"{model}/b", b"2", nx=True)
        assert client.mget(f"{model}/b", f"{model}/none", f"{model}/b") == [b"2", None, b"2"]
        assert client.exists(f"{model}/a", f"{model}/b", f"{model}/none") == 2
        assert client.type(f"{model}/a") == b"string"
        assert client.sadd(f"{model}/s", "x", "y") == 2
        assert client.smembers(f"{model}/s") == {b"x", b"y"}
        assert client.sismember(f"{model}/s", "x")
        assert client.srem(f"{model}/s", "x", "z") == 1
        assert sorted(client.scan_iter(f"{model}/*", count=1)) == [f"{model}/{n}".encode() for n in "abs"]
        assert list(client.scan_iter(f"{model}/*", _type="set")) == [f"{model}/s".encode()]
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            client.get(f"{model}/s")
        with pytest.raises(redis.ResponseError, match="syntax error"):
            client.set(f"{model}/a", b"1", ex=10)
        with pytest.raises(redis.ResponseError, match="unknown command"):
            client.incr(f"{model}/n")
        assert client.config_get("maxmemory*")["maxmemory-policy"] == "noeviction"
        assert client.client_getname() in ("tester", b"tester")
        assert any(line["name"] == "tester" for line in client.client_list())
        assert client.info()["redis_version"]
        assert client.delete(f"{model}/a") == 1
        assert client.unlink(f"{model}/b", f"{model}/s", f"{model}/b") == 2
        with client.pipeline(transaction=False) as pipeline:
            for number in range(3000):
                pipeline.set(f"{model}/{number}", b"v" * number)
            assert all(pipeline.execute())
            for number in range(3000):
                pipeline.get(f"{model}/{number}")
            assert [len(got) for got in pipeline.execute()] == list(range(3000))


def test_redis_cli_and_redis_benchmark_work(weight_server: WeightServer, model: str) -> None:
    port = ["-p", str(weight_server.port)]

    def cli(*words: str, text: str | None = None) -> str:
        command = ["redis-cli", *port, *words]
        return subprocess.run(command, capture_output=True, text=True, input=text, timeout=60).stdout

    assert cli("SET", f"{model}/a", "hello world") == "OK\n"
    assert cli("GET", f"{model}/a") == "hello world\n"
    assert cli("-3", "CONFIG", "GET", "appendonly").split() == ["appendonly", "no"]
    assert cli(text=f"GET {model}/a\nDBSIZE\nNOSUCH\n").splitlines()[0] == "hello world"
    assert "unknown command 'NOSUCH'" in cli("NOSUCH")
    for extra in ([], ["-d", "100000", "-P", "4"]):
        command = ["redis-benchmark", *port, "-t", "get,set", "-n", "2000", "-q", *extra]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done
        assert done.stdout.count("requests per second") == 2
        assert "rror" not in done.stdout + done.stderr
    assert cli("DEL", "key:__rand_int__") == "1\n"


def test_doctor_has_nothing_against_it(weight_server: WeightServer, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", f"redis://127.0.0.1:{weight_server.port}"])
    lines = capsys.readouterr().out.splitlines()
    about = [
        line for line in lines if any(name in line for name in ("maxmemory", "persistence", "proto-max", "server"))
    ]
    assert len(about) >= 4
    assert not [line for line in about if not line.startswith("ok")]


# ---- exported directories ----------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path, tiny_checkpoint: Checkpoint) -> Path:
    root = tmp_path / "models"
    shutil.copytree(tiny_checkpoint.directory, root / "llama")
    (root / "other").mkdir()
    save_file({"w": torch.arange(1000)}, root / "other" / "model.safetensors")
    (root / "no model").mkdir()
    (root / "no model" / "readme.txt").write_text("nothing")
    return root


def test_directories_are_given_out_without_a_save(directory: Path, tmp_path: Path) -> None:
    generations = []
    for cached in (False, True):
        with WeightServer(models=directory, cache=tmp_path / "cache") as server:
            models = server.document["models"]
            assert isinstance(models, list)
            assert [(one["model"], one["cached_bytes"] == one["bytes"]) for one in models] == [
                ("llama", cached),
                ("other", cached),
            ]
            generations.append([one["generation"] for one in models])
            stats = rdmaload.LoadStats()
            assert same(rdmaload.load(server.url("llama"), stats=stats), content(directory / "llama"))
            assert stats.unverified_bytes == 0
            assert sorted(rdmaload.models(server.url(""))) == ["llama", "other"]
            with pytest.raises(UnavailableError, match="read-only replica"):
                rdmaload.save({"w": torch.ones(1)}, server.url("other"))
            with pytest.raises(UnavailableError, match="read-only replica"):
                rdmaload.remove(server.url("other"))
            assert same(rdmaload.load(server.url("other")), content(directory / "other"))
            rdmaload.save({"w": torch.ones(1)}, server.url("third"))
            assert same(rdmaload.load(server.url("third")), {"w": torch.ones(1)})
    assert generations[0] == generations[1]


def test_a_damaged_cache_is_computed_again(directory: Path, tmp_path: Path) -> None:
    found = []
    for round_ in range(3):
        store = _core.WeightStore(10**9)
        exports = list(export_directories(store, model_directories(directory), cache=tmp_path / "cache"))
        found.append([(export.generation, export.cached_bytes > 0) for export in exports])
        if round_ == 1:
            for path in (tmp_path / "cache").iterdir():
                value = bytearray(path.read_bytes())
                value[0] ^= 1
                path.write_bytes(value)
    assert [[known for _, known in exports] for exports in found] == [[False] * 2, [True] * 2, [False] * 2]
    assert len({tuple(generation for generation, _ in exports) for exports in found}) == 1


def test_a_file_that_changes_is_noticed_by_whoever_loads_it(directory: Path, tmp_path: Path) -> None:
    path = directory / "other" / "model.safetensors"
    with WeightServer(models=directory, cache=tmp_path / "cache") as server:
        changed = bytearray(path.read_bytes())
        changed[-1] ^= 1
        path.write_bytes(changed)
        with pytest.raises(IntegrityError):
            rdmaload.load(server.url("other"))
    with WeightServer(models=directory, cache=tmp_path / "cache") as server:
        with open(path, "r+b") as file:
            file.truncate(100)
        with pytest.raises(UnavailableError):
            rdmaload.load(server.url("other"), retry_timeout=0.2)
        assert same(rdmaload.load(server.url("llama")), content(directory / "llama"))
        assert server.end() == 0
        assert f"{path}: ends before byte 100" in server.errors()


def test_a_directory_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no sub-directory"):
        model_directories(tmp_path)
    with pytest.raises(NotFoundError, match="no directory"):
        model_directories(tmp_path / "none")


# ---- the commands ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(number: int) -> None:
    with WeightServer() as server:
        with server.client() as client:
            assert client.set("a", b"1")
            assert server.end(number) == 0
        assert server.errors() == ""


def test_shutdown_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    with WeightServer() as server:
        url = f"redis://127.0.0.1:{server.port}"
        assert main(["ping", url]) == 0
        assert capsys.readouterr().out.startswith(f"{url} answers in ")
        with server.client() as client:
            client.shutdown(nosave=True)
        assert server.process.wait(timeout=60) == 0
        assert main(["ping", url]) == 6
        assert main(["ping", url, "--wait", "0.3s"]) == 6
        capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--host", "0.0.0.0"], 2, "--insecure"),
        (["--host", "::"], 2, "--insecure"),
        (["--threads", "0"], 2, "at least 1"),
        (["-o", "connections=2"], 2, "takes no -o"),
        (["--password-file", "/does/not/exist"], 5, "cannot be read"),
        (["--models", "/does/not/exist"], 3, "no directory"),
        (["--max-memory", "0"], 2, "at least 1 byte"),
    ],
)
def test_what_serve_refuses(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", *arguments]) == code
    assert words in capsys.readouterr().err


def test_a_port_that_is_taken_is_said(weight_server: WeightServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", str(weight_server.port)]) == 6
    assert f"cannot listen on 127.0.0.1 port {weight_server.port}" in capsys.readouterr().err


def test_close_ends_threads_and_may_be_repeated() -> None:
    server = _core.WeightServer(_core.WeightStore(10**6), threads=3)
    assert server.wait(0.0) is False
    assert server.counters["connections_now"] == 0
    server.close()
    server.close()
    assert server.wait(0.0) is True

"""The weight server as a store of models: the whole road over it, other people's clients, the limit, exports."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
import torch
from safetensors.torch import load_file, save_file

import rdmaload
from rdmaload import _core
from rdmaload.cli import main
from rdmaload.errors import AuthenticationError, IntegrityError, NotFoundError, StaleGenerationError, UnavailableError
from rdmaload.export_checksums import ChecksumCache
from rdmaload.exports import BackgroundChecksums, DirectoryExport, export_directories, model_directories
from rdmaload.index import DEFAULT_CHUNK_BYTES
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
        with WeightServer(models=directory, cache=tmp_path / "cache", args=["--wait-checksums"]) as server:
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


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def checksums(url: str) -> str:
    with rdmaload.open(url) as model:
        return "pending" if model.checksums_pending else "known"


def test_a_server_is_ready_before_the_checksums_and_has_them_soon(directory: Path, tmp_path: Path) -> None:
    with WeightServer(models=directory, cache=tmp_path / "cache") as server:
        models = server.document["models"]
        assert isinstance(models, list)
        assert [one["checksums"] for one in models] == ["pending", "pending"]
        for model in ("llama", "other"):
            assert eventually(lambda model=model: checksums(server.url(model)) == "known")  # type: ignore[misc]
            stats = rdmaload.LoadStats()
            state = rdmaload.load(server.url(model), stats=stats, verify="require")
            assert same(state, content(directory / model))
            assert (stats.unverified_bytes, stats.verified_bytes >= stats.bytes) == (0, True)
        assert eventually(lambda: "other has checksums now" in server.errors())
        assert server.end() == 0
    with WeightServer(models=directory, cache=tmp_path / "cache") as again:  # the cache has them: nothing is pending
        models = again.document["models"]
        assert isinstance(models, list)
        assert [one["checksums"] for one in models] == ["crc32c", "crc32c"]


class Exported:
    """A server in this process with one exported model, whose checksums are computed when a test says so."""

    def __init__(self, directory: Path, cache: Path) -> None:
        self.store = _core.WeightStore(10**9)
        self.export = DirectoryExport(self.store, "m", directory, ChecksumCache(cache), DEFAULT_CHUNK_BYTES)
        self.export.publish()
        self.server = _core.WeightServer(self.store)
        self.url = f"redis://127.0.0.1:{self.server.port}/m"

    @property
    def generation(self) -> str:
        assert self.export.description is not None
        return self.export.description.generation

    def __enter__(self) -> Exported:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()


def test_who_comes_before_the_checksums_knows_and_loads_the_same_bytes(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = content(directory / "llama")
    with Exported(directory / "llama", tmp_path / "cache") as exported:
        early = exported.generation
        with pytest.raises(IntegrityError, match=r"no checksums yet.*--wait-checksums"):
            rdmaload.load(exported.url, verify="require")
        stats = rdmaload.LoadStats()
        with caplog.at_level(logging.WARNING, "rdmaload"):
            assert same(rdmaload.load(exported.url, stats=stats), expected)
        assert "still computing checksums" in caplog.text
        assert (stats.verified_bytes, stats.unverified_bytes >= stats.bytes > 0) == (0, True)
        assert main(["info", exported.url]) == 0
        assert "checksums pending" in capsys.readouterr().out
        assert main(["verify", exported.url]) == 0
        assert "no checksum was compared" in capsys.readouterr().out
        rdmaload.save(exported.url, str(tmp_path / "copy"))  # a copy of what cannot be verified is still a copy
        assert same(rdmaload.load(tmp_path / "copy"), expected)

        with rdmaload.open(exported.url) as reader:
            exported.export.compute(threads=1)
            assert exported.generation != early
            stats = rdmaload.LoadStats()
            assert same(reader.load(stats=stats), expected)  # opened before, loaded after
            assert (stats.generation, stats.verified_bytes, reader.checksums_pending) == (early, 0, True)
        stats = rdmaload.LoadStats()
        pinned = rdmaload.load(f"{exported.url}?generation={early}", stats=stats)  # another rank of the same job
        assert same(pinned, expected)
        assert (stats.generation, stats.verified_bytes) == (early, 0)
        stats = rdmaload.LoadStats()
        assert same(rdmaload.load(exported.url, stats=stats, verify="require"), expected)
        assert (stats.generation, stats.unverified_bytes) == (exported.generation, 0)

        # The early one is a replaced generation like any other; what is published stays read-only.
        assert rdmaload.prune(exported.url).waiting == 1
        assert rdmaload.prune(exported.url, force=True).generations == 1
        with pytest.raises(StaleGenerationError):
            rdmaload.load(f"{exported.url}?generation={early}")
        assert same(rdmaload.load(exported.url, verify="require"), expected)
        with pytest.raises(UnavailableError, match="read-only replica"):
            rdmaload.remove(exported.url)


def test_servers_of_the_same_files_agree_before_and_after_the_checksums(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory / "llama", copy)  # keeps the times
    other = tmp_path / "other"
    shutil.copytree(copy, other)
    weights = next(other.glob("*.safetensors"))
    times = weights.stat()
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns + 1000))
    with (
        Exported(directory / "llama", tmp_path / "a") as first,
        Exported(copy, tmp_path / "b") as second,
        Exported(other, tmp_path / "c") as third,
    ):
        early = first.generation
        assert early == second.generation != third.generation
        for one in (first, second, third):
            one.export.compute(threads=1)
        assert early != first.generation == second.generation != third.generation


def test_files_that_change_while_their_checksums_are_computed_stay_unverified(directory: Path, tmp_path: Path) -> None:
    path = directory / "other" / "model.safetensors"
    lines: list[str] = []
    with Exported(directory / "other", tmp_path / "cache") as exported:
        early = exported.generation
        save_file({"w": torch.arange(1000) + 1}, path)
        with BackgroundChecksums([exported.export], 1, lines.append):
            assert eventually(lambda: bool(lines))
        assert "m has no checksums" in lines[0]
        assert exported.generation == early
        assert checksums(exported.url) == "pending"
        assert not list((tmp_path / "cache").glob("*"))


def test_a_file_that_is_written_while_it_is_read_is_not_taken(directory: Path, tmp_path: Path) -> None:
    path = directory / "other" / "model.safetensors"
    with Exported(directory / "other", tmp_path / "cache") as exported:
        early = exported.generation
        file = exported.export._source.files[0]
        read = file.read_into

        def read_and_write(offset: int, buffer: memoryview) -> int:
            count = read(offset, buffer)
            path.write_bytes(path.read_bytes()[:-1] + b"x")  # in place: the open file changes, too
            return count

        file.read_into = read_and_write  # type: ignore[method-assign]
        with pytest.raises(IntegrityError, match="changed"):
            exported.export.compute(threads=1)
        assert exported.generation == early
        assert checksums(exported.url) == "pending"
        assert not list((tmp_path / "cache").glob("*"))


def test_a_server_that_ends_does_not_wait_for_checksums(tmp_path: Path) -> None:
    size = 40 * 10**9  # a hole, but longer to read than the test has patience
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    (tmp_path / "models" / "m").mkdir(parents=True)
    with open(tmp_path / "models" / "m" / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    with WeightServer(models=tmp_path / "models", cache=tmp_path / "cache") as server:
        assert server.end() == 0
        assert server.errors() == ""
    assert not (tmp_path / "cache").exists()


def test_a_damaged_cache_is_computed_again(directory: Path, tmp_path: Path) -> None:
    found = []
    for round_ in range(3):
        store = _core.WeightStore(10**9)
        exports = list(export_directories(store, model_directories(directory), cache=tmp_path / "cache"))
        found.append(
            [(one.description.generation, one.description.cached_bytes > 0) for one in exports if one.description]
        )
        if round_ == 1:
            for path in (tmp_path / "cache").iterdir():
                value = bytearray(path.read_bytes())
                value[0] ^= 1
                path.write_bytes(value)
    assert [[known for _, known in exports] for exports in found] == [[False] * 2, [True] * 2, [False] * 2]
    assert len({tuple(generation for generation, _ in exports) for exports in found}) == 1


def test_a_file_that_changes_is_noticed_by_whoever_loads_it(directory: Path, tmp_path: Path) -> None:
    path = directory / "other" / "model.safetensors"
    with WeightServer(models=directory, cache=tmp_path / "cache", args=["--wait-checksums"]) as server:
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
        (["--rdma-bind", "10.0.0.5"], 2, "--insecure"),
        (["--rdma-bind", "127.0.0.1"], 2, "--insecure"),
        (["--rdma-port", "6379"], 2, "needs --rdma-bind"),
        (["--max-rdma-connections", "0"], 2, "at least 1"),
    ],
)
def test_what_serve_refuses(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", *arguments]) == code
    assert words in capsys.readouterr().err


@pytest.mark.skipif(any(Path("/sys/class/infiniband").glob("*")), reason="this machine has RDMA")
def test_without_rdma_a_server_that_was_told_to_use_it_does_not_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", "--rdma-bind", "127.0.0.1", "--insecure"]) == 8
    assert "RDMA" in capsys.readouterr().err


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

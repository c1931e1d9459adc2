"""Models loaded by rdmaload give the same tokens in the real vLLM as models loaded by vLLM itself.

Greedy answers of tiny models with random weights: one wrong tensor changes them. Each driver is one process that
starts several engines and reloads weights, as imports and workers take longest.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import rdmaload
from tests.engines.test_sglang_engine import Sglang
from tests.support.fault_proxy import FaultProxy
from tests.support.faults import Stall
from tests.support.s3 import moto_s3, s3_url
from tests.support.servers import RedisServer

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
TWO_RANKS = {"tensor_parallel_size": 2}
WITH_WORKERS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The Python of an environment with vLLM for CPUs and rdmaload."""
    path = os.environ.get("RDMALOAD_VLLM", "")
    if not Path(path).is_file():
        pytest.fail("RDMALOAD_VLLM names no Python with vLLM: run scripts/test --engines", pytrace=False)
    return path


@pytest.fixture(scope="module")
def models(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for script, *arguments in (("make_models.py", root), ("make_quantised.py", root / "plain", root)):
        subprocess.run([vllm_python, HERE / script, *arguments], check=True, capture_output=True, timeout=300)
    (root / "untied").mkdir()  # its config says tied, but it has an lm_head of its own
    for path in (root / "tied").iterdir():
        (root / "untied" / path.name).write_bytes(path.read_bytes())
    weights = {}
    for path in (root / "untied").glob("*.safetensors*"):
        if path.suffix == ".safetensors":
            weights |= load_file(path)
        path.unlink()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, root / "untied" / "model.safetensors", metadata={"format": "pt"})
    return root


class Driver:
    """One process with engines, and those that it starts."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        self._output = ""
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
            )

    def output(self) -> str:
        """All that it prints; it must succeed. No process of it is left behind in any case."""
        try:
            output, _ = self.process.communicate(timeout=800)
        finally:
            _end_session(self.process.pid)
            self.process.wait()
        self._output = output
        assert self.process.returncode == 0, self.log()[-8000:]
        return output

    def answers(self) -> list[tuple[str, Any]]:
        """What each action gave."""
        lines = self.output().splitlines()
        return [tuple(json.loads(line[7:])) for line in lines if line.startswith("ANSWER ")]

    def log(self) -> str:
        """What it has printed to stderr, and to stdout once it has ended."""
        return self._output + self._log.read_text()


def _end_session(leader: int) -> None:
    """Kill what is left of a session, whatever groups its processes are in."""
    for pid in _processes(lambda pid: os.getsid(pid) == leader):
        os.kill(pid, signal.SIGKILL)


def _processes(wanted: Callable[[int], bool]) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted(int(entry.name)):
                    found.append(int(entry.name))
            except OSError:  # it has ended meanwhile
                continue
    return found


class Vllm:
    """Runs drivers and commands in vLLM's environment."""

    def __init__(self, python: str, scratch: Path) -> None:
        self._python = python
        self._scratch = scratch
        self._number = itertools.count()
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "PYTHONPATH"))},
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "RDMALOAD_CACHE_DIR": str(scratch / "cache"),
        }

    def environment(self, **more: str) -> dict[str, str]:
        return {**self._environment, **more}

    def start(self, actions: list[list[Any]], **environment: str) -> Driver:
        return self._start([str(HERE / "vllm_driver.py"), json.dumps(actions)], environment)

    def drive(self, actions: list[list[Any]], **environment: str) -> list[Any]:
        """What each action gave."""
        answers = self.start(actions, **environment).answers()
        assert [action for action, _ in answers] == [action for action, *_ in actions]
        return [answer for _, answer in answers]

    def run(self, *arguments: str, **environment: str) -> str:
        """What a command printed to stdout; it must succeed."""
        return self._start(list(arguments), environment).output()

    def _start(self, arguments: list[str], environment: dict[str, str]) -> Driver:
        log = self._scratch / f"log{next(self._number)}"
        return Driver([self._python, *arguments], self.environment(**environment), log)


@pytest.fixture(scope="module")
def vllm(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Vllm:
    return Vllm(vllm_python, tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def own(vllm: Vllm, models: Path) -> dict[str, list[list[int]]]:
    """The tokens of each model from vLLM's own loader, without our plug-in; "other" is reloaded over "plain"."""
    names = ["plain", "tied", "untied", "int8", "gptq"]
    actions: list[list[Any]] = []
    for name in names:
        actions += [["start", {"model": str(models / name)}], ["generate"]]
        actions += [["reload", str(models / "other")], ["generate"]] if name == "plain" else []
        actions += [["stop"]]
    answers = vllm.drive(actions, RDMALOAD_VLLM_PLUGIN="0")
    tokens = dict(zip(["plain", "other", *names[1:]], _tokens(answers), strict=True))
    assert len({json.dumps(each) for each in tokens.values()}) == len(tokens)
    return tokens


def _tokens(answers: list[Any]) -> list[Any]:
    return [answer for answer in answers if isinstance(answer, list) and isinstance(answer[0], list)]


def _loads(*starts: Any) -> list[list[Any]]:
    """Actions: an engine for each of these urls (or arguments), its tokens, its end."""
    actions: list[list[Any]] = []
    for start in starts:
        actions += [["start", start if isinstance(start, dict) else {"model": start}], ["generate"], ["stop"]]
    return actions


def test_one_rank(vllm: Vllm, redis: RedisServer, models: Path, own: dict[str, Any]) -> None:
    """From Redis, S3 and a directory, by reload, sharded, with tied embeddings; and a model that is not ours."""
    plain, other = str(models / "plain"), str(models / "other")
    for name in ("plain", "other", "tied", "untied"):
        rdmaload.save(models / name, redis.url(name))
    with moto_s3("bucket") as endpoint:
        s3 = s3_url(endpoint, "bucket", "plain")
        rdmaload.save(plain, s3)
        answers = vllm.drive(
            [
                *_loads(plain),
                ["start", {"model": redis.url("plain")}],
                ["generate"],
                ["reload", redis.url("other")],
                ["generate"],
                ["reload", s3],
                ["generate"],
                ["reload", other],
                ["generate"],
                ["stop"],
                *_loads({"model": s3, "load_format": "rdmaload"}, {"model": plain, "load_format": "rdmaload"}),
                *_loads(redis.url("tied"), redis.url("untied")),
                ["save", {"model": redis.url("untied"), "url": redis.url("untied-1")}],
                ["save", {"model": str(models / "tied"), "url": redis.url("tied-1")}],
                *_loads(redis.url("untied-1"), redis.url("tied-1")),
                ["refused", {"model": redis.url("tied-1"), "dtype": "float32"}],
                ["refused", {"model": redis.url("plain"), "model_loader_extra_config": {"conections": 2}}],
                ["refused", {"model": redis.url("nothing")}],
            ]
        )
    assert answers[0]["load_format"] == "auto"
    assert answers[0]["model"] == answers[0]["served"] == plain
    assert answers[3]["served"] == redis.url("plain")
    assert answers[12]["served"] == "s3://bucket/plain"
    expected = ["plain", "plain", "other", "plain", "other", "plain", "plain", "tied", "untied", "untied", "tied"]
    assert _tokens(answers) == [own[name] for name in expected]
    assert answers[-3][0] == "LayoutMismatchError"
    assert "dtype: saved for bfloat16, here float32" in answers[-3][1]
    assert "unknown option conections for load format rdmaload: did you mean connections?" in answers[-2][1]
    assert answers[-1][0] == "NotFoundError"


def test_quantised(vllm: Vllm, redis: RedisServer, models: Path, own: dict[str, Any]) -> None:
    """Weights that vLLM repacks for its kernels, with their scales: as a checkpoint, and as a rank has saved them."""
    for name in ("int8", "gptq"):
        rdmaload.save(models / name, redis.url(name))
    answers = vllm.drive(
        [
            *_loads(redis.url("int8"), redis.url("gptq")),
            ["save", {"model": redis.url("int8"), "url": redis.url("int8-1")}],
            ["save", {"model": redis.url("gptq"), "url": redis.url("gptq-1")}],
            *_loads(redis.url("int8-1"), redis.url("gptq-1")),
        ]
    )
    assert _tokens(answers) == [own["int8"], own["gptq"]] * 2
    with rdmaload.open(redis.url("int8-1")) as model:
        assert model.manifest is not None
        assert model.manifest.identity["quantization"] == "compressed-tensors"
        assert str(model.rank_tensors(0)["model.layers.0.mlp.down_proj.weight"].dtype) == "I8"


def test_what_sglangs_own_connector_has_saved(
    vllm: Vllm, sglang_python: str, redis: RedisServer, models: Path, own: dict[str, Any], tmp_path: Path
) -> None:
    """vLLM takes it: the names and shapes of a model that needs no other kernels are the same in both engines."""
    actions: list[list[Any]] = []
    for name in ("plain", "tied"):
        actions += [["start", {"model_path": str(models / name)}]]
        actions += [["rpc", "save_remote_model", {"url": redis.url(f"sglangs-{name}")}], ["stop"]]
    Sglang(sglang_python, tmp_path).drive(actions, RDMALOAD_SGLANG_PLUGIN="0")
    answers = vllm.drive(_loads(redis.url("sglangs-plain"), redis.url("sglangs-tied")))
    assert _tokens(answers) == [own["plain"], own["tied"]]


def test_two_ranks(vllm: Vllm, redis: RedisServer, models: Path) -> None:
    """Saved per rank by the command line, loaded per rank; and a whole checkpoint that both ranks fetch once."""
    plain, other = models / "plain", models / "other"
    rdmaload.save(plain, redis.url("two-plain"))
    rdmaload.save(other, redis.url("two-other"))
    small = ["--engine-arg", "dtype=bfloat16", "--engine-arg", "max_model_len=128"]
    report = json.loads(
        vllm.run(
            *("-m", "rdmaload", "save-sharded", "--model", redis.url("two-plain"), "--url", redis.url("sharded")),
            *("-tp", "2", "--json", *small),
            **WITH_WORKERS,
        )
    )
    assert report["world_size"] == 2
    assert report["layout"] == {"tp": 2, "pp": 1, "ep": 1}
    assert report["identity"]["engine"] == "vllm"
    sent = ["sent_bytes", redis.url("")]
    answers = vllm.drive(
        [
            *_loads({"model": str(plain), **TWO_RANKS}, {"model": redis.url("sharded"), **TWO_RANKS}),
            sent,
            ["start", {"model": redis.url("two-other"), **TWO_RANKS}],
            sent,
            ["reload", redis.url("two-plain")],
            sent,
            ["generate"],
            ["stop"],
            ["refused", {"model": redis.url("sharded")}],
        ],
        **WITH_WORKERS,
    )
    tokens = _tokens(answers)
    assert len(tokens) == 3
    assert tokens[1:] == [tokens[0]] * 2
    counts = [answer for answer in answers if isinstance(answer, int)]
    size = sum(path.stat().st_size for path in other.glob("*.safetensors"))
    for before, after in itertools.pairwise(counts):
        assert size < after - before < 1.3 * size  # configuration, tokenizer and indexes come on top
    assert answers[-1][0] == "LayoutMismatchError"
    assert "tp: saved for 2, here 1" in answers[-1][1]


def test_a_rank_killed_while_both_read(vllm: Vllm, redis: RedisServer, models: Path) -> None:
    """The store stalls in the middle, one rank is killed: the start fails clearly, and nothing is left of it."""
    rdmaload.save(models / "plain", redis.url("stalled"), chunk_bytes=64 << 10)
    with FaultProxy(redis.host, redis.port, Stall(after=300_000)) as proxy:
        options = {"connections": 1, "window_bytes": 1 << 20}
        driver = vllm.start(
            [
                ["refused", {"model": proxy.url("stalled"), "model_loader_extra_config": options, **TWO_RANKS}],
                ["left_behind"],
            ],
            **WITH_WORKERS,
        )
        try:
            os.kill(_worker(driver, "VLLM::Worker_TP1", proxy), signal.SIGKILL)
        except BaseException:
            _end_session(driver.process.pid)
            raise
        (_, (kind, text)), (_, left) = driver.answers()
    log = driver.log()
    assert re.search(r"UnavailableError: redis://\S+ member 1 of node group 'vllm-\w+'.* has ended", log), log[-6000:]
    assert kind == "RuntimeError", text  # vLLM's, which says no more than that a worker has failed
    assert left == []
    assert "@rdmaload-" not in Path("/proc/net/unix").read_text()


def _worker(driver: Driver, name: str, proxy: FaultProxy) -> int:
    """The worker of that name, once the store has stalled: then the ranks have met, and one of them reads."""
    deadline = time.monotonic() + 300
    while not proxy.fired:
        assert driver.process.poll() is None, driver.log()[-5000:]
        assert time.monotonic() < deadline, driver.log()[-5000:]
        time.sleep(0.05)
    (worker,) = _processes(
        lambda pid: os.getsid(pid) == driver.process.pid and name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    return worker


def test_serve(
    vllm: Vllm, vllm_python: str, redis: RedisServer, models: Path, tmp_path: Path, own: dict[str, Any]
) -> None:
    """`vllm serve redis://...`, asked over HTTP."""
    rdmaload.save(models / "plain", redis.url("served"))
    socket_path = tmp_path / "http.sock"
    log = (tmp_path / "log").open("w")
    command = [str(Path(vllm_python).parent / "vllm"), "serve", redis.url("served"), "--uds", str(socket_path)]
    command += ["--dtype", "bfloat16", "--max-model-len", "128", "--enforce-eager", "--max-num-seqs", "4"]
    server = subprocess.Popen(
        command,
        env=vllm.environment(VLLM_ENABLE_V1_MULTIPROCESSING="1"),
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        name = _ask(socket_path, "/v1/models", None, server, tmp_path / "log")["data"][0]["id"]
        assert name == redis.url("served")
        request = {"model": name, "prompt": "hello world", "max_tokens": 16, "temperature": 0, "return_token_ids": True}
        answer = _ask(socket_path, "/v1/completions", request, server, tmp_path / "log")
        assert answer["choices"][0]["token_ids"] == own["plain"][0]
    finally:
        server.terminate()
        try:
            server.wait(60)
        finally:
            _end_session(server.pid)
            server.wait(60)
            log.close()


def _ask(socket_path: Path, path: str, body: object, server: subprocess.Popen[bytes], log: Path) -> Any:
    """The JSON answer, as soon as the server listens."""
    deadline = time.monotonic() + 600
    while True:
        assert server.poll() is None, log.read_text()[-5000:]
        assert time.monotonic() < deadline, log.read_text()[-5000:]
        connection = http.client.HTTPConnection("localhost", timeout=300)
        connection.sock = socket.socket(socket.AF_UNIX)
        try:
            connection.sock.connect(str(socket_path))
        except OSError:
            connection.close()
            time.sleep(0.5)
            continue
        try:
            text = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, text, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        assert response.status == 200, content
        return json.loads(content)

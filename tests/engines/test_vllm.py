"""Models loaded by rdmaload give the same tokens in the real vLLM as models loaded by vLLM itself.

Greedy answers of tiny models with random weights: one wrong tensor changes them. Each driver is one process that
starts several engines and reloads weights, as a start takes most of a minute.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import rdmaload
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


@pytest.fixture(scope="session")
def models(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    subprocess.run([vllm_python, HERE / "make_models.py", root], check=True, capture_output=True, timeout=300)
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


class Vllm:
    """Runs drivers and commands in vLLM's environment."""

    def __init__(self, python: str, scratch: Path) -> None:
        self._python = python
        self.cache = scratch / "cache"
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "PYTHONPATH"))},
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "RDMALOAD_CACHE_DIR": str(self.cache),
        }

    def environment(self, **more: str) -> dict[str, str]:
        return {**self._environment, **more}

    def drive(self, actions: list[list[Any]], **environment: str) -> list[Any]:
        """What each action gave."""
        output = self.run(str(HERE / "vllm_driver.py"), json.dumps(actions), **environment)
        answers = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("ANSWER ")]
        assert [action for action, _ in answers] == [action for action, *_ in actions]
        return [answer for _, answer in answers]

    def run(self, *arguments: str, **environment: str) -> str:
        """What a command printed to stdout; it must succeed."""
        done = subprocess.run(
            [self._python, *arguments],
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=800,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
        return done.stdout


@pytest.fixture
def vllm(vllm_python: str, tmp_path: Path) -> Vllm:
    return Vllm(vllm_python, tmp_path)


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def test_one_rank(vllm: Vllm, redis: RedisServer, models: Path) -> None:
    """From Redis, S3 and a directory, by reload, sharded, with tied embeddings; and a model that is not ours."""
    plain, other = str(models / "plain"), str(models / "other")
    own = vllm.drive(
        [
            ["start", {"model": plain}],
            ["generate"],
            ["reload", other],
            ["generate"],
            ["stop"],
            ["start", {"model": str(models / "tied")}],
            ["generate"],
            ["stop"],
            ["start", {"model": str(models / "untied")}],
            ["generate"],
        ],
        RDMALOAD_VLLM_PLUGIN="0",
    )
    of_plain, of_other, of_tied, of_untied = own[1], own[3], own[6], own[9]
    assert len({json.dumps(tokens) for tokens in (of_plain, of_other, of_tied, of_untied)}) == 4
    for name in ("plain", "other", "tied", "untied"):
        rdmaload.save(models / name, redis.url(name))
    with moto_s3("bucket") as endpoint:
        s3 = s3_url(endpoint, "bucket", "plain")
        rdmaload.save(plain, s3)
        answers = vllm.drive(
            [
                ["start", {"model": plain}],
                ["generate"],
                ["stop"],
                ["start", {"model": redis.url("plain")}],
                ["generate"],
                ["reload", redis.url("other")],
                ["generate"],
                ["reload", s3],
                ["generate"],
                ["reload", other],
                ["generate"],
                ["stop"],
                ["start", {"model": s3, "load_format": "rdmaload"}],
                ["generate"],
                ["stop"],
                ["start", {"model": plain, "load_format": "rdmaload"}],
                ["generate"],
                ["stop"],
                ["start", {"model": redis.url("tied")}],
                ["generate"],
                ["stop"],
                ["start", {"model": redis.url("untied")}],
                ["generate"],
                ["stop"],
                ["save", {"model": redis.url("untied"), "url": redis.url("untied-1")}],
                ["save", {"model": str(models / "tied"), "url": redis.url("tied-1")}],
                ["start", {"model": redis.url("untied-1")}],
                ["generate"],
                ["stop"],
                ["start", {"model": redis.url("tied-1")}],
                ["generate"],
                ["stop"],
                ["refused", {"model": redis.url("tied-1"), "dtype": "float32"}],
                ["refused", {"model": redis.url("plain"), "model_loader_extra_config": {"conections": 2}}],
                ["refused", {"model": redis.url("nothing")}],
            ]
        )
    assert answers[0]["load_format"] == "auto"
    assert answers[0]["model"] == answers[0]["served"] == plain
    assert answers[3]["served"] == redis.url("plain")
    assert answers[12]["served"] == "s3://bucket/plain"
    tokens = [answer for answer in answers if isinstance(answer, list) and isinstance(answer[0], list)]
    assert tokens == [
        *(of_plain, of_plain, of_other, of_plain, of_other),
        *(of_plain, of_plain, of_tied, of_untied, of_untied, of_tied),
    ]
    assert answers[-3][0] == "LayoutMismatchError"
    assert "dtype: saved for bfloat16, here float32" in answers[-3][1]
    assert "unknown option conections for load format rdmaload: did you mean connections?" in answers[-2][1]
    assert answers[-1][0] == "NotFoundError"


def test_two_ranks(vllm: Vllm, redis: RedisServer, models: Path) -> None:
    """Saved per rank by the command line, loaded per rank; and the whole checkpoint on every rank, also by reload."""
    plain, other = str(models / "plain"), str(models / "other")
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
    answers = vllm.drive(
        [
            ["start", {"model": plain, **TWO_RANKS}],
            ["generate"],
            ["stop"],
            ["start", {"model": redis.url("sharded"), **TWO_RANKS}],
            ["generate"],
            ["stop"],
            ["start", {"model": redis.url("two-other"), **TWO_RANKS}],
            ["reload", redis.url("two-plain")],
            ["generate"],
            ["stop"],
            ["refused", {"model": redis.url("sharded")}],
        ],
        **WITH_WORKERS,
    )
    assert answers[1] == answers[4] == answers[8]
    assert answers[10][0] == "LayoutMismatchError"
    assert "tp: saved for 2, here 1" in answers[10][1]


def test_serve(vllm: Vllm, vllm_python: str, redis: RedisServer, models: Path, tmp_path: Path) -> None:
    """`vllm serve redis://...`, asked over HTTP."""
    rdmaload.save(models / "plain", redis.url("served"))
    own = vllm.drive([["start", {"model": str(models / "plain")}], ["generate"]])[1][0]
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
        assert answer["choices"][0]["token_ids"] == own
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
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

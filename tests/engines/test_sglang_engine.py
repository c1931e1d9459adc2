"""Models loaded by rdmaload give the same tokens in the real SGLang as models loaded by SGLang itself.

Greedy answers of tiny models with random weights: one wrong tensor changes them. SGLang runs on a CPU, without its
packages for GPUs (sglang_on_cpu). A start takes half a minute, so that each driver is one process with several engines.
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
import torch

import rdmaload
from tests.engines.sglang_engine_driver import SMALL
from tests.support.s3 import moto_s3, s3_url
from tests.support.servers import RedisServer

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def models(sglang_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    subprocess.run([sglang_python, HERE / "make_models.py", root], check=True, capture_output=True, timeout=300)
    return root


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


class Sglang:
    """Runs drivers and commands in SGLang's environment."""

    def __init__(self, python: str, scratch: Path) -> None:
        self.python = python
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SGLANG_", "PYTHONPATH"))},
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(HERE / "sglang_on_cpu"),
            "RDMALOAD_CACHE_DIR": str(scratch / "cache"),
            "SGLANG_USE_CPU_ENGINE": "1",
        }

    def drive(self, actions: list[list[Any]], **environment: str) -> list[Any]:
        """What each action gave."""
        output = self.run(str(HERE / "sglang_engine_driver.py"), json.dumps(actions), **environment)
        answers = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("ANSWER ")]
        assert [action for action, _ in answers] == [action for action, *_ in actions]
        return [answer for _, answer in answers]

    def run(self, *arguments: str, **environment: str) -> str:
        """What a command printed to stdout; it must succeed."""
        done = subprocess.run(
            [self.python, *arguments],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
        return done.stdout


@pytest.fixture
def sglang(sglang_python: str, tmp_path: Path) -> Sglang:
    return Sglang(sglang_python, tmp_path)


@pytest.fixture(scope="module")
def own(
    sglang_python: str, models: Path, redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[list[int]]]:
    """The tokens of SGLang without us, by model. It has saved `other` with its own connector, as `theirs`."""
    answers = Sglang(sglang_python, tmp_path_factory.mktemp("own")).drive(
        [
            ["start", {"model_path": str(models / "plain")}],
            ["generate"],
            ["update", str(models / "other")],
            ["generate"],
            ["rpc", "save_remote_model", {"url": redis.url("theirs")}],
            ["stop"],
        ],
        RDMALOAD_SGLANG_PLUGIN="0",
    )
    assert answers[1] != answers[3]
    return {"plain": answers[1], "other": answers[3]}


def test_one_rank(sglang: Sglang, redis: RedisServer, models: Path, own: dict[str, list[list[int]]]) -> None:
    """From Redis, S3, a directory and what SGLang's own connector has saved; by reload; and a model that is not ours.

    What SGLang saves after a reload is read by us, and what we save in its layout by its own connector.
    """
    plain, other = str(models / "plain"), str(models / "other")
    rdmaload.save(plain, redis.url("org/plain"))
    rdmaload.save(other, redis.url("other"))
    with moto_s3("bucket") as endpoint:
        s3 = s3_url(endpoint, "bucket", "other")
        rdmaload.save(other, s3)
        answers = sglang.drive(
            [
                ["start", {"model_path": plain}],
                ["generate"],
                ["update", redis.url("other")],
                ["generate"],
                ["rpc", "save_remote_model", {"url": redis.url("theirs-of-ours")}],
                ["update", plain],
                ["generate"],
                ["update", redis.url("nothing")],
                ["update", redis.url("theirs")],
                ["generate"],
                ["stop"],
                ["start", {"model_path": redis.url("org/plain")}],
                ["generate"],
                ["update", s3, "rdmaload"],
                ["generate"],
                ["update", plain, "rdmaload"],
                ["generate"],
                ["update", other],
                ["generate"],
                ["stop"],
                ["start", {"model_path": s3, "load_format": "rdmaload"}],
                ["generate"],
                ["stop"],
                ["start", {"model_path": redis.url("theirs")}],
                ["generate"],
                ["stop"],
                ["refused", {"model_path": redis.url("theirs"), "tp_size": 2}],
                ["refused", {"model_path": redis.url("other"), "model_loader_extra_config": '{"conections": 2}'}],
                ["refused", {"model_path": redis.url("nothing"), "load_format": "rdmaload"}],
            ]
        )
    with rdmaload.open(redis.url("org/plain")) as model:
        pinned = redis.url("org/plain", generation=model.generation)
    started = [answer for answer in answers if isinstance(answer, dict)]
    assert started[:2] == [
        {"model_path": plain, "load_format": "auto", "served_model_name": plain},
        {"model_path": pinned, "load_format": "remote", "served_model_name": "org/plain"},
    ]
    assert [answer["served_model_name"] for answer in started[2:]] == ["other", "theirs"]
    tokens = [answer for answer in answers if isinstance(answer, list) and isinstance(answer[0], list)]
    of_plain, of_other = own["plain"], own["other"]
    assert tokens == [
        *(of_plain, of_other, of_plain, of_plain),
        *(of_plain, of_other, of_plain, of_other),
        *(of_other, of_other),
    ]
    updated = [answer for answer in answers if isinstance(answer, list) and isinstance(answer[0], bool)]
    assert [done for done, _ in updated] == [True, True, False, False, True, True, True]
    assert "nothing" in updated[2][1]
    assert "cannot be reloaded" in updated[3][1]
    with rdmaload.open(redis.url("theirs-of-ours")) as model, rdmaload.open(redis.url("theirs")) as by_sglang:
        assert {file.path for file in model.files} == {file.path for file in by_sglang.files}
        states = [stored.load(rank=0) for stored in (model, by_sglang)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert answers[-3][0] == "LayoutMismatchError"
    assert "sharded over 1 ranks, this engine has 2" in answers[-3][1]
    assert "unknown option conections" in answers[-2][1]
    assert answers[-1][0] == "NotFoundError"


def test_per_rank(sglang: Sglang, redis: RedisServer, models: Path, own: dict[str, list[list[int]]]) -> None:
    """Two ranks: saved per rank by the command line and loaded per rank; and the whole checkpoint, fetched once."""
    rdmaload.save(models / "plain", redis.url("checkpoint"))
    two = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    small = [f"{name}={json.dumps(value)}" for name, value in SMALL.items()]
    report = json.loads(
        sglang.run(
            *("-m", "rdmaload", "save-sharded", "--engine", "sglang", "--model", redis.url("checkpoint")),
            *("--url", redis.url("sharded"), "-tp", "2", "--json", *(f"--engine-arg={each}" for each in small)),
            **two,
        )
    )
    assert report["world_size"] == 2
    assert report["layout"]["tp"] == 2
    assert report["identity"]["engine"] == "sglang"
    fetched = _sent(redis)
    answers = sglang.drive(
        [
            ["start", {"model_path": redis.url("sharded"), "tp_size": 2}],
            ["generate"],
            ["update", redis.url("checkpoint")],
            ["generate"],
            ["stop"],
            ["refused", {"model_path": redis.url("sharded")}],
        ],
        **two,
    )
    assert answers[1] == answers[3] == own["plain"]
    # Of 6 MB in either form each rank would fetch its half, and all of the checkpoint; besides, files and manifests.
    assert _sent(redis) - fetched < 2.5 * sum(path.stat().st_size for path in (models / "plain").iterdir())
    assert answers[5][0] == "LayoutMismatchError"
    assert "tp: saved for 2, here 1" in answers[5][1]


def test_sglangs_layout(sglang: Sglang, redis: RedisServer, models: Path, own: dict[str, list[list[int]]]) -> None:
    """Saved by our command, it is read by SGLang's own connector alone."""
    small = [f"{name}={json.dumps(value)}" for name, value in SMALL.items()]
    sglang.run(
        *("-m", "rdmaload", "save-sharded", "--engine", "sglang", "--model", str(models / "other")),
        *("--url", redis.url("layout"), "--layout", "sglang", *(f"--engine-arg={each}" for each in small)),
    )
    answers = sglang.drive(
        [["start", {"model_path": redis.url("layout"), "served_model_name": "m"}], ["generate"]],
        RDMALOAD_SGLANG_PLUGIN="0",
    )
    assert answers[1] == own["other"]


def test_launch_server(
    sglang: Sglang, redis: RedisServer, models: Path, own: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """`python -m sglang.launch_server --model-path redis://... --load-format rdmaload`, asked over HTTP."""
    rdmaload.save(models / "plain", redis.url("served"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--{name.replace('_', '-')}" for name, value in SMALL.items() if value is True]
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if value is not True]
    log = tmp_path / "log"
    command = [sglang.python, "-m", "sglang.launch_server", "--model-path", redis.url("served"), *flags]
    command += ["--load-format", "rdmaload", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            env=sglang.environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        assert _ask(port, "/v1/models", None, server, log)["data"][0]["id"] == "served"
        greedy = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
        answer = _ask(port, "/generate", {"text": "hello world", "sampling_params": greedy}, server, log)
        assert answer["output_ids"] == own["plain"][0]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(60)


def _sent(redis: RedisServer) -> int:
    """Bytes that the server has sent."""
    return int(redis.client().info("stats")["total_net_output_bytes"])


def _ask(port: int, path: str, body: object, server: subprocess.Popen[bytes], log: Path) -> Any:
    """The JSON answer, as soon as the server listens."""
    deadline = time.monotonic() + 400
    while True:
        assert server.poll() is None, log.read_text()[-5000:]
        assert time.monotonic() < deadline, log.read_text()[-5000:]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        try:
            text = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, text, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except ConnectionRefusedError:
            time.sleep(0.5)
            continue
        finally:
            connection.close()
        assert response.status == 200, content
        return json.loads(content)

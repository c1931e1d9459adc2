"""`rdmaload doctor`: what it says of this machine and of stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rdmaload
from rdmaload.cli import main
from tests.support.checkpoints import Checkpoint
from tests.support.fault_proxy import FaultProxy
from tests.support.faults import Delay
from tests.support.servers import RedisServer


def checks_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["doctor", *arguments, "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is all(check["status"] == "ok" for check in document["checks"])
    return {check["name"]: check for check in document["checks"]}


def test_this_machine_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    checks = checks_of(capsys)
    for name in (
        "rdmaload",
        "torch",
        "redis",
        "safetensors",
        "cpu",
        "crc32c",
        "tls",
        "transparent huge pages",
        "memlock limit",
        "host memory",
        "tcp congestion control",
    ):
        assert checks[name]["value"]
        assert checks[name]["status"] in ("ok", "warn")
        assert checks[name]["advice"] or checks[name]["status"] == "ok"
    assert checks["rdmaload"]["value"].startswith(rdmaload.__version__)
    assert main(["doctor"]) == 0
    assert all(line[:6] in ("ok    ", "warn  ") for line in capsys.readouterr().out.splitlines())


def test_a_missing_package_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rdmaload.cli.host_checks._PACKAGES", ("no-such-package",))
    check = checks_of(capsys)["no-such-package"]
    assert (check["status"], check["advice"]) == ("warn", "pip install no-such-package")


def test_a_store_is_described(
    redis_url: str, redis_server: RedisServer, tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checks_of(capsys, redis_url)["model"]["value"] == "nothing is published under this name"
    rdmaload.save(tiny_checkpoint.directory, redis_url)
    checks = checks_of(capsys, redis_url)
    assert checks["connection"]["status"] == "ok"
    assert checks["round trip"]["value"].endswith("ms (median of 20)")
    assert checks["server"]["value"].split()[0] in ("redis", "valkey")
    assert checks["maxmemory"]["value"].startswith("unlimited")
    assert checks["maxmemory-policy"]["value"] == "noeviction"
    assert "9 files" in checks["model"]["value"]
    server = f"redis://{redis_server.host}:{redis_server.port}"
    assert "model" not in checks_of(capsys, server)


def test_a_server_that_evicts_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with RedisServer(maxmemory="100mb", maxmemory_policy="allkeys-lru") as server:
        checks = checks_of(capsys, server.url("m"))
    assert checks["maxmemory"]["value"].startswith("104.9 MB, ")
    assert checks["maxmemory-policy"]["status"] == "warn"
    assert "noeviction" in checks["maxmemory-policy"]["advice"]


def test_a_server_that_is_full_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with RedisServer(maxmemory="20mb", maxmemory_policy="noeviction") as server:
        with server.client() as client:
            for number in range(14):
                client.set(f"other{number}", bytes(1_000_000))
        assert checks_of(capsys, server.url("m"))["maxmemory"]["status"] == "warn"


def test_a_distant_server_is_a_warning(redis_server: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    with FaultProxy(redis_server.host, redis_server.port, Delay(seconds=0.01)) as proxy:
        check = checks_of(capsys, proxy.url("m"))["round trip"]
    assert check["status"] == "warn"
    assert "bytes_in_flight" in check["advice"]


def test_a_user_without_info_still_gets_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    with RedisServer(users=["reader on >pw ~m/* +@read +@connection"]) as server:
        checks = checks_of(capsys, f"redis://reader:pw@{server.host}:{server.port}/m")
    assert checks["server"]["status"] == "warn"
    assert checks["model"]["status"] == "ok"


def test_a_store_that_does_not_answer_fails_after_the_rest(
    redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with FaultProxy(redis_server.host, redis_server.port, mode="refuse") as proxy:
        checks = checks_of(capsys, proxy.url("m", "connect_timeout=0.05"), "--quiet", code=6)
    assert checks["store"]["status"] == "fail"
    assert "cpu" in checks


def test_directories_are_checked_too(
    tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "3 safetensors files" in checks_of(capsys, str(tiny_checkpoint.directory))["model"]["value"]
    assert checks_of(capsys, str(tmp_path))["model"]["status"] == "warn"
    assert checks_of(capsys, str(tmp_path / "none"), code=3)["store"]["status"] == "fail"

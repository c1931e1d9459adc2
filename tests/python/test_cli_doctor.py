"""`rdmaload doctor`: what it says of this machine and of stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rdmaload
from rdmaload.cli import host_checks, main, system_checks
from tests.support.checkpoints import Checkpoint
from tests.support.fault_proxy import FaultProxy
from tests.support.faults import Delay
from tests.support.servers import RedisServer
from tests.support.weight_server import WeightServer


def checks_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["doctor", *arguments, "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    statuses = [check["status"] for check in document["checks"]]
    assert document["ok"] is (code == 0)
    assert document["ok"] is ("fail" not in statuses)
    assert document["warnings"] == statuses.count("warn")
    return {check["name"]: check for check in document["checks"]}


def test_this_machine_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    checks = checks_of(capsys)
    for name in (
        "rdmaload",
        "torch",
        "redis",
        "safetensors",
        "cpu",
        "cpu features",
        "crc32c",
        "tls",
        "numa",
        "gpus",
        "transparent huge pages",
        "memlock limit",
        "open files limit",
        "host memory",
        "control group memory",
        "tcp congestion control",
        "tcp receive buffer",
        "io_uring",
        "rdma",
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
    assert checks["room for a new generation"]["value"].startswith("2.5 MB of ")
    assert checks["keys"]["value"].endswith(" keys in database 0")
    assert checks["persistence"]["value"].startswith("off")
    assert checks["client-output-buffer-limit"]["value"] == "unlimited"
    assert int(checks["io-threads"]["value"]) >= 1
    assert checks["proto-max-bulk-len"]["value"] == "536.9 MB"
    server = f"redis://{redis_server.host}:{redis_server.port}"
    assert "model" not in checks_of(capsys, server)


def test_our_own_server_goes_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with WeightServer() as server:
        assert checks_of(capsys, server.url("m"))["server"]["value"] == f"rdmaload {rdmaload.__version__}"


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


def test_a_model_that_cannot_be_replaced_is_a_warning(
    tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    with RedisServer(maxmemory="9mb", maxmemory_policy="noeviction") as server:
        rdmaload.save(tiny_checkpoint.directory, server.url("m"))
        assert checks_of(capsys, server.url("m"))["room for a new generation"]["status"] == "ok"
        with server.client() as client:
            for number in range(4):
                client.set(f"other{number}", bytes(1_000_000))
        check = checks_of(capsys, server.url("m"))["room for a new generation"]
    assert check["status"] == "warn"
    assert "are missing" in check["advice"]


def test_settings_that_hurt_are_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--client-output-buffer-limit", "normal 2mb 1mb 60", "--proto-max-bulk-len", "1mb"]
    with RedisServer(args=[*settings, "--save", "3600 1", "--appendonly", "yes"]) as server:
        checks = checks_of(capsys, server.url("m"))
        large = checks_of(capsys, server.url("m", chunk_bytes="2MiB"))
    assert checks["persistence"]["status"] == "warn"
    assert checks["persistence"]["value"] == "append-only file and snapshots (3600 1)"
    assert (checks["client-output-buffer-limit"]["status"], checks["client-output-buffer-limit"]["value"]) == (
        "warn",
        "1.0 MB",
    )
    assert checks["proto-max-bulk-len"]["status"] == "ok"
    assert large["proto-max-bulk-len"]["status"] == "warn"
    assert "chunk_bytes=1048576 or less" in large["proto-max-bulk-len"]["advice"]


def test_keys_are_those_of_the_urls_database(capsys: pytest.CaptureFixture[str]) -> None:
    with RedisServer() as server:
        with server.client() as client:
            client.execute_command("SELECT", 3)
            client.set("a", 1)
        assert checks_of(capsys, f"{server.url('m')}?db=3")["keys"]["value"] == "1 key in database 3"
        assert checks_of(capsys, server.url("m"))["keys"]["value"] == "0 keys in database 0"


def test_no_secret_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with RedisServer(password="s3cret-word") as server:
        assert main(["doctor", server.url("m"), "--json"]) == 0
        out, err = capsys.readouterr()
        assert "s3cret-word" not in out + err
        assert main(["doctor", server.url("m").replace("s3cret-word", "wr0ng-word"), "--debug"]) == 5
        out, err = capsys.readouterr()
        assert "wr0ng-word" not in out + err


def fake_rdma(root: Path, state: str) -> None:
    port = root / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    for name, text in (("state", state), ("rate", "100 Gb/sec (4X EDR)"), ("link_layer", "InfiniBand")):
        (port / name).write_text(text + "\n")


@pytest.mark.parametrize(
    ("state", "libraries", "status", "words"),
    [
        ("4: ACTIVE", True, "ok", "mlx5_0 port 1 ACTIVE 100 Gb/sec (4X EDR) InfiniBand"),
        ("1: DOWN", True, "warn", "no port is active"),
        ("4: ACTIVE", False, "warn", "apt install libibverbs1"),
    ],
)
def test_rdma_devices(
    state: str, libraries: bool, status: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_rdma(tmp_path, state)
    monkeypatch.setattr(system_checks, "_INFINIBAND", tmp_path)
    monkeypatch.setattr(system_checks, "_library", lambda name: libraries)
    check = system_checks._rdma()
    assert check.status == status
    assert words in check.line()


def test_tcp_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_checks, "_TCP", tmp_path)
    assert system_checks._congestion_control().value == "unknown"
    (tmp_path / "tcp_congestion_control").write_text("bbr\n")
    (tmp_path / "tcp_available_congestion_control").write_text("reno bbr\n")
    assert "congestion_control=reno" in system_checks._congestion_control().advice
    (tmp_path / "tcp_congestion_control").write_text("cubic\n")
    assert system_checks._congestion_control().status == "ok"
    (tmp_path / "tcp_rmem").write_text("4096 131072 212992\n")
    assert system_checks._receive_buffer().status == "warn"
    (tmp_path / "tcp_rmem").write_text("4096 131072 33554432\n")
    assert system_checks._receive_buffer().status == "ok"


def test_few_open_files_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (256, 4096))
    check = host_checks._open_files()
    assert (check.status, check.value) == ("warn", "256")
    assert "4,096" in check.advice


def test_huge_pages_that_are_off_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_checks, "_THP", str(tmp_path))
    assert host_checks._huge_pages().status == "warn"
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    (tmp_path / "defrag").write_text("always defer [never]\n")
    assert host_checks._huge_pages().line().startswith("ok    transparent huge pages: enabled madvise, defrag never")
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert host_checks._huge_pages().status == "warn"

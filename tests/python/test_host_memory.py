"""How much memory a load may take, from control groups as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rdmaload import host_memory
from rdmaload.errors import MemoryLimitError

GIB = 1 << 30


def group(directory: Path, **values: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (directory / name.replace("__", ".")).write_text(f"{value}\n")
    return directory


def headroom(root: Path, membership: str) -> int | None:
    (root / "self").write_text(membership)
    return host_memory._cgroup_headroom(root, root / "self")


def test_version_2(tmp_path: Path) -> None:
    group(tmp_path / "a" / "b", memory__max=10 * GIB, memory__current=4 * GIB)
    assert headroom(tmp_path, "0::/a/b\n") == 6 * GIB


def test_version_2_unlimited(tmp_path: Path) -> None:
    group(tmp_path / "a", memory__max="max", memory__current=4 * GIB)
    assert headroom(tmp_path, "0::/a\n") is None


def test_an_ancestor_may_be_tighter(tmp_path: Path) -> None:
    group(tmp_path / "a", memory__max=5 * GIB, memory__current=4 * GIB)
    group(tmp_path / "a" / "b", memory__max=100 * GIB, memory__current=GIB)
    group(tmp_path / "a" / "b" / "c", memory__max="max", memory__current=GIB)
    assert headroom(tmp_path, "0::/a/b/c\n") == GIB


def test_page_cache_that_can_go_counts_as_free(tmp_path: Path) -> None:
    group(
        tmp_path / "a",
        memory__max=10 * GIB,
        memory__current=9 * GIB,
        memory__stat=f"anon 5\nfile {4 * GIB}\ninactive_file {3 * GIB}\nactive_file {GIB}",
    )
    assert headroom(tmp_path, "0::/a\n") == 4 * GIB


def test_over_the_limit_is_nothing_not_less(tmp_path: Path) -> None:
    group(tmp_path / "a", memory__max=GIB, memory__current=2 * GIB)
    assert headroom(tmp_path, "0::/a\n") == 0


def test_in_a_container_the_mounted_root_is_the_group(tmp_path: Path) -> None:
    group(tmp_path, memory__max=3 * GIB, memory__current=GIB)
    assert headroom(tmp_path, "0::/system.slice/docker-1234.scope\n") == 2 * GIB


def test_version_1(tmp_path: Path) -> None:
    group(
        tmp_path / "memory" / "docker" / "x",
        memory__limit_in_bytes=8 * GIB,
        memory__usage_in_bytes=6 * GIB,
        memory__stat=f"cache 1\ntotal_inactive_file {GIB}",
    )
    membership = "12:cpu,cpuacct:/docker/x\n5:memory:/docker/x\n1:name=systemd:/docker/x\n0::/docker/x\n"
    assert headroom(tmp_path, membership) == 3 * GIB


def test_version_1_in_a_container(tmp_path: Path) -> None:
    group(tmp_path / "memory", memory__limit_in_bytes=8 * GIB, memory__usage_in_bytes=6 * GIB)
    assert headroom(tmp_path, "5:memory:/docker/x\n") == 2 * GIB


@pytest.mark.parametrize("membership", ["", "nonsense\n", "0::/\n", "3:pids:/x\n", "0::/../../etc\n"])
def test_no_group_is_no_limit(tmp_path: Path, membership: str) -> None:
    assert headroom(tmp_path, membership) is None


def test_garbage_in_files_is_no_limit(tmp_path: Path) -> None:
    group(tmp_path / "a", memory__max="garbage", memory__current="-1")
    assert headroom(tmp_path, "0::/a\n") is None
    group(tmp_path / "b", memory__max=GIB)  # no usage
    assert headroom(tmp_path, "0::/b\n") is None
    group(tmp_path / "c", memory__max=GIB, memory__current=0, memory__stat="inactive_file many")
    assert headroom(tmp_path, "0::/c\n") == GIB
    assert host_memory._cgroup_headroom(tmp_path, tmp_path / "absent") is None


def test_what_this_machine_has() -> None:
    assert 0 < host_memory.available_bytes() < 2**50


def test_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_cgroup_headroom", lambda: 12345)
    assert host_memory.available_bytes() == 12345
    monkeypatch.setattr(host_memory, "_cgroup_headroom", lambda: 2**60)
    assert host_memory.available_bytes() < 2**60


def test_require(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1000)
    host_memory.require(1000, limit=None, url="u://h/m")
    host_memory.require(1000, limit=1000, url="u://h/m")
    with pytest.raises(MemoryLimitError, match=r"u://h/m.*1001 bytes.*1000 more.*weight_iterator") as caught:
        host_memory.require(1001, limit=None, url="u://h/m")
    assert caught.value.url == "u://h/m"
    assert isinstance(caught.value, MemoryError)
    with pytest.raises(MemoryLimitError, match="max_host_bytes is 10"):
        host_memory.require(11, limit=10, url="u://h/m")


def test_the_limit_of_the_control_groups(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("0::/a/b\n")
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    assert host_memory.control_group_limit(tmp_path, membership) is None
    (group / "memory.max").write_text("max\n")
    (tmp_path / "a" / "memory.max").write_text("5000\n")
    assert host_memory.control_group_limit(tmp_path, membership) == 5000
    (group / "memory.max").write_text("4000\n")
    assert host_memory.control_group_limit(tmp_path, membership) == 4000
    (group / "memory.max").unlink()
    (tmp_path / "a" / "memory.max").unlink()
    (group / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert host_memory.control_group_limit(tmp_path, membership) is None
    assert host_memory.control_group_limit(tmp_path, tmp_path / "none") is None

"""The machine while a benchmark runs: facts, CPU seconds, page cache, congestion control."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shutil
import struct
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

__all__ = [
    "cached_fraction",
    "congestion_control",
    "cpu_seconds",
    "drop_from_page_cache",
    "facts",
    "server_congestion_control",
    "warm_page_cache",
]

CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")
AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
THP = Path("/sys/kernel/mm/transparent_hugepage")
CACHESTAT = 451  # system call number, the same on every architecture; Linux 6.5


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _selected(path: Path) -> str | None:
    """The word in brackets, by which sysfs marks the setting in force."""
    text = _text(path)
    return text[text.index("[") + 1 : text.index("]")] if text and "[" in text else text


def _cpu_field(field: str) -> str | None:
    for line in (_text(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith(field):
            return line.split(":", 1)[1].strip()
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def congestion_control() -> str | None:
    """The system's default, which loopback servers use for what they send."""
    return _text(CONGESTION)


def facts() -> dict[str, object]:
    """CPU, kernel, memory, settings that matter here, and versions."""
    server = shutil.which("redis-server")
    version = subprocess.run([server, "--version"], capture_output=True, text=True) if server else None
    return {
        "cpu": _cpu_field("model name") or platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "virtual": "hypervisor" in (_cpu_field("flags") or "").split(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "congestion_control": congestion_control(),
        "congestion_controls_available": (_text(AVAILABLE) or "").split(),
        "transparent_hugepage": _selected(THP / "enabled"),
        "transparent_hugepage_defrag": _selected(THP / "defrag"),
        "redis_server": version.stdout.split("v=")[-1].split()[0] if version and "v=" in version.stdout else None,
        "python": platform.python_version(),
        **{package: _version(package) for package in ("rdmaload", "torch", "safetensors", "redis", "hiredis", "numpy")},
    }


def cpu_seconds(pid: int) -> float:
    """CPU seconds that process `pid` has used so far, all threads, user and system."""
    # schedstat counts nanoseconds; stat counts ticks of 10 ms. Threads that ended are in stat
    # alone.
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
    except FileNotFoundError:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def server_congestion_control(name: str | None) -> Iterator[bool]:
    """Set the system's default for new connections and restore it afterwards.

    None changes nothing. Yields whether `name` is in force: without the right to set it, or without
    that algorithm, the system stays as it is.
    """
    before = congestion_control()
    if name is None or name == before:
        yield True
        return
    try:
        CONGESTION.write_text(name)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        CONGESTION.write_text(before or "")


def _files(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]


def drop_from_page_cache(directory: Path, everything: bool = False) -> None:
    """Write back and evict the files of `directory`, or everything cached (as root)."""
    for path in _files(directory):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if everything:
        Path("/proc/sys/vm/drop_caches").write_text("1")


def warm_page_cache(directory: Path) -> None:
    """Read every file once, into memory that is used again."""
    block = bytearray(1 << 20)
    for path in _files(directory):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass


def cached_fraction(directory: Path) -> float | None:
    """The part of the directory's bytes that is cached; None where the kernel cannot say."""
    page = os.sysconf("SC_PAGE_SIZE")
    libc = ctypes.CDLL(None, use_errno=True)
    cached = total = 0
    for path in _files(directory):
        size = path.stat().st_size
        answer = ctypes.create_string_buffer(40)  # struct cachestat: five u64, the first nr_cache
        with open(path, "rb") as file:
            wanted = struct.pack("QQ", 0, size)
            if libc.syscall(CACHESTAT, file.fileno(), wanted, answer, 0) != 0:
                return None
        cached += min(size, int(struct.unpack_from("Q", answer)[0]) * page)
        total += size
    return cached / total if total else None

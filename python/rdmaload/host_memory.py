"""How much host memory a load may take: what the machine has, what the control groups leave, what the user said."""

from __future__ import annotations

from pathlib import Path

from rdmaload.errors import MemoryLimitError

__all__ = ["available_bytes", "control_group_limit", "require"]

_CGROUP_ROOT = Path("/sys/fs/cgroup")


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(directory: Path) -> int:
    """Page cache that the kernel gives back under pressure: it counts as used, but is not in anybody's way."""
    try:
        for line in (directory / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def _cgroup_directories(root: Path, membership: str) -> list[Path]:
    """This process's control group and its ancestors, of version 2 or of version 1's memory controller."""
    for line in membership.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        base = root if controllers == "" else root / "memory"
        group = base / path.strip().lstrip("/")
        # Inside a container the path may be the host's: then the mounted root is our group.
        candidates = [group, *group.parents] if group.is_dir() else [base]
        return [directory for directory in candidates if directory == base or base in directory.parents]
    return []


def _cgroup_headroom(root: Path = _CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    try:
        directories = _cgroup_directories(root, membership.read_text())
    except OSError:
        return None
    headroom: int | None = None
    for directory in directories:
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _read_number(directory / limit_name)
            usage = _read_number(directory / usage_name)
            if limit is None or usage is None:
                continue
            left = max(0, limit - usage + _reclaimable(directory))
            headroom = left if headroom is None else min(headroom, left)
    return headroom


def control_group_limit(root: Path = _CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """The least memory limit of this process's control groups in bytes; None when none is set."""
    try:
        directories = _cgroup_directories(root, membership.read_text())
    except OSError:
        return None
    found = [_read_number(group / name) for group in directories for name in ("memory.max", "memory.limit_in_bytes")]
    # Version 1 writes "unlimited" as almost 2**63.
    limits = [limit for limit in found if limit is not None and limit < 2**62]
    return min(limits, default=None)


def available_bytes() -> int:
    """Bytes that this process can still take: the least of MemAvailable and every control group's headroom."""
    available = 2**63
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    headroom = _cgroup_headroom()
    return available if headroom is None else min(available, headroom)


def require(nbytes: int, *, limit: int | None, url: str) -> None:
    """Raise MemoryLimitError when a load of `nbytes` would go over the `limit` option or over what there is."""
    if limit is not None and nbytes > limit:
        raise MemoryLimitError(
            f"{url}: the load needs {nbytes} bytes of host memory, max_host_bytes is {limit}: raise it, select "
            "tensors with include=, or use weight_iterator()",
            url=url,
        )
    available = available_bytes()
    if nbytes > available:
        raise MemoryLimitError(
            f"{url}: the load needs {nbytes} bytes of host memory, this process can take {available} more (machine "
            "and control group): select tensors with include=, or use weight_iterator()",
            url=url,
        )

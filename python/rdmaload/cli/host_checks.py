"""What this machine and this installation give: versions, processor, memory, limits; the rest in system_checks.

Everything is read; nothing is changed. A file that the kernel does not have says "unknown".
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path

from rdmaload import __version__
from rdmaload.amounts import size_text
from rdmaload.cli.checks import Check
from rdmaload.cli.system_checks import system_checks
from rdmaload.errors import NotSupportedError

__all__ = ["host_checks"]

_PACKAGES = ("torch", "safetensors", "redis")

# What urls of other kinds need, by the extra that brings it.
_OPTIONAL = {"huggingface_hub": "hf", "obstore": "gcs", "fsspec": "fsspec"}
_NEEDED_FOR = {"huggingface_hub": "hf://", "obstore": "gs:// and az://", "fsspec": "sftp://, hdfs:// and others"}

# A thread that receives takes about this much; slower checksums would be what a load waits for.
_ENOUGH_CHECKSUM_BYTES_PER_SECOND = 5e9
_CHECKSUM_SAMPLE_BYTES = 4 << 20

_SLAB_BYTES = 1 << 30  # what RDMA registers at a time, at most

_LITTLE_MEMORY_BYTES = 4e9
_ENOUGH_FILES = 1024

_THP = "/sys/kernel/mm/transparent_hugepage"


def host_checks() -> Iterator[Check]:
    """Every check of this machine, in the order in which people read them."""
    yield Check(
        "rdmaload",
        "ok",
        f"{__version__}, Python {platform.python_version()}, {platform.platform()}",
    )
    for package in _PACKAGES:
        yield _package(package)
    for package, extra in _OPTIONAL.items():
        yield _optional_package(package, extra)
    yield _processor()
    yield _processor_features()
    yield _checksums()
    yield _tls()
    yield _numa()
    yield _gpus()
    yield _huge_pages()
    yield _locked_memory()
    yield _open_files()
    yield _host_memory()
    yield _control_group()
    yield from system_checks()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _package(name: str) -> Check:
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "warn", "not installed", f"pip install {name}")


def _optional_package(name: str, extra: str) -> Check:
    """Nothing is wrong without it."""
    try:
        return Check(name, "ok", f"{importlib.metadata.version(name)}, for {_NEEDED_FOR[name]}")
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "ok", f"not installed; {_NEEDED_FOR[name]} need it: pip install 'rdmaload[{extra}]'")


def _processor() -> Check:
    lines = _read("/proc/cpuinfo").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.machine()
    usable = len(os.sched_getaffinity(0))
    value = f"{model}, {usable} of {os.cpu_count() or usable} CPUs usable"
    if usable < 2:
        return Check("cpu", "warn", value, "two or more let receiving and checksums overlap")
    return Check("cpu", "ok", value)


def _checksums() -> Check:
    try:
        from rdmaload import _core
    except ImportError as err:
        return Check("extension", "fail", f"cannot be imported: {err}", "install rdmaload again")
    sample = bytes(_CHECKSUM_SAMPLE_BYTES)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        _core.crc32c(sample)
        best = min(best, time.perf_counter() - started)
    rate = len(sample) / best
    value = f"{_core.crc32c_implementation()}, {size_text(rate)}/s"
    if rate < _ENOUGH_CHECKSUM_BYTES_PER_SECOND:
        return Check(
            "crc32c",
            "warn",
            value,
            "checksums may limit loads on this processor; more connections spread them",
        )
    return Check("crc32c", "ok", value)


def _gpus() -> Check:
    try:
        from rdmaload import _core

        info = _core.cuda_driver_info()
        count = _core.cuda_device_count()
        refusal = _core.kernels_refusal(0) if count else ""
    except (ImportError, RuntimeError) as err:  # NotSupportedError is one: this machine has no driver
        return Check("gpus", "ok", f"none ({str(err).partition(';')[0]})")
    version = int(info["version"])
    value = f"{count}, {info['library']} of CUDA {version // 1000}.{version % 1000 // 10}"
    if not refusal:
        return Check("gpus", "ok", f"{value}, with kernels")
    remedy = (
        "the driver or the GPU is older than the build's kernels: update the driver, or build with an older nvcc"
        if info["kernels"]
        else "build with nvcc: verify_device and many tiny tensors take longer without"
    )
    return Check("gpus", "warn", f"{value}, without kernels: {refusal}", remedy)


def _tls() -> Check:
    try:
        from rdmaload import _core

        return Check("tls", "ok", _core.tls_library())
    except ImportError as err:
        return Check("tls", "fail", f"the extension cannot be imported: {err}", "install rdmaload again")
    except NotSupportedError as err:
        return Check("tls", "warn", "not available", str(err))


def _processor_features() -> Check:
    """Instructions that checksums and copies profit from; their lines are named differently on x86 and ARM."""
    words: set[str] = set()
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):
            words = set(line.partition(":")[2].split())
            break
    wanted = ("sse4_2", "pclmulqdq", "avx2", "avx512f", "vpclmulqdq", "crc32", "pmull", "sve")
    found = [name for name in wanted if name in words]
    return Check("cpu features", "ok", " ".join(found) or "none that matter here")


def _numa() -> Check:
    nodes = sorted(path.name for path in Path("/sys/devices/system/node").glob("node[0-9]*"))
    if len(nodes) < 2:
        return Check("numa", "ok", "1 node")
    return Check(
        "numa",
        "ok",
        f"{len(nodes)} nodes",
        "memory of another node is slower: start the process on the node of its network device or GPU "
        "(numactl --cpunodebind --preferred)",
    )


def _huge_pages() -> Check:
    chosen = {name: _bracketed(f"{_THP}/{name}") for name in ("enabled", "defrag")}
    value = ", ".join(f"{name} {setting or 'unknown'}" for name, setting in chosen.items())
    if chosen["enabled"] not in ("always", "madvise"):
        return Check(
            "transparent huge pages",
            "warn",
            value,
            f"fresh memory costs more without them: echo madvise > {_THP}/enabled",
        )
    if chosen["defrag"] == "never":
        return Check(
            "transparent huge pages",
            "ok",
            value,
            f"where memory is fragmented there will be few: echo madvise > {_THP}/defrag",
        )
    return Check("transparent huge pages", "ok", value)


def _bracketed(path: str) -> str:
    """The word in brackets, by which the kernel marks the setting in force."""
    return _read(path).partition("[")[2].partition("]")[0]


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    if soft != resource.RLIM_INFINITY and soft < _ENOUGH_FILES:
        return Check(
            "open files limit",
            "warn",
            value,
            f"each connection and each weight file takes one: ulimit -n {_ENOUGH_FILES} (hard limit {hard:,})",
        )
    return Check("open files limit", "ok", value)


def _locked_memory() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check("memlock limit", "ok", "unlimited")
    rdma = Path("/sys/class/infiniband")
    if not rdma.is_dir() or not any(rdma.iterdir()):
        return Check("memlock limit", "ok", f"{size_text(soft)}; matters for RDMA only")
    if soft >= _SLAB_BYTES:
        return Check("memlock limit", "ok", size_text(soft))
    return Check(
        "memlock limit",
        "warn",
        size_text(soft),
        "RDMA registers its destination: raise it (ulimit -l unlimited, LimitMEMLOCK=infinity)",
    )


def _host_memory() -> Check:
    from rdmaload.host_memory import available_bytes

    fields = {}
    for line in _read("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    free, total = fields.get("MemAvailable", 0), fields.get("MemTotal", 0)
    usable = available_bytes()
    value = f"{size_text(free)} of {size_text(total)} available"
    if usable < _LITTLE_MEMORY_BYTES:
        return Check(
            "host memory",
            "warn",
            value,
            "a model that is larger fits neither: use weight_iterator(), or raise the limit",
        )
    return Check("host memory", "ok", value)


def _control_group() -> Check:
    from rdmaload.host_memory import available_bytes, control_group_limit

    limit = control_group_limit()
    if limit is None:
        return Check("control group memory", "ok", "no limit")
    return Check(
        "control group memory", "ok", f"limit {size_text(limit)}, a load may take {size_text(available_bytes())} more"
    )

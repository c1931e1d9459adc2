"""What the kernel and its drivers give: TCP settings, io_uring, a CUDA driver, RDMA devices.

Libraries are only opened, devices only looked at: no context is made on a GPU, and torch is not imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from rdmaload.amounts import size_text
from rdmaload.cli.checks import Check

__all__ = ["system_checks"]

_TCP = Path("/proc/sys/net/ipv4")
_INFINIBAND = Path("/sys/class/infiniband")
_IO_URING_SETUP = 425  # the system call's number on every architecture
_IO_URING_PARAMS_BYTES = 120
_ENOUGH_RECEIVE_BYTES = 4 << 20  # what a load has in flight by default


def system_checks() -> Iterator[Check]:
    """Every check of kernel and drivers."""
    yield _congestion_control()
    yield _receive_buffer()
    yield _io_uring()
    yield _rdma()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _congestion_control() -> Check:
    name = _read(_TCP / "tcp_congestion_control") or "unknown"
    available = _read(_TCP / "tcp_available_congestion_control").split()
    value = f"{name} (there are {', '.join(available)})" if available else name
    if name == "bbr":
        others = [other for other in ("cubic", "reno") if other in available]
        return Check(
            "tcp congestion control",
            "warn",
            value,
            "good over distances; to a store on the same host cubic or reno are up to twice as fast (the sender's "
            f"setting counts: sysctl -w net.ipv4.tcp_congestion_control={(others or ['cubic'])[0]})",
        )
    return Check("tcp congestion control", "ok", value)


def _receive_buffer() -> Check:
    limits = _read(_TCP / "tcp_rmem").split()
    if len(limits) != 3 or not limits[2].isdecimal():
        return Check("tcp receive buffer", "ok", "unknown")
    most = int(limits[2])
    if most < _ENOUGH_RECEIVE_BYTES:
        return Check(
            "tcp receive buffer",
            "warn",
            f"at most {size_text(most)}",
            "limits a connection over distance to so much per round trip: sysctl -w net.ipv4.tcp_rmem='4096 131072 "
            "16777216'",
        )
    return Check("tcp receive buffer", "ok", f"at most {size_text(most)}")


def _io_uring() -> Check:
    """Asks for the smallest ring: only that shows what seccomp and the kernel's settings say together."""
    disabled = _read(Path("/proc/sys/kernel/io_uring_disabled"))
    setting = f" (kernel.io_uring_disabled={disabled})" if disabled else ""
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(_IO_URING_PARAMS_BYTES)
    descriptor = libc.syscall(_IO_URING_SETUP, 1, parameters)
    if descriptor >= 0:
        os.close(descriptor)
        return Check("io_uring", "ok", f"allowed{setting}")
    reason = errno.errorcode.get(ctypes.get_errno(), str(ctypes.get_errno()))
    return Check("io_uring", "ok", f"not allowed: {reason}{setting}; files are read by threads")


def _library(name: str) -> bool:
    with contextlib.suppress(OSError):
        ctypes.CDLL(name)
        return True
    return False


def _rdma() -> Check:
    missing = [name for name in ("libibverbs", "librdmacm") if not _library(f"{name}.so.1")]
    ports = sorted(_INFINIBAND.glob("*/ports/*"))
    libraries = f"{' and '.join(missing)} not found" if missing else "libibverbs and librdmacm found"
    if not ports:
        return Check("rdma", "ok", f"no device, {libraries}; stores are reached over TCP")
    # "4: ACTIVE", "100 Gb/sec (4X EDR)", "InfiniBand"
    states = {port: _read(port / "state").partition(": ")[2] or "unknown" for port in ports}
    value = ", ".join(
        f"{port.parents[1].name} port {port.name} {state} {_read(port / 'rate')} {_read(port / 'link_layer')}".rstrip()
        for port, state in states.items()
    )
    if missing:
        return Check("rdma", "warn", f"{value}; {libraries}", "apt install libibverbs1 librdmacm1 ibverbs-providers")
    if "ACTIVE" not in states.values():
        return Check("rdma", "warn", value, "no port is active: check cable, switch and subnet manager (ibstat)")
    return Check("rdma", "ok", f"{value}; {libraries}")

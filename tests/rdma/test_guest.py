"""What the other tests of this folder take for granted about the guest that they run in."""

from __future__ import annotations

import resource
import subprocess

DEVICE = "rxe0"


def test_the_guest_has_an_active_rdma_device_on_its_address(rdma_address: str) -> None:
    with open(f"/sys/class/infiniband/{DEVICE}/ports/1/state") as state:
        assert state.read().split(": ")[1].strip() == "ACTIVE"
    shown = subprocess.run(["ip", "-4", "address", "show", "dum0"], capture_output=True, text=True, check=True).stdout
    assert f"inet {rdma_address}/24" in shown


def test_memory_can_be_locked_without_limit() -> None:
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY

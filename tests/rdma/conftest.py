"""Tests over real verbs: they need an RDMA device, which `scripts/test --rdma` gives them (in tests/rdma/guest).

`RDMALOAD_REQUIRE=rdma` makes it a failure that there is none. The guest has one CPU and its system calls cost 25 us:
time-outs are ten times the usual.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DEVICES = Path("/sys/class/infiniband")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if DEVICES.is_dir() and any(DEVICES.iterdir()):
        return
    reason = f"no RDMA device in {DEVICES}: `scripts/test --rdma` runs this in a guest that has one"
    if "rdma" in os.environ.get("RDMALOAD_REQUIRE", "").split(","):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def rdma_address() -> str:
    """The address of the guest's RDMA device."""
    return "10.77.0.1"

"""Tests against real engines: run by `scripts/test --engines`, which fetches what they need."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # for the package tests.support

from tests.support.servers import RedisServer  # noqa: E402


@pytest.fixture(scope="session")
def sglang_source() -> Path:
    """SGLang's wheel, unpacked."""
    path = Path(os.environ.get("RDMALOAD_SGLANG", ""))
    if not (path / "sglang" / "srt" / "connector" / "redis.py").is_file():
        pytest.fail("RDMALOAD_SGLANG names no unpacked wheel of sglang: run scripts/test --engines", pytrace=False)
    return path


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server

"""Tests against real engines: run by `scripts/test --engines`, which fetches what they need."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # for the package tests.support

from tests.support.servers import RedisServer  # noqa: E402


@pytest.fixture(scope="session")
def sglang_python() -> str:
    """The Python of an environment with SGLang, without its packages for GPUs, and rdmaload."""
    path = os.environ.get("RDMALOAD_SGLANG", "")
    if not Path(path).is_file():
        pytest.fail("RDMALOAD_SGLANG names no Python with SGLang: run scripts/test --engines", pytrace=False)
    return path


@pytest.fixture(scope="session")
def sglang_source(sglang_python: str) -> Path:
    """The directory that holds SGLang's Python files."""
    command = [sglang_python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"]
    return Path(subprocess.check_output(command, text=True).strip())


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server

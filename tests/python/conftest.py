"""Fixtures, markers and the leak check of every Python test.

`RDMALOAD_REQUIRE=cuda,rdma` makes a test that needs missing hardware fail instead of being skipped. With `cuda` the
tests of devices use this machine's GPUs; without, the fake driver, because a process has one.
"""

from __future__ import annotations

import functools
import gc
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # for the packages tests.support and benchmarks

from tests.support import checkpoints  # noqa: E402
from tests.support.servers import RedisServer, ServerError  # noqa: E402
from tests.support.weight_server import WeightServer  # noqa: E402

if TYPE_CHECKING:
    from tests.support.certificates import Authority

# How long what a module started may take to end; joining threads and closing sockets needs
# milliseconds.
LEAK_SECONDS = 3.0

_Server = TypeVar("_Server", RedisServer, WeightServer)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_cuda: needs an NVIDIA GPU and a torch that uses it")
    config.addinivalue_line("markers", "needs_rdma: needs an RDMA device")
    config.addinivalue_line("markers", "slow: takes seconds to minutes or gigabytes of memory")


def _required() -> set[str]:
    return {word.strip() for word in os.environ.get("RDMALOAD_REQUIRE", "").split(",")} - {""}


@functools.cache
def _missing(hardware: str) -> str | None:
    """Why a test cannot run here; None when it can."""
    if hardware == "rdma":
        devices = Path("/sys/class/infiniband")
        found = devices.is_dir() and any(devices.iterdir())
        return None if found else "no RDMA device in /sys/class/infiniband"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None if "cuda" in _required() else "this process uses the fake driver: set RDMALOAD_REQUIRE=cuda"


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = _required()
    if unknown := required - {"cuda", "rdma", "valkey", "nginx", "rclone"}:
        raise pytest.UsageError(
            f"RDMALOAD_REQUIRE: {', '.join(sorted(unknown))} is none of cuda, rdma, valkey, nginx, rclone"
        )
    for hardware in ("cuda", "rdma"):
        if item.get_closest_marker(f"needs_{hardware}") is None:
            continue
        reason = _missing(hardware)
        if reason is not None and hardware in required:
            pytest.fail(f"RDMALOAD_REQUIRE asks for {hardware}: {reason}", pytrace=False)
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One redis-server for the whole run: use it with the `model` fixture, and never flush it."""
    with RedisServer() as server:
        yield from _for_the_session(server)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Whom the tests' TLS servers are certified by."""
    from tests.support.certificates import Authority  # needs cryptography, which a machine with a GPU may lack

    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def tls_server(authority: Authority) -> Iterator[RedisServer]:
    """As redis_server, over TLS, for clients with a certificate."""
    with RedisServer(tls=authority, tls_clients=True) as server:
        yield from _for_the_session(server)


@pytest.fixture(scope="session")
def unix_server() -> Iterator[RedisServer]:
    """As redis_server, on a unix socket."""
    with RedisServer(unix=True) as server:
        yield from _for_the_session(server)


@pytest.fixture(scope="session")
def valkey_server(authority: Authority) -> Iterator[RedisServer]:
    """A valkey-server over TLS, where there is one."""
    try:
        server = RedisServer(tls=authority, executable="valkey-server")
    except ServerError as err:
        if "not found" not in str(err) or "valkey" in _required():
            raise
        pytest.skip(str(err))
    with server:
        yield from _for_the_session(server)


@pytest.fixture(scope="session")
def weight_server() -> Iterator[WeightServer]:
    """As redis_server, our own: `rdmaload serve`."""
    with WeightServer() as server:
        yield from _for_the_session(server)


def _for_the_session(server: _Server) -> Iterator[_Server]:
    descriptors = server.file_descriptors()
    _session_descriptors.update(descriptors)
    yield server
    _session_descriptors.difference_update(descriptors)


_SERVERS = ("redis_server", "tls_server", "unix_server", "valkey_server", "weight_server")


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Iterator[str]:
    """A model name that no other test has; its keys leave the session's server after the test."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", request.node.name).strip("-")[:60]
    name = f"{words}-{uuid.uuid4().hex[:8]}"
    yield name
    for fixture in _SERVERS:
        # Those that were asked for by name in the course of the test are found in the end, too.
        if fixture not in request.fixturenames and fixture not in request.node.funcargs:
            continue
        server: RedisServer | WeightServer = request.getfixturevalue(fixture)
        if server.running:
            with server.client() as client:
                for keys in iter(lambda: list(client.scan_iter(f"{name}*", count=1000)), []):
                    client.unlink(*keys)


@pytest.fixture
def redis_url(redis_server: RedisServer, model: str) -> str:
    """The url of a model that is not there yet."""
    return redis_server.url(model)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> checkpoints.Checkpoint:
    """About 2.5 MB in 3 Llama-like files with index, config and tokenizer files. Read-only."""
    return checkpoints.llama_like(tmp_path_factory.mktemp("tiny") / "llama", 2.5e6, files=3)


@pytest.fixture(scope="session")
def all_dtypes_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> checkpoints.Checkpoint:
    """A matrix, a scalar and an empty tensor of every safetensors dtype. Read-only."""
    return checkpoints.all_dtypes(tmp_path_factory.mktemp("dtypes") / "model")


@pytest.fixture(scope="session")
def many_tensors_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> checkpoints.Checkpoint:
    """20,000 tiny tensors in one file. Read-only."""
    return checkpoints.many_tensors(tmp_path_factory.mktemp("tensors") / "model")


@pytest.fixture(scope="session")
def many_files_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> checkpoints.Checkpoint:
    """1,000 files of one small tensor each. Read-only."""
    return checkpoints.many_files(tmp_path_factory.mktemp("files") / "model")


_session_descriptors: set[int] = set()


def _threads() -> set[str]:
    """Python threads, and native ones that carry this project's name."""
    found = {f"thread {thread.name}" for thread in threading.enumerate() if not _library_thread(thread)}
    for task in Path("/proc/self/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
        except OSError:  # it ended while we looked
            continue
        if name.startswith("rdmaload"):
            found.add(f"native thread {name} ({task.name})")
    return found


def _library_thread(thread: threading.Thread) -> bool:
    return type(thread).__module__.startswith("tqdm")  # its monitor lives as long as the process


# A CUDA driver, and cuFile, open what they like and keep it for as long as the process lives.
_DRIVERS_OWN = (
    ("/dev/nvidia", "/dev/shm", "/memfd:", "anon_inode:", "pipe:", str(Path.cwd() / "cufile.log"))
    if "cuda" in _required()
    else ()
)


def _descriptors() -> set[str]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        if int(entry.name) in _session_descriptors:
            continue
        try:
            target = os.readlink(entry)
        except OSError:  # the descriptor of the listing itself
            continue
        # What was gathered of authorities is kept for the process, once for each content.
        if not target.startswith(("/proc/", "/memfd:rdmaload-authorities", *_DRIVERS_OWN)):
            found.add(f"descriptor {entry.name} -> {target}")
    return found


@pytest.fixture(scope="module", autouse=True)
def no_leaks() -> Iterator[None]:
    """After each module its threads have ended and its descriptors are closed."""
    before = _threads() | _descriptors()
    yield
    if "rdmaload._core" in sys.modules:
        sys.modules["rdmaload._core"].release_pinned_memory()  # else it is kept for the next load, by a thread
    deadline = time.monotonic() + LEAK_SECONDS
    while True:
        gc.collect()
        left = (_threads() | _descriptors()) - before
        if not left:
            return
        if time.monotonic() > deadline:
            pytest.fail("left behind by this module:\n" + "\n".join(sorted(left)), pytrace=False)
        time.sleep(0.01)

"""Mooncake Store for a comparison: a master and a process with memory, in a network of their own.

Both listen on every address and ask nobody who they are, so that they run in a namespace with nothing but a loopback
device; the whole benchmark moves there, rdmaload's server too. `python -m benchmarks.compare.mooncake_store MASTER
BYTES` is the process with memory, in Mooncake's environment; it takes lines "key path offset size".
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

from benchmarks import checkpoints
from benchmarks.compare import environments
from benchmarks.compare.harness import Contender

__all__ = ["enter_namespace", "serving"]

_PART_BYTES = 16 << 20
_INSIDE = "RDMALOAD_COMPARE_NAMESPACE"
_SIOCSIFFLAGS, _UP_AND_RUNNING = 0x8914, 0x49


def enter_namespace() -> None:
    """Begin this program anew in a network namespace, with its loopback device up. Needs root."""
    if _INSIDE not in os.environ:
        command = ["unshare", "-n", sys.executable, "-m", "benchmarks.compare", *sys.argv[1:]]
        os.execvpe("unshare", command, {**os.environ, _INSIDE: "1"})
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", _UP_AND_RUNNING))


@contextlib.contextmanager
def serving(contender: Contender) -> Iterator[Contender]:
    """The contender with the weight files in a store. Raises Missing."""
    master = "127.0.0.1:50551"
    parts = [
        (f"{path.name}/{at}", path, at, min(_PART_BYTES, path.stat().st_size - at))
        for path in checkpoints.weight_files(contender.place.directory)
        for at in range(0, path.stat().st_size, _PART_BYTES)
    ]
    program = contender.python.with_name("mooncake_master")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    memory = sum(size for *_, size in parts) * 3 // 2 + (256 << 20)
    command = [contender.python, "-m", "benchmarks.compare.mooncake_store", master, memory]
    environment = {**os.environ, "PYTHONPATH": str(environments.ROOT)}
    with subprocess.Popen([program, "--port=50551"], **quiet) as started:  # type: ignore[call-overload]
        try:
            time.sleep(2)  # it says nothing when it listens
            with subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
                cwd=environments.ROOT,
            ) as server:
                try:
                    assert server.stdin is not None
                    assert server.stdout is not None
                    for key, path, at, size in parts:
                        server.stdin.write(f"{key} {path} {at} {size}\n")
                    server.stdin.write("\n")
                    server.stdin.flush()
                    if not any(line.strip() == "stored" for line in iter(server.stdout.readline, "")):
                        raise environments.Missing("Mooncake Store did not take the files")
                    objects = tuple((key, size) for key, _, _, size in parts)
                    place = replace(contender.place, objects=objects, extra=master)
                    yield replace(contender, place=place, server=server.pid)
                finally:
                    server.kill()
        finally:
            started.kill()


def _serve() -> None:
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    if store.setup("127.0.0.1", "P2PHANDSHAKE", int(sys.argv[2]), 64 << 20, "tcp", "", sys.argv[1]) != 0:
        sys.exit("no master")
    for line in iter(sys.stdin.readline, "\n"):
        key, path, at, size = line.split()
        with open(path, "rb") as file:
            file.seek(int(at))
            if store.put(key, file.read(int(size))) != 0:
                sys.exit(f"{key} was not taken")
    print("stored", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _serve()

"""rdmaload.load from Redis, checksums on, against redis_ceiling.cpp, which only receives.

Same server, same chunks, same bytes in flight; the ceiling with as many connections as rdmaload,
and with one. Target: at least 0.95 of the ceiling.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, paired
from tests.support.servers import RedisServer

SOURCE = Path(__file__).with_suffix(".cpp")


class Ceiling:
    """The compiled program and the list of chunks that it reads."""

    def __init__(self, directory: Path, server: RedisServer, model: str) -> None:
        self._server = server
        self._program = directory / "redis_ceiling"
        self._keys = directory / "keys"
        subprocess.run(
            ["g++", "-O2", "-std=c++20", "-pthread", str(SOURCE), "-o", str(self._program)],
            check=True,
        )
        self.chunks = chunk_keys(server, model)
        self._keys.write_text("".join(f"{key} {length}\n" for key, length in self.chunks))

    def run(self, connections: int, bytes_in_flight: int, dump: Path | None = None) -> paired.Measured:
        """One run of the program, as it measured itself."""
        command = [self._program, self._server.host, self._server.port, self._keys]
        command += [connections, bytes_in_flight, *([] if dump is None else [dump])]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"redis_ceiling: {done.stderr.strip()}")
        answer = json.loads(done.stdout)
        return paired.Measured(answer["seconds"], answer["cpu_seconds"])

    def check(self, directory: Path, files: Sequence[Path], connections: int, in_flight: int) -> None:
        """Compare what the program received with `files`, one after the other."""
        dump = directory / "dump"
        self.run(connections, in_flight, dump)
        with open(dump, "rb") as received:
            for path in files:
                if received.read(path.stat().st_size) != path.read_bytes():
                    raise checkpoints.Mismatch(f"the ceiling received other bytes than {path.name}")
        dump.unlink()


def chunk_keys(server: RedisServer, model: str) -> list[tuple[str, int]]:
    """Keys and sizes of the model's weight chunks, file by file, as format 1 names them."""
    with server.client() as client:
        manifest = json.loads(client.get(f"{model}/manifest").splitlines()[0])
        prefix = f"{model}/chunks/{manifest['generation']}/"
        raw = client.get(f"{prefix}index")
        meta_bytes = int.from_bytes(raw[12:16], "little")
        meta = json.loads(raw[16 : 16 + meta_bytes])
        size = meta["chunk_bytes"]
        keys: list[tuple[str, int]] = []
        for file in sorted(meta["files"], key=lambda file: str(file["path"])):
            if file["header_bytes"]:
                for number, start in enumerate(range(0, file["size"], size)):
                    length = min(size, file["size"] - start)
                    keys.append((f"{prefix}{file['number']}/{number}", length))
        return keys


def ours(url: str, options: dict[str, Any]) -> object:
    import rdmaload

    return rdmaload.load(url, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    paired.add_arguments(parser)
    parser.add_argument("--connections", type=int, default=2, help="rdmaload's, and the ceiling's")
    parser.add_argument("--bytes-in-flight", type=int, default=4 << 20)
    parser.add_argument("--chunk-bytes", type=int, help="of the saved model; default: rdmaload's")
    arguments = parser.parse_args()
    import rdmaload

    paired.import_everything()
    with (
        tempfile.TemporaryDirectory(dir=arguments.dir) as name,
        paired.congestion(arguments),
        RedisServer() as server,
    ):
        directory = Path(name)
        checkpoint = checkpoints.llama_like(directory / "model", arguments.bytes)
        url = server.url("model")
        rdmaload.save(checkpoint.directory, url, chunk_bytes=arguments.chunk_bytes)
        ceiling = Ceiling(directory, server, "model")
        in_flight = arguments.bytes_in_flight
        options = {"connections": arguments.connections, "bytes_in_flight": in_flight}

        def check(state: Any) -> None:
            assert checkpoints.compare(state, checkpoint.directory) == checkpoint.bytes

        def compare_ceiling(connections: int, _: object) -> None:
            ceiling.check(directory, checkpoint.weight_files, connections, in_flight)

        own = paired.Way(
            f"rdmaload, {arguments.connections} connections",
            lambda: ours(url, options),
            check=check,
            server_pid=lambda: server.pid,
        )
        others = [
            paired.Way(
                f"ceiling, {connections} connections",
                functools.partial(ceiling.run, connections, in_flight),
                check=functools.partial(compare_ceiling, connections),
                server_pid=lambda: server.pid,
            )
            for connections in sorted({arguments.connections, 1}, reverse=True)
        ]
        result = paired.compare(own, others, checkpoint.bytes, arguments.pairs, cold_memory=arguments.cold_memory)
        settings = {**options, "chunk_bytes": ceiling.chunks[0][1], "chunks": len(ceiling.chunks)}
        paired.report("redis_ceiling", {"settings": settings, "result": result}, arguments.json)


if __name__ == "__main__":
    main()

"""rdmaload.load from Redis, checksums on, against redis_ceiling.cpp, which only receives.

Same server, same chunks. rdmaload with its defaults; the ceiling with one and with two connections, each with 2 MiB
in flight, and with one that SO_RCVLOWAT wakes as late as rdmaload's threads. Target: at least 0.95 of the ceiling.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, paired
from tests.support.servers import RedisServer
from tests.support.weight_server import WeightServer

SOURCE = Path(__file__).with_suffix(".cpp")


@dataclass(frozen=True)
class Setting:
    """How the program is run."""

    connections: int
    low_water: int = 1

    @property
    def name(self) -> str:
        late = f", woken for {self.low_water >> 10} KiB" if self.low_water > 1 else ""
        return f"ceiling, {self.connections} connection{'s' * (self.connections > 1)}{late}"


SETTINGS = (Setting(1), Setting(2), Setting(1, 256 << 10))


class Ceiling:
    """The compiled program and the list of chunks that it reads."""

    def __init__(self, directory: Path, server: RedisServer | WeightServer, model: str) -> None:
        self._server = server
        self._program = directory / "redis_ceiling"
        self._keys = directory / "keys"
        subprocess.run(
            ["g++", "-O2", "-std=c++20", "-pthread", str(SOURCE), "-o", str(self._program)],
            check=True,
        )
        self.chunks = chunk_keys(server, model)
        self._keys.write_text("".join(f"{key} {length}\n" for key, length in self.chunks))

    def run(self, setting: Setting, connection_bytes: int, dump: Path | None = None) -> paired.Measured:
        """One run of the program, as it measured itself."""
        command = [self._program, self._server.host, self._server.port, self._keys, setting.connections]
        command += [setting.connections * connection_bytes, setting.low_water, *([] if dump is None else [dump])]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"redis_ceiling: {done.stderr.strip()}")
        answer = json.loads(done.stdout)
        return paired.Measured(answer["seconds"], answer["cpu_seconds"])

    def check(self, directory: Path, files: Sequence[Path], setting: Setting, connection_bytes: int) -> None:
        """Compare what the program received with `files`, one after the other."""
        dump = directory / "dump"
        self.run(setting, connection_bytes, dump)
        with open(dump, "rb") as received:
            for path in files:
                if received.read(path.stat().st_size) != path.read_bytes():
                    raise checkpoints.Mismatch(f"the ceiling received other bytes than {path.name}")
        dump.unlink()


def chunk_keys(server: RedisServer | WeightServer, model: str) -> list[tuple[str, int]]:
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
    parser.add_argument("--connection-bytes", type=int, default=2 << 20, help="in flight per connection of the ceiling")
    parser.add_argument("--connections", type=int, help="rdmaload's; default: its own")
    parser.add_argument("--bytes-in-flight", type=int, help="rdmaload's, over all connections; default: its own")
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
        given = {"connections": arguments.connections, "bytes_in_flight": arguments.bytes_in_flight}
        options = {name: value for name, value in given.items() if value is not None}

        def check(state: Any) -> None:
            assert checkpoints.compare(state, checkpoint.directory) == checkpoint.bytes

        def compare_ceiling(setting: Setting, _: object) -> None:
            ceiling.check(directory, checkpoint.weight_files, setting, arguments.connection_bytes)

        own = paired.Way(
            "rdmaload",
            lambda: ours(url, options),
            check=check,
            server_pid=lambda: server.pid,
        )
        others = [
            paired.Way(
                setting.name,
                functools.partial(ceiling.run, setting, arguments.connection_bytes),
                check=functools.partial(compare_ceiling, setting),
                server_pid=lambda: server.pid,
            )
            for setting in SETTINGS
        ]
        result = paired.compare(own, others, checkpoint.bytes, arguments.pairs, cold_memory=arguments.cold_memory)
        settings = {
            **options,
            "connection_bytes": arguments.connection_bytes,
            "chunk_bytes": ceiling.chunks[0][1],
            "chunks": len(ceiling.chunks),
        }
        paired.report("redis_ceiling", {"settings": settings, "result": result}, arguments.json)


if __name__ == "__main__":
    main()

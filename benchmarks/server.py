"""rdmaload.load from our weight server against the same load from redis-server, valkey-server, and the raw loopback.

Same checkpoint, same chunks, same client and options for the servers; their CPU time stands beside. The raw loopback
is loopback_limit.cpp: a process that sends the same sizes over as many connections and one that receives, without
protocol and checksums, by send(), by sendfile() and by references to private huge pages. Once the whole load is
compared with it, once (`receiver`) redis_ceiling.cpp, which only receives from our server: the server's own part.
Target: at least as fast as the better of the others, at half its server CPU per GB, and 0.9 of the raw loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, paired
from benchmarks.redis_ceiling import Ceiling, Setting
from tests.support.servers import RedisServer
from tests.support.weight_server import WeightServer

LIMIT_SOURCE = Path(__file__).with_name("loopback_limit.cpp")


def loads(url: str, options: dict[str, Any]) -> object:
    import rdmaload

    return rdmaload.load(url, **options)


def limit_program(directory: Path) -> Path:
    program = directory / "loopback_limit"
    command = ["g++", "-O2", "-std=c++20", "-pthread", str(LIMIT_SOURCE), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def limit(program: Path, total_bytes: int, chunk_bytes: int, connections: int, how: str) -> paired.Measured:
    command = [program, total_bytes, chunk_bytes, connections, how]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"loopback_limit: {done.stderr.strip()}")
    answer = json.loads(done.stdout)
    return paired.Measured(answer["seconds"], answer["cpu_seconds"], answer["sender_cpu_seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    paired.add_arguments(parser)
    parser.add_argument("--connections", type=int, default=2)
    parser.add_argument("--connection-bytes", type=int, default=2 << 20, help="in flight, per connection")
    parser.add_argument("--export", action="store_true", help="measure an exported directory, too")
    parser.add_argument("--tls", action="store_true", help="measure our server and redis-server under TLS, too")
    parser.add_argument("--only", nargs="+", choices=["servers", "limit"], default=["servers", "limit"])
    arguments = parser.parse_args()
    import rdmaload

    paired.import_everything()
    in_flight = arguments.connections * arguments.connection_bytes
    options = {"connections": arguments.connections, "bytes_in_flight": in_flight}
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.dir)))
        stack.enter_context(paired.congestion(arguments))
        checkpoint = checkpoints.llama_like(directory / "models" / "model", arguments.bytes)

        def check(state: Any) -> None:
            assert checkpoints.compare(state, checkpoint.directory) == checkpoint.bytes

        def way(name: str, url: str, pid: int) -> paired.Way:
            return paired.Way(name, lambda: loads(url, options), check=check, server_pid=lambda: pid)

        memory = int(2 * arguments.bytes) + 2**28
        server = stack.enter_context(WeightServer(max_memory=memory))
        rdmaload.save(checkpoint.directory, server.url("model"))
        own = way("rdmaload serve", server.url("model"), server.process.pid)
        found: dict[str, Any] = {}
        others = []
        if "servers" in arguments.only:
            for executable in ("redis-server", "valkey-server"):
                if shutil.which(executable) is None:
                    continue
                other = stack.enter_context(RedisServer(executable=executable))
                rdmaload.save(checkpoint.directory, other.url("model"))
                others.append(way(executable, other.url("model"), other.pid))
        if arguments.export:
            cache = directory / "cache"
            exporting = stack.enter_context(
                WeightServer(models=directory / "models", cache=cache, args=["--wait-checksums"])
            )
            others.append(way("rdmaload serve --models", exporting.url("model"), exporting.process.pid))
        limits = []
        if "limit" in arguments.only:
            program = limit_program(directory)
            ceiling = Ceiling(directory, server, "model")
            setting = Setting(arguments.connections)
            total = sum(length for _, length in ceiling.chunks)
            limits = [
                paired.Way(
                    f"raw loopback, {how}",
                    functools.partial(limit, program, total, ceiling.chunks[0][1], arguments.connections, how),
                )
                for how in ("send", "sendfile", "splice-huge")
            ]
            receiver = paired.Way(
                "rdmaload serve, receiver",
                functools.partial(ceiling.run, setting, arguments.connection_bytes),
                check=lambda _: ceiling.check(directory, checkpoint.weight_files, setting, arguments.connection_bytes),
                server_pid=lambda: server.process.pid,
            )
            found["receiver"] = paired.compare(
                receiver, limits, checkpoint.bytes, arguments.pairs, cold_memory=arguments.cold_memory
            )
        found["result"] = paired.compare(
            own, [*others, *limits], checkpoint.bytes, arguments.pairs, cold_memory=arguments.cold_memory
        )
        if arguments.tls:
            found["tls"] = _under_tls(stack, directory, checkpoint, memory, way, arguments)
        paired.report("server", {"settings": options, **found}, arguments.json)


def _under_tls(
    stack: contextlib.ExitStack, directory: Path, checkpoint: Any, memory: int, way: Any, arguments: argparse.Namespace
) -> dict[str, object]:
    import rdmaload
    from tests.support.certificates import Authority

    authority = Authority(directory)
    server = stack.enter_context(WeightServer(max_memory=memory, tls=authority))
    other = stack.enter_context(RedisServer(tls=authority))
    for url in (server.url("model"), other.url("model")):
        rdmaload.save(checkpoint.directory, url)
    own = way("rdmaload serve, TLS", server.url("model"), server.process.pid)
    others = [way("redis-server, TLS", other.url("model"), other.pid)]
    return paired.compare(own, others, checkpoint.bytes, arguments.pairs, cold_memory=arguments.cold_memory)


if __name__ == "__main__":
    main()

"""rdmaload.load from our weight server against the same load from redis-server (and valkey-server, where there is one).

Same checkpoint, same chunks, same client and options; the servers' CPU time stands beside. Our server also runs with
a directory that it exports. Target: at least as fast as the better of the others, at half its server CPU per GB.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, paired
from tests.support.servers import RedisServer
from tests.support.weight_server import WeightServer


def loads(url: str, options: dict[str, Any]) -> object:
    import rdmaload

    return rdmaload.load(url, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    paired.add_arguments(parser)
    parser.add_argument("--connections", type=int, default=2)
    parser.add_argument("--bytes-in-flight", type=int, default=4 << 20)
    parser.add_argument("--export", action="store_true", help="measure an exported directory, too")
    arguments = parser.parse_args()
    import rdmaload

    paired.import_everything()
    options = {"connections": arguments.connections, "bytes_in_flight": arguments.bytes_in_flight}
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
        others = []
        for executable in ("redis-server", "valkey-server"):
            if shutil.which(executable) is None:
                continue
            other = stack.enter_context(RedisServer(executable=executable))
            rdmaload.save(checkpoint.directory, other.url("model"))
            others.append(way(executable, other.url("model"), other.pid))
        if arguments.export:
            exporting = stack.enter_context(WeightServer(models=directory / "models", cache=directory / "cache"))
            others.append(way("rdmaload serve --models", exporting.url("model"), exporting.process.pid))
        result = paired.compare(own, others, checkpoint.bytes, arguments.pairs, cold_memory=arguments.cold_memory)
        paired.report("server", {"settings": options, "result": result}, arguments.json)


if __name__ == "__main__":
    main()

"""rdmaload.load from Redis over loopback TCP against a loader written as SGLang's connector is.

Each has a redis-server of its own, so that neither scans the other's keys. With and without
hiredis. Target: 10 times.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, paired, sglang_way
from tests.support.servers import RedisServer


def ours(url: str) -> object:
    import rdmaload

    return rdmaload.load(url)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    paired.add_arguments(parser)
    parser.add_argument("--hiredis", choices=["on", "off", "both"], default="both")
    parser.add_argument("--only-others", action="store_true", help="measure the alternatives alone")
    arguments = parser.parse_args()
    import redis  # noqa: F401  (imported here, so that no run pays for it)
    import safetensors.torch  # noqa: F401

    with (
        tempfile.TemporaryDirectory(dir=arguments.dir) as directory,
        paired.congestion(arguments),
        RedisServer() as our_server,
        RedisServer() as their_server,
    ):
        checkpoint = checkpoints.llama_like(Path(directory) / "model", arguments.bytes)

        def check(state: Any) -> None:
            assert checkpoints.compare(state, checkpoint.directory) == checkpoint.bytes

        def theirs(hiredis: bool) -> object:
            with sglang_way.connect(their_server.host, their_server.port, hiredis=hiredis) as client:
                return sglang_way.load(client, "model")

        with their_server.client() as client:
            sglang_way.store(client, "model", checkpoint.directory)
        others = [
            paired.Way(
                f"SGLang's way, {'hiredis' if hiredis else 'Python parser'}",
                lambda hiredis=hiredis: theirs(hiredis),  # type: ignore[misc]
                check=check,
                server_pid=lambda: their_server.pid,
            )
            for hiredis in (True, False)
            if arguments.hiredis in ("both", "on" if hiredis else "off")
        ]
        if arguments.only_others:
            own, others = others[0], others[1:]
        else:
            import rdmaload

            paired.import_everything()
            url = our_server.url("model")
            rdmaload.save(checkpoint.directory, url)
            own = paired.Way("rdmaload", lambda: ours(url), check=check, server_pid=lambda: our_server.pid)
        result = paired.compare(own, others, checkpoint.bytes, arguments.pairs, cold_memory=arguments.cold_memory)
        paired.report("redis_vs_sglang_way", {"result": result}, arguments.json)


if __name__ == "__main__":
    main()

"""Chunk size, connections, bytes in flight and congestion control of a load from Redis, swept once.

Every combination is run `--rounds` times, in rounds over all of them in random order, so that a
slow minute of the machine falls on all alike. The raw ceiling (redis_ceiling.cpp) runs beside each,
right after it. Prints a table, best first.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, machine, paired
from benchmarks.redis_ceiling import Ceiling, Setting
from tests.support.servers import RedisServer

CHUNK_BYTES = [2**18 - 1024, 2**19 - 2048, 2**20 - 4096, 2**22 - 16384]
CONNECTIONS = [1, 2, 4]
BYTES_IN_FLIGHT = [1 << 20, 2 << 20, 4 << 20, 16 << 20]


def load(url: str, options: dict[str, Any]) -> object:
    import rdmaload

    return rdmaload.load(url, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=float, default=5e8, help="size of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk-bytes", type=int, nargs="+", default=CHUNK_BYTES)
    parser.add_argument("--connections", type=int, nargs="+", default=CONNECTIONS)
    parser.add_argument("--bytes-in-flight", type=int, nargs="+", default=BYTES_IN_FLIGHT)
    parser.add_argument("--congestion-controls", nargs="+", default=["cubic", "reno", "bbr"])
    parser.add_argument("--no-ceiling", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dir", type=Path)
    arguments = parser.parse_args()
    import rdmaload

    paired.import_everything()
    usable = []
    for name in arguments.congestion_controls:
        with machine.server_congestion_control(name) as in_force:
            usable += [name] if in_force else []
    usable = usable or [machine.congestion_control() or "unknown"]
    settings = list(itertools.product(arguments.chunk_bytes, arguments.connections, arguments.bytes_in_flight, usable))
    ours: dict[Any, paired.Series] = {setting: paired.Series() for setting in settings}
    ceilings: dict[Any, paired.Series] = {setting: paired.Series() for setting in settings}
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name, RedisServer() as server:
        directory = Path(name)
        checkpoint = checkpoints.llama_like(directory / "model", arguments.bytes)
        memory_bytes = int(checkpoint.bytes * paired.MEMORY_FACTOR)
        programs: dict[int, Ceiling] = {}
        for chunk_bytes in arguments.chunk_bytes:
            model = f"chunks-of-{chunk_bytes}"
            rdmaload.save(checkpoint.directory, server.url(model), chunk_bytes=chunk_bytes)
            (directory / model).mkdir()
            programs[chunk_bytes] = Ceiling(directory / model, server, model)
        for _ in range(arguments.rounds):
            for setting in random.sample(settings, len(settings)):
                chunk_bytes, connections, in_flight, congestion_control = setting
                url = server.url(f"chunks-of-{chunk_bytes}")
                options = {"connections": connections, "bytes_in_flight": in_flight}
                own = paired.Way(
                    "rdmaload",
                    lambda url=url, options=options: load(url, options),  # type: ignore[misc]
                    server_pid=lambda: server.pid,
                )
                program = programs[chunk_bytes]
                ceiling = paired.Way(
                    "ceiling",
                    lambda program=program, connections=connections, in_flight=in_flight: program.run(  # type: ignore[misc]
                        Setting(connections), in_flight // connections
                    ),
                    server_pid=lambda: server.pid,
                )
                with machine.server_congestion_control(congestion_control):
                    ours[setting].trials.append(paired.measure(own, memory_bytes))
                    if not arguments.no_ceiling:
                        ceilings[setting].trials.append(paired.measure(ceiling, memory_bytes))

    rows = []
    for setting in settings:
        names = ("chunk_bytes", "connections", "bytes_in_flight", "congestion_control")
        row: dict[str, Any] = dict(zip(names, setting, strict=True))
        row["rdmaload"] = ours[setting].summary(checkpoint.bytes)
        if not arguments.no_ceiling:
            row["ceiling"] = ceilings[setting].summary(checkpoint.bytes)
        rows.append(row)
    rows.sort(key=lambda row: -row["rdmaload"]["gb_per_s"]["median"])
    paired.report("sweep_redis", {"bytes": checkpoint.bytes, "settings": rows}, arguments.json)
    heading = [
        "chunk KiB",
        "connections",
        "MiB in flight",
        "congestion",
        "GB/s",
        "CPU s/GB",
        "server",
        "ceiling",
    ]
    cells: list[list[object]] = [list(heading)]
    for row in rows:
        own_speed = row["rdmaload"]
        cells.append(
            [
                f"{row['chunk_bytes'] / 1024:g}",
                row["connections"],
                row["bytes_in_flight"] / 2**20,
                row["congestion_control"],
                own_speed["gb_per_s"]["median"],
                own_speed["cpu_s_per_gb"]["median"],
                own_speed["server_cpu_s_per_gb"]["median"],
                row["ceiling"]["gb_per_s"]["median"] if "ceiling" in row else "-",
            ]
        )
    paired.say(paired.table(cells))


if __name__ == "__main__":
    main()

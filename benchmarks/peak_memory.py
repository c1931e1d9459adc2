"""Peak host memory of rdmaload.load above its result, from Redis and from a local directory.

A fresh child imports everything, notes what it has resident, resets its high-water mark, loads, and
reads the mark: what is above the baseline and the tensors' bytes is what loading itself took.
Target: under 64 MiB.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import cast

from benchmarks import checkpoints, paired
from tests.support.servers import RedisServer


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def peak_of(url: str) -> dict[str, object]:
    """Load `url` and say what it took. For a child of its own."""
    import rdmaload

    paired.import_everything()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is resident now
    before = resident_bytes()
    state = rdmaload.load(url)
    peak = paired.peak_bytes()
    after = resident_bytes()
    result = sum(tensor.nbytes for tensor in state.values())
    return {
        "baseline_bytes": before,
        "result_bytes": result,
        "peak_above_result_bytes": peak - before - result,
        "left_above_result_bytes": after - before - result,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    paired.add_arguments(parser, pairs=3)
    arguments = parser.parse_args()
    import rdmaload

    result: dict[str, object] = {}
    rows: list[list[object]] = [["source", "peak above result, MiB", "left above result, MiB"]]
    with (
        tempfile.TemporaryDirectory(dir=arguments.dir) as name,
        RedisServer() as server,
    ):
        checkpoint = checkpoints.llama_like(Path(name) / "model", arguments.bytes)
        rdmaload.save(checkpoint.directory, server.url("model"))
        for source, url in (
            ("redis", server.url("model")),
            ("directory", str(checkpoint.directory)),
        ):
            work = functools.partial(peak_of, url)
            runs = [paired.in_child(work) for _ in range(arguments.pairs)]
            worst = max(runs, key=lambda run: cast(int, run["peak_above_result_bytes"]))
            result[source] = {"worst": worst, "runs": runs}
            rows.append(
                [
                    source,
                    cast(int, worst["peak_above_result_bytes"]) / 2**20,
                    cast(int, worst["left_above_result_bytes"]) / 2**20,
                ]
            )
    paired.report("peak_memory", result, arguments.json)
    paired.say(paired.table(rows))


if __name__ == "__main__":
    main()

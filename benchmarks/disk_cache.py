"""What `cache_dir` costs and gains: the first load, which fills it, and the later ones, which read it.

The store is nginx on loopback (benchmarks/s3.py), faster than any that has a network before it: the ratio of filling is
the worst that there is, and a cache gains nothing here but the proof that it reads as fast as local files.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import shutil
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, paired, s3


def local(directory: Path) -> paired.Measured:
    """A load of the same files as local ones, unverified as plain files are."""
    return s3.ours(str(directory), {})


def check_local(directory: Path, _: object) -> None:
    import rdmaload

    checkpoints.compare(rdmaload.load(directory), directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    paired.add_arguments(parser)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that each request waits for its answer")
    parser.add_argument("--only", choices=["warm", "fill"], help="one of the two parts")
    arguments = parser.parse_args()
    paired.import_everything()
    import boto3  # noqa: F401  (no run pays for it)

    with paired.congestion(arguments), s3.prepared(arguments) as (directory, checkpoint, server):
        result: dict[str, Any] = {}

        def way(name: str, model: str, options: dict[str, Any], prepare: Any = None) -> paired.Way:
            url = s3.url_of(server, model)
            return paired.Way(
                name,
                functools.partial(s3.ours, url, options),
                prepare,
                functools.partial(s3.check_ours, url, options, checkpoint),
            )

        warm, fresh = {"cache_dir": str(directory / "warm")}, {"cache_dir": str(directory / "fresh")}

        def empty() -> None:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(fresh["cache_dir"])

        if arguments.only != "fill":
            files = paired.Way(
                "local files",
                functools.partial(local, checkpoint.directory),
                None,
                functools.partial(check_local, checkpoint.directory),
            )
            result["warm"] = paired.compare(
                way("cached", "plain", warm), [files, way("no cache", "plain", {})], checkpoint.bytes, arguments.pairs
            )
        if arguments.only != "warm":
            result["fill"] = paired.compare(
                way("filling", "plain", fresh, empty),
                [way("no cache", "plain", {})],
                checkpoint.bytes,
                arguments.pairs,
            )
        paired.report("disk_cache", {"delay": arguments.delay, **result}, arguments.json)


if __name__ == "__main__":
    main()

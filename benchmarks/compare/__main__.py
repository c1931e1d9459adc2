"""rdmaload beside every other loader that runs here: same bytes, same kind of server, in turns, every byte compared.

    python -m benchmarks.compare --source file --cache cold --region one --json cold.json
    python -m benchmarks.compare --list
    python -m benchmarks.compare.report *.json --plots docs/plots

Each contender is a process of its own, in an environment of its own where it needs one (set up below --peers when
missing); each run is a forked child of it, with fresh memory. What is timed is a whole load: from nothing open to all
tensors there. Regions: `tensors` (1 GB in 150 tensors), `many` (the same in 20,000), `one` (one tensor of 4 GB),
`files` (64 files), `readers` (eight processes at once, half a GB each) and `save`.
Contenders that cannot run are in the result with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import checkpoints, machine, paired, sglang_way
from benchmarks.compare import environments, harness, mooncake_store
from benchmarks.compare.adaptors import Place
from benchmarks.redis_ceiling import chunk_keys
from benchmarks.s3 import Nginx, url_of
from tests.support.servers import RedisServer

REGIONS = ("tensors", "many", "one", "files", "readers", "save")
READERS = 8

# Contenders by what they load from, and the environment of each; None is the project's own.
FILE = {
    "safetensors, cloned": None,
    "safetensors, pread": None,
    "safetensors, mapped and read": None,
    "safetensors, mapped only": None,
    "runai, io_uring buffered": "runai",
    "runai, io_uring direct": "runai",
    "fastsafetensors": "fastsafetensors",
    "tensorizer": "tensorizer",
}
S3 = {"boto3": None, "obstore": None, "s3torchconnector": "s3torchconnector", "runai, S3": "runai"}
REDIS = {
    "SGLang's connector": "sglang",
    "SGLang's connector, hiredis": "sglang",
    "LMCache's Redis client": "lmcache",
}
MOONCAKE = {"Mooncake Store, TCP": "mooncake"}
SOURCES = {"file": FILE, "redis": REDIS, "s3": S3, "mooncake": MOONCAKE}
SAVE: dict[str, dict[str, str | None]] = {
    "file": {"safetensors, save_file": None, "safetensors, save_file and fsync": None},
    "redis": {"SGLang's connector, set": "sglang"},
}
NO_SAVE = {
    "s3": "the store here is nginx, which serves files and takes none",
    "mooncake": "Mooncake Store is a cache, which nobody saves a model to: there is only loading to compare",
}
"""Why a source has no region `save`."""

NOT_HERE = {
    "instanttensor": "0.2.2 loads to CUDA devices alone (its _impl.py refuses any other), and there is no GPU here",
    "safetensors 0.9, prefetch": "0.9 is on no package index that this machine reaches (0.8.0 is the newest)",
    "fastsafetensors with GDS": "needs a GPU; its way through the host takes part",
}


def contenders_of(source: str, region: str, against: Sequence[str] | None = None) -> tuple[str, dict[str, str | None]]:
    """Ours, and the others with the environment of each. Raises Missing where there is nothing to compare."""
    if region == "save" and source not in SAVE:
        raise environments.Missing(NO_SAVE[source])
    others = SAVE[source] if region == "save" else SOURCES[source]
    chosen = {name: where for name, where in others.items() if not against or any(word in name for word in against)}
    if not chosen:
        raise environments.Missing(f"--against names none of {'; '.join(others)}")
    return "rdmaload, save" if region == "save" else "rdmaload", chosen


def nobody(sources: Sequence[str], regions: Sequence[str], against: Sequence[str] | None) -> str:
    """Why there would be nothing to measure at all, or not for a word of --against; else empty."""
    reasons: list[str] = []
    names: list[str] = []
    for region in regions:
        for source in sources:
            try:
                names += contenders_of(source, region)[1]
            except environments.Missing as reason:
                reasons.append(f"--source {source} --region {region}: {reason}")
    for word in against or ():
        if names and not any(word in name for name in names):
            return f"--against {word}: no contender has that in its name; there are {'; '.join(dict.fromkeys(names))}"
    return "" if names else "; ".join(reasons)


def shapes(region: str, total: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a region; bf16."""
    if region == "one":
        return {"large.weight": ("BF16", (total // 2,))}
    count = 20_000 if region == "many" else 150
    rows = max(1, total // count // 128)
    return {f"model.layers.{i // 100}.experts.{i % 100}.weight": ("BF16", (rows, 64)) for i in range(count)}


def default_bytes(region: str) -> int:
    return {"one": 4_000_000_000, "readers": 500_000_000}.get(region, 1_000_000_000)


@dataclass
class Scene:
    """The bytes of a region and the server they are on."""

    place: Place
    pid: int | None = None
    prepare: Callable[[], None] | None = None


_CACHED_FRACTION_ERROR = 0.01
"""Pages of metadata and of what other processes read meanwhile."""


def fill_page_cache(root: Path, cache: str) -> None:
    """Read every file, or evict all of them. Raises Failed where the kernel did not do it, as it cannot on tmpfs."""
    if cache == "cold":
        with contextlib.suppress(OSError):  # where root may not drop everything; what counts is what is left
            machine.drop_from_page_cache(root, everything=os.geteuid() == 0)
    else:
        machine.warm_page_cache(root)
    cached = machine.cached_fraction(root)
    if cached is not None and abs(cached - (cache == "warm")) > _CACHED_FRACTION_ERROR:
        raise harness.Failed(f"{cache}: {cached:.0%} of the files are in the page cache")


@contextlib.contextmanager
def scene(source: str, region: str, cache: str, checkpoint: checkpoints.Checkpoint, root: Path) -> Iterator[Scene]:
    directory = checkpoint.directory
    files = [(f"plain/{path.name}", path.stat().st_size) for path in checkpoint.weight_files]
    if source == "file":
        place = Place(str(directory), url=str(directory), target=str(root / "saved"), extra=str(root / "model.tensors"))

        def prepare() -> None:
            shutil.rmtree(root / "saved", ignore_errors=True)
            fill_page_cache(root, cache)

        yield Scene(place, prepare=prepare)
    elif source == "s3":
        os.chmod(root, 0o755)  # nginx's workers are another user when started as root
        with Nginx(root, {"plain": directory}) as server:
            yield Scene(
                Place(str(directory), url=url_of(server, "plain"), endpoint=server.endpoint, objects=tuple(files)),
                server.pid,
            )
    else:
        import rdmaload

        with RedisServer() as server:
            url = server.url("model")
            if region == "save":
                target = server.url("saved")

                def empty() -> None:
                    with server.client() as client:
                        client.flushall()

                place = Place(str(directory), host=server.host, port=server.port, prefix="model", target=target)
                yield Scene(place, server.pid, empty)
                return
            rdmaload.save(directory, url)
            chunks = tuple(chunk_keys(server, "model"))
            place = Place(str(directory), url, server.host, server.port, prefix="model", objects=chunks)
            yield Scene(place, server.pid)


def measure(
    arguments: argparse.Namespace, source: str, region: str, cache: str, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    about: dict[str, Any] = {"source": source, "region": region, "cache": cache}
    try:
        ours, others = contenders_of(source, region, arguments.against)
    except environments.Missing as reason:
        return {"task": f"{source}, {region}", "against": {}, "missing": {"everyone": str(reason)}, **about}
    total = int(arguments.bytes or default_bytes(region))
    readers = READERS if region == "readers" else 1
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.dir)))
        checkpoint = checkpoints.make_checkpoint(
            root / "plain", shapes(region, total), files={"files": 64, "one": 1}.get(region, 4)
        )
        found = stack.enter_context(scene(source, region, cache, checkpoint, root))
        own = harness.Contender(ours, Path(sys.executable), found.place, found.pid)
        task = harness.Task(f"{source}, {region}, {cache}", checkpoint.bytes * readers, readers, found.prepare)
        contenders = []
        for name, environment in others.items():
            try:
                python = environments.python_of(environment, arguments.peers)
                contender = replace(own, name=name, python=python)
                if name.startswith("SGLang") and region != "save":  # a server of its own: it scans all keys
                    contender = stack.enter_context(sglang_server(contender, checkpoint, region))
                elif name.startswith("Mooncake"):
                    contender = stack.enter_context(mooncake_store.serving(contender))
                elif name == "tensorizer":
                    prepare_tensorizer(python, found.place)
                contenders.append(contender)
            except environments.Missing as reason:
                missing[name] = str(reason)
        about["missing"] = missing
        result = harness.compare(
            own, contenders, task, arguments.pairs, arguments.seconds, lambda so_far: keep({**so_far, **about})
        )
        itself = functools.partial(harness.compare_with_itself, pairs=arguments.pairs, seconds=arguments.seconds)
        if region == "readers":
            alone = replace(task, name=f"{task.name}, one alone", bytes=checkpoint.bytes, readers=1)
            result["one_reader"] = itself((own, task), (own, alone))
        elif region == "many":  # the same bytes in few tensors
            other = root / "few"
            other.mkdir()
            made = checkpoints.make_checkpoint(other / "plain", shapes("tensors", total), files=4)
            few = stack.enter_context(scene(source, "tensors", cache, made, other))
            contender = replace(own, place=few.place, server=few.pid)
            fewer = harness.Task(f"{source}, 150 tensors", made.bytes, prepare=few.prepare)
            result["few_tensors"] = itself((own, task), (contender, fewer))
    return {**result, **about}


@contextlib.contextmanager
def sglang_server(
    contender: harness.Contender, checkpoint: checkpoints.Checkpoint, region: str
) -> Iterator[harness.Contender]:
    if region == "one":
        raise environments.Missing("it keeps a tensor in one value, and a value has at most 512 MB")
    with RedisServer() as server:
        with server.client() as client:
            sglang_way.store(client, "model", checkpoint.directory)
        place = replace(contender.place, host=server.host, port=server.port)
        yield replace(contender, place=place, server=server.pid)


def prepare_tensorizer(python: Path, place: Place) -> None:
    """Its own format, written by itself."""
    code = "import sys; from benchmarks.compare.adaptors import prepare_tensorizer as p; p(*sys.argv[1:])"
    command = [str(python), "-c", code, place.directory, place.extra]
    environment = {**os.environ, "PYTHONPATH": str(environments.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise environments.Missing(f"tensorizer could not write the model: {done.stderr.strip().splitlines()[-1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", nargs="+", choices=[*SOURCES], default=["file", "redis", "s3"])
    parser.add_argument("--region", nargs="+", choices=REGIONS, default=["tensors"])
    parser.add_argument("--cache", nargs="+", choices=["warm", "cold"], default=["warm"], help="page cache, of files")
    parser.add_argument("--against", nargs="*", help="only contenders whose name contains one of these")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no more pairs after so long with one")
    parser.add_argument("--bytes", type=float, help="of the model; default: the region's")
    parser.add_argument("--peers", type=Path, default=environments.ROOT / ".venv" / "peers")
    parser.add_argument("--dir", type=Path, help="directory for temporary files")
    parser.add_argument("--json", type=Path, help="write the result here, not to stdout")
    parser.add_argument("--list", action="store_true", help="only name the contenders, and who cannot run and why")
    parser.add_argument("--set-up", action="store_true", help="only make the environments")
    arguments = parser.parse_args()
    if arguments.set_up:
        for name in environments.ENVIRONMENTS:
            with contextlib.suppress(environments.Missing):
                paired.say(str(environments.python_of(name, arguments.peers)))
        return
    if arguments.list:
        for source in SOURCES:
            print(f"{source}: {'; '.join([*SOURCES[source], *SAVE.get(source, ())])}")
        for name, reason in NOT_HERE.items():
            print(f"not {name}: {reason}")
        return
    if refused := nobody(arguments.source, arguments.region, arguments.against):
        parser.error(refused)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no directory {arguments.json.parent}")
    if "mooncake" in arguments.source:
        mooncake_store.enter_namespace()
    results: list[dict[str, Any]] = []

    def keep(so_far: dict[str, Any] | None = None) -> None:
        report = {
            "benchmark": "compare",
            "machine": machine.facts(),
            "congestion_control": machine.congestion_control(),
            "versions": environments.versions(),
            "not_here": NOT_HERE,
            "results": results if so_far is None else [*results, so_far],
        }
        text = json.dumps(report, indent=1) + "\n"
        if arguments.json is not None:
            arguments.json.write_text(text)
        elif so_far is None:
            sys.stdout.write(text)

    for region in arguments.region:
        for source in arguments.source:
            for cache in arguments.cache if source == "file" else ["warm"]:
                results.append(measure(arguments, source, region, cache, keep))
    keep()


def _end(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)  # unlike the signal's own way it takes temporary files and servers along


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    main()

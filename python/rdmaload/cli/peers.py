"""Other loaders, for `bench --against`: each reads the same files once in a fresh process, in turns with ours.

This file is both sides: `compare_peers` starts `python -m rdmaload.cli.peers`, which gets its job as JSON on stdin (a
url may hold a password, and arguments are seen by everybody) and answers with seconds and bytes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdmaload.cli.rates import Figure

if TYPE_CHECKING:
    from rdmaload.index import IndexFile
    from rdmaload.model import Model
    from rdmaload.options import Options
    from rdmaload.urls import Url

__all__ = ["PEERS", "Contest", "compare_peers"]

_TIMEOUT_SECONDS = 600.0  # for one load of a sample in one process
_OURS = "rdmaload"

_Job = Mapping[str, Any]


@dataclass(frozen=True)
class Peer:
    """A loader, the module and the package that it comes in, and the stores that it reads here."""

    module: str
    package: str
    schemes: tuple[str, ...]
    load: Callable[[_Job], int]
    """Read the job's files into memory of their own; the bytes of it."""


@dataclass(frozen=True)
class Contest:
    """What each loader did, ours first, and why others did nothing."""

    nbytes: int
    files: int
    figures: Sequence[Figure]
    left_out: Mapping[str, str]

    def lines(self) -> list[tuple[str, str, str]]:
        """Name, rate, and how much faster than it we are."""
        ours = self.figures[0].median
        rows = [(f"  {one.name}", one.text(), one.note) for one in self.figures[:1]]
        rows += [
            (f"  {one.name}", one.text(), f"{one.note}; rdmaload {ours / one.median:.2f} times as fast")
            for one in self.figures[1:]
        ]
        return rows + [(f"  {name}", "left out", reason) for name, reason in self.left_out.items()]

    def to_json(self) -> list[dict[str, object]]:
        ours = self.figures[0].median
        found: list[dict[str, object]] = [{**one.to_json(), "ratio": ours / one.median} for one in self.figures]
        return found + [{"name": name, "left_out": reason} for name, reason in self.left_out.items()]


def compare_peers(
    names: Sequence[str],
    location: Url,
    model: Model,
    opts: Mapping[str, object],
    *,
    rank: int | None,
    device: str,
    nbytes: int,
    repeat: int,
) -> Contest:
    """Time rdmaload and the peers, `repeat` times each, in turns, on whole weight files of about `nbytes`."""
    specs = model.rank_tensors(rank)
    files: list[IndexFile] = []
    for file in model.files:
        if file.header is None or file.rank not in (None, rank or 0):
            continue
        if files and sum(one.size for one in files) + file.size > nbytes:
            break
        files.append(file)
    chosen = {file.path for file in files}
    job: dict[str, object] = {
        "url": _spelled(location),
        "scheme": location.scheme,
        "files": [file.path for file in files],
        "opts": {name: str(value) for name, value in opts.items()},
        "names": [name for name, spec in specs.items() if spec.file in chosen],
        "rank": rank,
        "device": device,
        "keys": _chunk_keys(model, files),
    }
    left_out: dict[str, str] = {}
    samples: dict[str, list[float]] = {_OURS: []}
    for name in names:
        reason = _why_not(name, location, model)
        if reason:
            left_out[name] = reason
        else:
            samples[name] = []
    read: dict[str, int] = {}
    for turn in range(repeat):
        order = list(samples)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:  # nobody always comes after the same
            if name in left_out:
                continue
            try:
                answer = _run(name, job)
            except RuntimeError as error:
                if name == _OURS:
                    raise
                left_out[name] = str(error)
                continue
            if not answer["bytes"]:
                left_out[name] = "it read nothing"
                continue
            samples[name].append(answer["bytes"] / answer["seconds"])
            read[name] = answer["bytes"]
    figures = [
        Figure(name, tuple(found), _version(name)) for name, found in samples.items() if found and name not in left_out
    ]
    return Contest(read[_OURS], len(files), figures, left_out)


def _spelled(location: Url) -> str:
    """The url as text, with its secrets: it goes to our own child alone."""
    return location.path if location.scheme == "file" else location.text


def _chunk_keys(model: Model, files: Sequence[IndexFile]) -> list[str]:
    from rdmaload.index import chunk_key

    if model.store_layout != "rdmaload" or model.generation is None or model.chunk_bytes is None:
        return []
    name = model._connector.location.model
    return [
        chunk_key(name, model.generation, file.number, chunk)
        for file in files
        for chunk in range(-(-file.size // model.chunk_bytes))
    ]


def _why_not(name: str, location: Url, model: Model) -> str:
    peer = PEERS[name]
    if location.scheme not in peer.schemes:
        return f"does not read {location.scheme}:// (it reads {', '.join(peer.schemes)})"
    if name == "redis-py" and model.store_layout != "rdmaload":
        return "compared for models in format 1 only"
    needed = {peer.module: peer.package}
    if name == "runai" and location.scheme == "s3":
        needed["runai_model_streamer_s3"] = "runai-model-streamer-s3"
    packages = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    return f"not installed: pip install {' '.join(packages)}" if packages else ""


def _version(name: str) -> str:
    package = PEERS[name].package if name in PEERS else _OURS
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


def _run(name: str, job: _Job) -> dict[str, Any]:
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "rdmaload.cli.peers", name],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took longer than {_TIMEOUT_SECONDS:g} s") from None
    answer = done.stdout.strip().rpartition("\n")[2]
    if done.returncode or not answer.startswith("{"):
        raise RuntimeError(_last_error(done.stderr)[:300] or f"it ended with code {done.returncode}")
    found: dict[str, Any] = json.loads(answer)
    return found


def _last_error(said: str) -> str:
    """The line that names the last exception, whose text may go on for many lines; else the last line."""
    lines = said.strip().splitlines()
    named = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Timeout|Exit)\b", line)]
    return (named or lines or [""])[-1]


# ---- the other side: one load in a process of its own ------------------------------------------


def _rdmaload(job: _Job) -> int:
    import glob

    import rdmaload

    names = [glob.escape(name) for name in job["names"]]
    with rdmaload.open(job["url"], **job["opts"]) as model:
        return _total(model.load(rank=job["rank"], device=job["device"], include=names))


def _total(state: Mapping[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def _paths(job: _Job) -> list[str]:
    place = job["url"] if job["scheme"] == "file" else job["url"].partition("?")[0]
    return [f"{place.rstrip('/')}/{file}" for file in job["files"]]


def _safetensors(job: _Job) -> int:
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    for path in _paths(job):
        # On the CPU its tensors are views of the mapped file: a clone is the first to read them.
        loaded = load_file(path, device=job["device"])
        state.update({name: one.clone() for name, one in loaded.items()} if job["device"] == "cpu" else loaded)
    return _total(state)


def _runai(job: _Job) -> int:
    from runai_model_streamer import SafetensorsStreamer

    if "bucket" in job:
        os.environ.update(_runai_environment(job["bucket"]))
    state: dict[str, Any] = {}
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(_paths(job))
        for name, tensor in streamer.get_tensors():
            # Its memory is used again for the next one.
            state[name] = tensor.clone() if job["device"] == "cpu" else tensor.to(job["device"])
    return _total(state)


def _runai_environment(bucket: _Bucket) -> dict[str, str]:
    """What its native library reads from there alone."""
    options, keys = bucket.options, bucket.credentials
    wanted = {
        "AWS_REGION": bucket.region,
        "AWS_ENDPOINT_URL": options.endpoint_url,
        "AWS_ACCESS_KEY_ID": keys and keys.access_key,
        "AWS_SECRET_ACCESS_KEY": keys and keys.secret_key,
        "AWS_SESSION_TOKEN": keys and keys.token,
        "AWS_CA_BUNDLE": options.ca_file,
        "RUNAI_STREAMER_S3_UNSIGNED": "1" if keys is None else None,
        # What boto3 chooses by itself: the path for a store of one's own, the host for Amazon's.
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0"
        if options.addressing_style == "path" or (options.addressing_style == "auto" and options.endpoint_url)
        else None,
    }
    return {name: value for name, value in wanted.items() if value}


def _fastsafetensors(job: _Job) -> int:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), job["device"], nogds=job["device"] == "cpu")
    loader.add_filenames({0: _paths(job)})
    buffers = loader.copy_files_to_device()
    # Not closed: the tensors are views of these buffers, which hold every byte.
    return _total({name: buffers.get_tensor(name) for name in buffers.key_to_rank_lidx})


@dataclass(frozen=True)
class _Bucket:
    """Where objects are and who asks for them, as ours finds it: for clients that each want it said in their way."""

    name: str
    prefix: str
    options: Options
    credentials: Any
    """botocore's, read; None to ask without."""
    region: str

    def key(self, file: str) -> str:
        return f"{self.prefix}/{file}" if self.prefix else file


def _bucket(job: _Job) -> _Bucket:
    """Looked up before the clock starts: an environment's credentials may take a while to find."""
    import boto3

    from rdmaload.connectors import connector_for

    with connector_for(job["url"], **job["opts"]) as ours:
        url, options = ours.location, ours.options
        password = options.read_password(url=ours.url)
    session = boto3.Session(
        aws_access_key_id=options.username,
        aws_secret_access_key=password,
        profile_name=options.profile,
        region_name=options.region,
    )
    found = None if options.unsigned else session.get_credentials()
    frozen = None if found is None else found.get_frozen_credentials()
    return _Bucket(url.host or "", url.model, options, frozen, session.region_name or "us-east-1")


def _boto3(job: _Job) -> int:
    import io

    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    bucket: _Bucket = job["bucket"]
    options, keys = bucket.options, bucket.credentials
    client = boto3.client(
        "s3",
        endpoint_url=options.endpoint_url,
        region_name=bucket.region,
        aws_access_key_id=keys and keys.access_key,
        aws_secret_access_key=keys and keys.secret_key,
        aws_session_token=keys and keys.token,
        verify=(options.ca_file or None) if options.verify_tls else False,
        config=Config(
            signature_version=UNSIGNED if keys is None else "s3v4", s3={"addressing_style": options.addressing_style}
        ),
    )
    kept = []
    for file in job["files"]:
        kept.append(io.BytesIO())
        client.download_fileobj(bucket.name, bucket.key(file), kept[-1])
    return sum(one.getbuffer().nbytes for one in kept)


def _obstore(job: _Job) -> int:
    from obstore.store import S3Store

    bucket: _Bucket = job["bucket"]
    options, keys = bucket.options, bucket.credentials
    ca_file = options.ca_file or os.environ.get("AWS_CA_BUNDLE")
    given = {
        "endpoint": options.endpoint_url,
        "access_key_id": keys and keys.access_key,
        "secret_access_key": keys and keys.secret_key,
        "session_token": keys and keys.token,
    }
    https = {"root_certificate": Path(ca_file).read_bytes()} if ca_file and options.verify_tls else {}
    store = S3Store(
        bucket.name,
        region=bucket.region,
        skip_signature=keys is None,
        client_options={"allow_http": True, "allow_invalid_certificates": not options.verify_tls, **https},
        **{name: value for name, value in given.items() if value},
    )
    kept = [store.get(bucket.key(file)).bytes() for file in job["files"]]
    return sum(len(one) for one in kept)


def _redis_py(job: _Job) -> int:
    import redis

    from rdmaload.connectors import connector_for

    with connector_for(job["url"], **job["opts"]) as ours:
        url, options = ours.location, ours.options
        password = options.read_password(url=ours.url)
    client = redis.Redis(
        url.host or "localhost", url.port or 6379, db=options.db, username=options.username, password=password
    )
    kept = [client.get(key) for key in job["keys"]]
    return sum(len(one or b"") for one in kept)


PEERS = {
    "safetensors": Peer("safetensors", "safetensors", ("file",), _safetensors),
    "runai": Peer("runai_model_streamer", "runai-model-streamer", ("file", "s3"), _runai),
    "fastsafetensors": Peer("fastsafetensors", "fastsafetensors", ("file",), _fastsafetensors),
    "boto3": Peer("boto3", "boto3", ("s3",), _boto3),
    "obstore": Peer("obstore", "obstore", ("s3",), _obstore),
    "redis-py": Peer("redis", "redis", ("redis", "valkey"), _redis_py),
}


def _main() -> None:
    job = json.load(sys.stdin)
    load = _rdmaload if sys.argv[1] == _OURS else PEERS[sys.argv[1]].load
    import torch

    if sys.argv[1] == _OURS:
        from rdmaload import loading
        from rdmaload.connectors.registry import connector_class

        assert loading.open is not None
        connector_class(job["scheme"])
    else:
        importlib.import_module(PEERS[sys.argv[1]].module)
    if job["scheme"] == "s3":
        job["bucket"] = _bucket(job)  # imports botocore, too, which is on nobody's clock then, ours included
    cuda = job["device"].startswith("cuda")
    if cuda:
        torch.zeros(1, device=job["device"])  # making a context takes seconds that are no loader's
    begin = time.perf_counter()
    nbytes = load(job)
    if cuda:
        torch.cuda.synchronize()
    print(json.dumps({"seconds": time.perf_counter() - begin, "bytes": nbytes}))


if __name__ == "__main__":
    _main()

"""rdmaload.load from an object store against other S3 clients, and against a C++ program that only receives.

The store is nginx on loopback, which answers ranges faster than any of the clients asks, with a canned listing in the
form of S3. rdmaload loads a model without checksums (as another tool uploaded it) and, beside it, one that it saved
itself, whose every chunk it verifies. Targets: ahead of the best client in speed and in CPU per GB (goal: twice), and
at least 0.9 of the ceiling.

With `--delay 0.02` the server answers each request 20 ms late: nginx asks another server first, which waits, so that
the bytes themselves take no detour. `--our-range-bytes 1e6 ...` compares range sizes of rdmaload. `curl`, which can
only discard what it gets, writes no memory and is a ceiling of another kind.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, paired

SOURCE = Path(__file__).with_name("s3_ceiling.cpp")
PEER = Path(__file__).with_name("s3_peer.py")
DELAY = Path(__file__).with_name("slow_answers.py")
PACKAGES = ["boto3", "awscrt", "obstore", "s3torchconnector", "runai-model-streamer", "runai-model-streamer-s3"]
CLIENTS = ["boto3", "crt", "obstore", "s3torchconnector", "runai"]

_CONFIG = """
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
worker_processes 2;
events {{ worker_connections 256; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
  sendfile_max_chunk {sendfile_max_chunk};
  keepalive_requests 1000000;
  default_type application/octet-stream;
  client_body_temp_path {directory}/tmp;
  proxy_temp_path {directory}/tmp; fastcgi_temp_path {directory}/tmp; uwsgi_temp_path {directory}/tmp;
  scgi_temp_path {directory}/tmp;
  upstream slow {{ server 127.0.0.1:{delay_port}; keepalive 256; }}
  server {{
    listen 127.0.0.1:{port} reuseport;
    root {directory}/root;
    {delay}
    location = /slow {{
      internal;
      auth_request off;
      proxy_pass http://slow;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_pass_request_headers off;
    }}
    location ~ ^/bucket/?$ {{
      types {{ }}
      default_type application/xml;
      try_files /list-$arg_prefix.xml =404;
    }}
  }}
}}
"""


def file_etag(path: Path) -> str:
    """The ETag that nginx gives to a file."""
    status = path.stat()
    return f'"{int(status.st_mtime):x}-{status.st_size:x}"'


class Nginx:
    """nginx with the files of some directories as objects `bucket/NAME/...` and a listing of each."""

    def __init__(self, directory: Path, models: dict[str, Path], delay: float = 0.0) -> None:
        self.directory = directory
        (directory / "root" / "bucket").mkdir(parents=True)
        (directory / "tmp").mkdir()
        for name, model in models.items():
            os.symlink(model, directory / "root" / "bucket" / name)
            entries = "".join(
                f"<Contents><Key>{name}/{path.name}</Key><Size>{path.stat().st_size}</Size>"
                f"<ETag>{file_etag(path).replace(chr(34), '&quot;')}</ETag></Contents>"
                for path in sorted(model.iterdir())
                if path.is_file()
            )
            listing = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
            # The prefix comes percent-encoded, and nginx takes it as it came.
            (directory / "root" / f"list-{name}%2F.xml").write_text(listing)
        with socket.create_server(("127.0.0.1", 0)) as held:
            self.port = int(held.getsockname()[1])
        self.endpoint = f"http://127.0.0.1:{self.port}"
        config = directory / "nginx.conf"
        self._slow: subprocess.Popen[str] | None = None
        delay_port = 9
        if delay:
            self._slow = subprocess.Popen([sys.executable, DELAY, str(delay)], stdout=subprocess.PIPE, text=True)
            assert self._slow.stdout is not None
            delay_port = int(self._slow.stdout.readline())
        config.write_text(
            _CONFIG.format(
                directory=directory,
                port=self.port,
                sendfile_max_chunk="2m",
                delay_port=delay_port,
                delay="auth_request /slow;" if delay else "",
            )
        )
        program = shutil.which("nginx") or "/usr/sbin/nginx"
        self._process = subprocess.Popen([program, "-c", str(config), "-e", str(directory / "error.log")])

    def wait(self) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.01)
        raise RuntimeError((self.directory / "error.log").read_text())

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Nginx:
        self.wait()
        return self

    def __exit__(self, *exception: object) -> None:
        for process in (self._process, self._slow):
            if process is not None:
                process.terminate()
                process.wait()


def url_of(server: Nginx, model: str) -> str:
    return f"s3://bucket/{model}?endpoint_url={server.endpoint}&addressing_style=path&unsigned=true&region=us-east-1"


def measured(command: Sequence[object], objects: str) -> paired.Measured:
    done = subprocess.run([str(word) for word in command], input=objects, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip()[-2000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return paired.Measured(answer["seconds"], answer["cpu_seconds"])


def compare_dump(dump: Path, files: Sequence[Path]) -> None:
    with open(dump, "rb") as received:
        for path in files:
            if received.read(path.stat().st_size) != path.read_bytes():
                raise checkpoints.Mismatch(f"other bytes were received than {path.name}")
    dump.unlink()


def install_peers(directory: Path) -> Path:
    """An environment of their own for the other clients; torch comes from this one. The path of its python."""
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        site = next((directory / "lib").glob("python*")) / "site-packages"
        import torch

        (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*install, *PACKAGES], check=True)
    return python


def save_with_manifest(checkpoint: Path, target: Path) -> None:
    """The checkpoint as rdmaload saves it, with the ETags that nginx will give to its files."""
    from rdmaload._core import crc32c
    from rdmaload.connectors.local import LocalConnector
    from rdmaload.file_manifest import FILE_MANIFEST, file_index_path
    from rdmaload.index import Index, IndexFile, index_of_files
    from rdmaload.manifest import Manifest
    from rdmaload.object_save import DEFAULT_OBJECT_CHUNK_BYTES
    from rdmaload.urls import parse_url

    target.mkdir()
    for path in checkpoint.iterdir():
        os.link(path, target / path.name)
    with LocalConnector(parse_url(str(target))) as connector:
        found = index_of_files(connector)
    files, crcs = [], []
    for file in found.files:
        path = target / file.path
        files.append(IndexFile(file.path, file.size, file.number, file.rank, file.header, etag=file_etag(path)))
        with open(path, "rb") as source:
            while block := source.read(DEFAULT_OBJECT_CHUNK_BYTES):
                crcs.append(crc32c(block).to_bytes(4, "little"))
    value = Index.of(files, chunk_bytes=DEFAULT_OBJECT_CHUNK_BYTES, crcs=b"".join(crcs)).encode()
    manifest = Manifest.of(
        value, generation="0" * 32, files=len(files), bytes=found.total_bytes, writer="rdmaload benchmark"
    )
    for name, content in ((file_index_path("0" * 32), value), (FILE_MANIFEST, manifest.encode())):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)


@contextlib.contextmanager
def prepared(arguments: argparse.Namespace) -> Iterator[tuple[Path, checkpoints.Checkpoint, Nginx]]:
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        directory = Path(name)
        os.chmod(directory, 0o755)  # nginx's workers are another user when started as root
        checkpoint = checkpoints.llama_like(directory / "plain", arguments.bytes)
        save_with_manifest(checkpoint.directory, directory / "saved")
        models = {"plain": checkpoint.directory, "saved": directory / "saved"}
        with Nginx(directory, models, arguments.delay) as server:
            yield directory, checkpoint, server


def ours(url: str, options: dict[str, Any], range_bytes: int | None = None) -> paired.Measured:
    """A load of a model that is open already, as the clients of the others are made already."""
    import rdmaload
    from rdmaload import reader

    if range_bytes is not None:  # no option: what a sweep found best is right for every store
        reader._READ_BYTES = range_bytes
    with rdmaload.open(url, **options) as model:
        cpu, start = cpu_seconds(), time.perf_counter()
        state = model.load()
        found = paired.Measured(time.perf_counter() - start, cpu_seconds() - cpu)
        del state
    return found


def curl(server: Nginx, files: Sequence[Path], connections: int, range_bytes: int) -> paired.Measured:
    """curl's parallel transfers of ranges, to nowhere."""
    lines = []
    for path in files:
        size = path.stat().st_size
        for at in range(0, size, range_bytes):
            lines.append(
                f'url = "{server.endpoint}/bucket/plain/{path.name}"\noutput = /dev/null\n'
                f"range = {at}-{min(size, at + range_bytes) - 1}\nfail"
            )
    command = ["curl", "-s", "-Z", "--parallel-max", str(connections), "-K", "-"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, input="\nnext\n".join(lines), text=True, check=True, stderr=subprocess.DEVNULL)
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return paired.Measured(seconds, cpu)


def check_ours(url: str, options: dict[str, Any], checkpoint: checkpoints.Checkpoint, _: object) -> None:
    import rdmaload

    assert checkpoints.compare(rdmaload.load(url, **options), checkpoint.directory) == checkpoint.bytes


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def seconds_to_open(url: str) -> float:
    """The median of a few, boto3's modules being imported: making its client is most of it."""
    import rdmaload

    found = []
    for _ in range(5):
        start = time.perf_counter()
        rdmaload.open(url).close()
        found.append(time.perf_counter() - start)
    return sorted(found)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    paired.add_arguments(parser)
    parser.add_argument("--connections", type=int, nargs="+", default=[2, 4], help="of the ceiling")
    parser.add_argument("--our-connections", type=int, help="default: rdmaload's")
    parser.add_argument("--our-range-bytes", type=float, nargs="+", default=[], help="compared with rdmaload's own")
    parser.add_argument("--compare-connections", type=int, nargs="+", default=[], help="of rdmaload, with its own")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that each request waits for its answer")
    parser.add_argument("--range-bytes", type=int, default=8 << 20, help="of the ceiling")
    parser.add_argument("--against", nargs="*", help=f"ceiling, curl, {', '.join(CLIENTS)}; default: all")
    parser.add_argument("--peers", type=Path, help="directory of the other clients' environment, made when missing")
    arguments = parser.parse_args()
    wanted = set(["ceiling", "curl", *CLIENTS] if arguments.against is None else arguments.against)
    python = None
    if wanted - {"ceiling", "curl"}:
        python = install_peers(arguments.peers or Path(tempfile.gettempdir()) / "rdmaload-s3-peers")
    paired.import_everything()
    import boto3  # noqa: F401  (no run pays for it)

    with paired.congestion(arguments), prepared(arguments) as (directory, checkpoint, server):
        files = sorted(checkpoint.weight_files)
        program, listed = directory / "s3_ceiling", directory / "objects"
        subprocess.run(["g++", "-O2", "-std=c++20", "-pthread", str(SOURCE), "-o", str(program)], check=True)
        listed.write_text("".join(f"/bucket/plain/{path.name} {path.stat().st_size}\n" for path in files))
        objects = "".join(f"plain/{path.name} {path.stat().st_size}\n" for path in files)
        dump = directory / "dump"

        def check_command(command: list[object], _: object) -> None:
            measured([*command, dump], objects)
            compare_dump(dump, files)

        options = {} if arguments.our_connections is None else {"connections": arguments.our_connections}
        own, verified = (
            paired.Way(
                name,
                functools.partial(ours, url_of(server, model), options),
                check=functools.partial(check_ours, url_of(server, model), options, checkpoint),
            )
            for name, model in (("rdmaload", "plain"), ("rdmaload, verified", "saved"))
        )
        ceilings = []
        for connections in arguments.connections if "ceiling" in wanted else ():
            command = [program, "127.0.0.1", server.port, listed, connections, arguments.range_bytes]
            run = functools.partial(measured, command, objects)
            name = f"ceiling, {connections} connections"
            ceilings.append(paired.Way(name, run, check=functools.partial(check_command, command)))
        peers = []
        for name in CLIENTS:
            if name not in wanted:
                continue
            command = [python, PEER, name, server.endpoint, "bucket"]
            run = functools.partial(measured, command, objects)
            peers.append(
                paired.Way(name, run, check=None if name == "runai" else functools.partial(check_command, command))
            )
        if "curl" in wanted:
            for connections in arguments.connections:
                run = functools.partial(curl, server, files, connections, arguments.range_bytes)
                ceilings.append(paired.Way(f"curl, {connections} at once, discarded", run))
        for size in map(int, arguments.our_range_bytes):
            run = functools.partial(ours, url_of(server, "plain"), options, size)
            peers.append(paired.Way(f"rdmaload, {size} B", run))
        for count in arguments.compare_connections:
            run = functools.partial(ours, url_of(server, "plain"), {"connections": count})
            peers.append(paired.Way(f"rdmaload, {count} connections", run))
        result = {
            "plain": paired.compare(
                own, [*ceilings, *peers], checkpoint.bytes, arguments.pairs, cold_memory=arguments.cold_memory
            )
        }
        if "ceiling" in wanted:
            result["verified"] = paired.compare(
                verified, ceilings, checkpoint.bytes, arguments.pairs, cold_memory=arguments.cold_memory
            )
        opening = {model: round(seconds_to_open(url_of(server, model)), 4) for model in ("plain", "saved")}
        paired.report(
            "s3", {"settings": options, "delay": arguments.delay, "seconds_to_open": opening, **result}, arguments.json
        )


if __name__ == "__main__":
    main()

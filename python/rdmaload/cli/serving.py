"""serve and ping: run the weight server, and wait until a store answers."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import queue
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rdmaload.amounts import count_text, seconds_text, size_text
from rdmaload.cli.arguments import Commands, add_command, add_url, options_of, seconds, size, whole_number
from rdmaload.cli.exits import UsageError
from rdmaload.cli.output import write_error, write_result
from rdmaload.cli.progress import progress_bar

if TYPE_CHECKING:
    from types import FrameType

    from rdmaload._core import WeightServer, WeightStore
    from rdmaload.exports import DirectoryExport

__all__ = ["register"]

_PORT = 6380
_LOOK_SECONDS = 0.25  # how soon a signal is noticed
_RETRY_SECONDS = 0.1  # between two pings
_MEMORY_SHARE = 0.8  # of what machine and control group leave: connections and the page cache need some, too
_MAX_THREADS = 4  # more do not pay before a fast network; --threads says otherwise

_ENVIRONMENT = (
    "XDG_CACHE_HOME is where checksums of exported files are kept (default ~/.cache). COLUMNS is the width of this "
    "text. Nothing else is read."
)


def register(commands: Commands) -> None:
    """Add the commands of this module."""
    serve = add_command(
        commands,
        "serve",
        _serve,
        help="run a weight server that any Redis client can use",
        description="Run a server that keeps models in memory: every client of Redis can save to it and load "
        "from it, and with --models it also gives out checkpoint directories without a save. It holds what was "
        "saved until it ends; nothing is written to disk. It listens on this machine only, unless --host says "
        "otherwise, and then it wants a password or TLS. With --rdma-bind it also speaks Valkey over RDMA, on the "
        "address of a card, without TLS. SIGTERM and SIGINT end it cleanly.",
        prints="The url once it answers, and a line per exported model; with --json one document with url, host, "
        "port, max_memory, threads, rdma_url (null without --rdma-bind), metrics_url (null without --metrics-port) and "
        "models (model, files, bytes, generation, "
        "cached_bytes, checksums).",
        exits={
            0: "it was told to end, by a signal or by SHUTDOWN",
            6: "it cannot listen on that address",
            8: "--rdma-bind, and this machine has no RDMA",
        },
        examples=[
            "rdmaload serve",
            "rdmaload serve --models /models --max-memory 64GiB",
            "rdmaload serve --host 0.0.0.0 --password-file /run/secrets/store",
            "rdmaload serve --metrics-port 9380",
            "rdmaload serve --host 0.0.0.0 --tls-cert both.pem --password-file pw",
            "rdmaload serve --host 0.0.0.0 --rdma-bind 10.0.0.5 --password-file pw",
        ],
        environment=_ENVIRONMENT,
    )
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1)")
    serve.add_argument("--port", type=whole_number, default=_PORT, help=f"the port, 0 for a free one ({_PORT})")
    serve.add_argument(
        "--max-memory",
        type=size,
        metavar="SIZE",
        help="refuse what does not fit into this; 80%% of what machine and control group leave, unless given",
    )
    serve.add_argument("--password-file", metavar="FILE", help="clients must give the password that FILE holds")
    serve.add_argument(
        "--tls-cert", metavar="FILE", help="speak TLS only, with the certificate (PEM, with its chain) in FILE"
    )
    serve.add_argument("--tls-key", metavar="FILE", help="its key (PEM); in the certificate's file unless given")
    serve.add_argument(
        "--tls-client-ca", metavar="FILE", help="clients must show a certificate that one in FILE (PEM) has signed"
    )
    serve.add_argument("--threads", type=whole_number, metavar="N", help="threads that serve (up to 4, by the CPUs)")
    serve.add_argument(
        "--models", type=Path, metavar="DIR", help="give out each sub-directory of DIR with safetensors as a model"
    )
    serve.add_argument(
        "--wait-checksums",
        action="store_true",
        help="answer nobody before the checksums of --models are computed; otherwise clients that come earlier "
        "cannot verify what they load, and count it as unverified",
    )
    serve.add_argument(
        "--insecure",
        action="store_true",
        help="allow other machines without a password and without TLS: anybody can read and write",
    )
    serve.add_argument(
        "--max-connections", type=whole_number, default=10_000, metavar="N", help="refuse more clients (10000)"
    )
    serve.add_argument(
        "--rdma-bind",
        metavar="IP",
        help="listen on the address of an RDMA card, too: clients with rdma:// urls get the bytes written straight "
        "into their memory, from memory that is locked and registered with the card. They read manifests over TCP, so "
        "give --host, too",
    )
    serve.add_argument(
        "--rdma-port", type=whole_number, metavar="PORT", help="the port over RDMA (the same as over TCP)"
    )
    serve.add_argument(
        "--max-rdma-connections",
        type=whole_number,
        default=1024,
        metavar="N",
        help="refuse more clients over RDMA (1024): each takes 0.5 MiB of locked memory, 2.5 with exported models",
    )
    serve.add_argument(
        "--metrics-port",
        type=whole_number,
        metavar="PORT",
        help="show counters for Prometheus at http://HOST:PORT/metrics, 0 for a free port: numbers only, to everybody "
        "who reaches --host, without a password",
    )
    ping = add_command(
        commands,
        "ping",
        _ping,
        help="say whether a store answers, or wait until it does",
        description="Ask a store for a sign of life. With --wait it is asked again until it answers or the time "
        "has passed: for scripts that start a server.",
        prints="The url and how long the answer took; with --json url and seconds.",
        exits={0: "it answers", 6: "it does not answer (in time)"},
        examples=["rdmaload ping redis://127.0.0.1:6380", "rdmaload ping redis://127.0.0.1:6380 --wait 30s"],
    )
    add_url(ping, help="a store (redis://10.0.0.5:6379), or a model in it")
    ping.add_argument("--wait", type=seconds, default=0.0, metavar="TIME", help="keep asking for so long: 30, 30s, 5m")


# ---- serve -------------------------------------------------------------------------------------


def _serve(args: argparse.Namespace) -> int:
    from rdmaload import __version__, _core
    from rdmaload.cli.metrics_page import metrics_page, server_text
    from rdmaload.exports import BackgroundChecksums
    from rdmaload.host_memory import available_bytes
    from rdmaload.index import PENDING
    from rdmaload.options import Options

    if args.option_texts:
        raise UsageError("serve takes no -o: its settings are its own arguments (see `rdmaload serve --help`)")
    for name in ("threads", "max_connections", "max_rdma_connections"):
        if getattr(args, name) == 0:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    password = Options(password_file=args.password_file).read_password() if args.password_file else None
    tls = _tls(args)
    if not _only_this_machine(args.host) and not args.insecure:
        if password is None and tls is None:
            raise UsageError(
                f"--host {args.host} lets other machines read and write models: give --password-file, --tls-cert (best "
                "with --tls-client-ca or a password), or --insecure if everybody in that network may"
            )
        if password is None and not args.tls_client_ca:
            write_error(
                f"--host {args.host} with --tls-cert alone: nobody can listen in, but everybody who reaches the server "
                "can read and write models; --password-file or --tls-client-ca says who may"
            )
    if password is None and not args.insecure and args.rdma_bind is not None:
        raise UsageError(
            f"--rdma-bind {args.rdma_bind} lets other machines read and write models: give --password-file, or "
            "--insecure if everybody in that network may"
        )
    if args.rdma_bind is None and args.rdma_port is not None:
        raise UsageError("--rdma-port needs --rdma-bind with the address of an RDMA card")
    limit = args.max_memory or int(available_bytes() * _MEMORY_SHARE)
    threads = args.threads or min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    store = _core.WeightStore(limit)
    exported = _export(args, store, threads) if args.models is not None else []
    exports = [one.description for one in exported if one.description is not None]
    server = _core.WeightServer(
        store,
        host=args.host,
        port=args.port,
        password=password,
        threads=threads,
        max_connections=args.max_connections,
        version=__version__,
        tls=tls,
        rdma_host=args.rdma_bind,
        rdma_port=args.rdma_port,
        rdma_max_connections=args.max_rdma_connections,
    )
    url = f"{'redis' if tls is None else 'rediss'}://{_bracketed(args.host)}:{server.port}"
    rdma_url = f"rdma://{_bracketed(args.rdma_bind)}:{server.rdma_port}" if args.rdma_bind is not None else None
    document = {
        "url": url,
        "host": args.host,
        "port": server.port,
        "max_memory": limit,
        "threads": threads,
        "rdma_url": rdma_url,
        "models": [vars(export) for export in exports],
    }
    where = url if rdma_url is None else f"{url} and {rdma_url}"
    lines = [f"serving {where} with room for {size_text(limit)}"]
    lines += [
        f"  {url}/{one.model}: {count_text(one.files, 'file')}, {size_text(one.bytes)}"
        + ", checksums are being computed" * (one.checksums == PENDING)
        for one in exports
    ]
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    try:
        with contextlib.ExitStack() as stack:
            metrics_url = None
            if args.metrics_port is not None:
                page = metrics_page(args.host, args.metrics_port, lambda: server_text(server.counters))
                port = stack.enter_context(page)
                metrics_url = f"http://{_bracketed(args.host)}:{port}/metrics"
                lines.append(f"  counters for Prometheus: {metrics_url}")
            document["metrics_url"] = metrics_url
            stopped = stack.enter_context(_stop_signals())
            stack.enter_context(BackgroundChecksums(exported, _checksum_threads(threads), said.put))
            write_result(args.json, document, lines)
            sys.stdout.flush()
            _until_told(server, stopped, said)
    finally:
        server.close()
    return 0


def _tls(args: argparse.Namespace) -> tuple[str, str, str] | None:
    for name in ("tls_key", "tls_client_ca"):
        if getattr(args, name) and not args.tls_cert:
            raise UsageError(f"--{name.replace('_', '-')} means nothing without --tls-cert")
    return (args.tls_cert, args.tls_key or "", args.tls_client_ca or "") if args.tls_cert else None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _only_this_machine(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host or None, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as err:
        raise UsageError(f"--host {host}: no such address") from err
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def _export(args: argparse.Namespace, store: WeightStore, threads: int) -> list[DirectoryExport]:
    from rdmaload.export_checksums import cache_directory
    from rdmaload.exports import export_directories, model_directories

    models = model_directories(args.models)
    with progress_bar(args, "checksums") as progress:
        exports = export_directories(
            store,
            models,
            cache=cache_directory(),
            threads=threads,
            wait_checksums=args.wait_checksums,
            progress=progress,
        )
        return list(exports)


def _checksum_threads(threads: int) -> int:
    """How many compute checksums beside `threads` that serve: clients go first."""
    return max(1, threads // 2)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM fill a list instead of ending the process."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _until_told(server: WeightServer, stopped: list[int], said: queue.SimpleQueue[str]) -> None:
    while not stopped and not server.wait(_LOOK_SECONDS):
        lines = server.take_log()
        while not said.empty():
            lines.append(said.get())
        for line in lines:
            write_error(line)


# ---- ping --------------------------------------------------------------------------------------


def _ping(args: argparse.Namespace) -> int:
    from rdmaload.errors import LoadTimeoutError, UnavailableError
    from rdmaload.urls import parse_url

    location = parse_url(args.url, require_model=False)
    opts = options_of(args)
    deadline = time.monotonic() + args.wait
    while True:
        try:
            took = _answer_seconds(args.url, opts)
            break
        except (LoadTimeoutError, UnavailableError):
            if time.monotonic() + _RETRY_SECONDS > deadline:
                raise
        time.sleep(_RETRY_SECONDS)
    document = {"url": location.redacted, "seconds": took}
    write_result(args.json, document, [f"{location.redacted} answers in {seconds_text(took)}"])
    return 0


def _answer_seconds(url: str, opts: dict[str, object]) -> float:
    import logging

    from rdmaload.connectors import FileConnector, KeyValueConnector, connector_for
    from rdmaload.urls import parse_url

    log = logging.getLogger("rdmaload")
    quiet = log.getEffectiveLevel()
    # A server that is not there yet is what ping is for: no warning for each attempt.
    log.setLevel(max(quiet, logging.ERROR))
    try:
        # One attempt: ping decides itself how long to go on.
        with connector_for(parse_url(url, require_model=False), **{"retry_timeout": 0.001, **opts}) as connector:  # type: ignore[arg-type]
            started = time.perf_counter()
            if isinstance(connector, KeyValueConnector):
                connector.exists(f"{connector.model or 'rdmaload:ping'}/ping")  # always absent
            elif isinstance(connector, FileConnector):
                connector.list_files()
            return time.perf_counter() - started
    finally:
        log.setLevel(quiet)

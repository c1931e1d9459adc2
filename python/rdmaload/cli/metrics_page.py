"""The weight server's counters for Prometheus, on a port of their own: no second program has to be run.

Numbers alone, of this server: no names, no keys, and nothing can be written. One thread, and one per client that asks.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rdmaload.metrics import CONTENT_TYPE, Family, render

__all__ = ["metrics_page", "server_text"]

_PATIENCE_SECONDS = 10.0  # with a client that says nothing: it holds a thread

_HELP = {
    "connections_accepted": "Connections over TCP.",
    "connections_refused": "Connections over --max-connections.",
    "connections_now": "Connections over TCP that are open.",
    "connections_stalled": "Connections closed because nothing was taken from them.",
    "commands": "Commands.",
    "errors": "Commands that were answered with an error.",
    "hits": "Reads of keys that are there.",
    "misses": "Reads of keys that are not.",
    "bytes_received": "Bytes received over TCP.",
    "bytes_sent": "Bytes sent over TCP.",
    "bytes_by_reference": "Bytes sent over TCP that nobody copied for it.",
    "refused_for_memory": "Writes that did not fit into --max-memory.",
    "auth_failures": "Wrong passwords.",
    "auth_refused": "Passwords not looked at because others were wrong before.",
    "tls_failures": "Connections that did not come to TLS.",
    "files_failed": "Reads of exported files that failed.",
    "rdma_connections_now": "Connections over RDMA that are open.",
    "rdma_reads": "Reads over RDMA.",
    "rdma_work_requests": "RDMA writes for them.",
    "rdma_direct_bytes": "Bytes written over RDMA from where they are stored.",
    "rdma_copied_bytes": "Bytes written over RDMA that were copied first.",
    "registered_bytes": "Memory registered with RDMA cards.",
    "keys": "Keys, those of exported models among them.",
    "values": "Keys whose value is in memory.",
    "used_bytes": "Memory that values take.",
    "held_bytes": "Memory taken from the system for values.",
    "limit_bytes": "The most that is taken for them.",
}
_GAUGES = {
    "connections_now",
    "rdma_connections_now",
    "registered_bytes",
    "keys",
    "values",
    "used_bytes",
    "held_bytes",
    "limit_bytes",
}


def server_text(counters: Mapping[str, object]) -> str:
    """The counters of a WeightServer in Prometheus' text format."""

    def family(name: str) -> Family:
        full = f"rdmaload_server_{name}" + ("" if name in _GAUGES else "_total")
        return Family(full, "gauge" if name in _GAUGES else "counter", _HELP.get(name, name))

    families = [(family(name), float(str(value))) for name, value in counters.items()]
    return render((one, [((one.name, ()), value)]) for one, value in families)


@contextlib.contextmanager
def metrics_page(host: str, port: int, text: Callable[[], str]) -> Iterator[int]:
    """Serve `text()` at /metrics; gives the port. Raises OSError where it cannot listen."""

    class Page(BaseHTTPRequestHandler):
        timeout = _PATIENCE_SECONDS

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, "the counters are at /metrics")
                return
            body = text().encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Not a line per scrape."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True

    with Server((host, port), Page) as server:
        thread = threading.Thread(target=server.serve_forever, name="rdmaload-metrics", daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()

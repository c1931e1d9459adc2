"""Our own weight server as users run it, seen by tests as `RedisServer` is: a process, on a free port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

import rdmaload

if TYPE_CHECKING:
    import redis

    from tests.support.certificates import Authority, Issued

__all__ = ["WeightServer"]

READY_SECONDS = 60.0  # only an overloaded machine needs so long
PACKAGE = Path(rdmaload.__file__).parents[1]


class WeightServer:
    """Runs `rdmaload serve --port 0` on 127.0.0.1; with `tls`, as RedisServer does, it speaks TLS only.

    with WeightServer(max_memory=2**30) as server:
        rdmaload.save(directory, server.url("llama"))
    """

    host = "127.0.0.1"

    def __init__(
        self,
        *,
        max_memory: int = 2**30,
        password_file: Path | None = None,
        password: str | None = None,
        threads: int = 2,
        models: Path | None = None,
        cache: Path | None = None,
        tls: Authority | None = None,
        certificate: Issued | None = None,
        tls_clients: bool = False,
        args: Iterable[str] = (),
        rdma: str | None = None,
        wrapper: Iterable[str] = (),
    ) -> None:
        """`rdma`: the address of an RDMA card, to listen on instead of loopback; `wrapper`: what runs the server."""
        self.host = rdma or "127.0.0.1"
        self.password = password
        self.tls = tls
        self.client_certificate = tls.issue(names=("client",)) if tls is not None and tls_clients else None
        command = [*wrapper, sys.executable, "-m", "rdmaload", "serve", "--port", "0", "--json"]
        command += ["--max-memory", str(max_memory), "--threads", str(threads), *args]
        if password_file is not None:
            command += ["--password-file", str(password_file)]
        if tls is not None:
            issued = certificate or tls.issue()
            command += ["--tls-cert", str(issued.cert_file), "--tls-key", str(issued.key_file)]
            command += ["--tls-client-ca", str(tls.ca_file)] if tls_clients else []
        if rdma is not None:
            command += ["--host", rdma, "--rdma-bind", rdma, *([] if password_file is not None else ["--insecure"])]
        if models is not None:
            command += ["--models", str(models)]
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
        if cache is not None:
            environment["XDG_CACHE_HOME"] = str(cache)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by stop()
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )
        # A server that never gets ready is ended, which ends the wait for its document.
        watchdog = threading.Timer(READY_SECONDS, self.process.kill)
        watchdog.start()
        try:
            self.document = self._read_document()
        except BaseException:
            self.stop()
            raise
        finally:
            watchdog.cancel()
            watchdog.join()
        self.port = int(self.document["port"])

    def _read_document(self) -> dict[str, object]:
        lines = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            lines += line
            if line == "}\n":
                break
        document: dict[str, object] = json.loads(lines or "{}")
        if "port" not in document:
            raise RuntimeError(f"rdmaload serve did not start: {document} {self.errors()}")
        return document

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def errors(self) -> str:
        """What it has written to stderr so far."""
        self._errors.seek(0)
        return self._errors.read()

    def url(self, model: str, **query: object) -> str:
        """The url of `model` in this server, with the password and the options of `query`."""
        secret = f":{quote(self.password, safe='')}@" if self.password is not None else ""
        if self.tls is not None:
            query = {"ca_file": self.tls.ca_file, **query}
            if self.client_certificate is not None:
                files = self.client_certificate
                query = {"client_cert_file": files.cert_file, "client_key_file": files.key_file, **query}
        scheme = "redis" if self.tls is None else "rediss"
        text = f"{scheme}://{secret}{self.host}:{self.port}/{quote(model)}"
        return text + (f"?{urlencode(query)}" if query else "")

    def rdma_url(self, model: str, **query: object) -> str:
        """As url(), over RDMA alone."""
        secret = f":{quote(self.password, safe='')}@" if self.password is not None else ""
        options = urlencode({"fallback": "never", **query})
        return f"{str(self.document['rdma_url']).replace('//', '//' + secret)}/{quote(model)}?{options}"

    def client(self, **arguments: object) -> redis.Redis:
        """A new redis-py client that retries nothing; the caller closes it, best by `with`."""
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        given = {"password": self.password, **arguments}
        if self.tls is not None:
            given = {"ssl": True, "ssl_ca_certs": str(self.tls.ca_file), **given}
            if self.client_certificate is not None:
                files = self.client_certificate
                given = {"ssl_certfile": str(files.cert_file), "ssl_keyfile": str(files.key_file), **given}
        return redis.Redis(host=self.host, port=self.port, retry=Retry(NoBackoff(), 0), **given)  # type: ignore[arg-type]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=READY_SECONDS)

    def stop(self) -> None:
        if self.running:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._errors.close()

    def file_descriptors(self) -> set[int]:
        """The descriptors that this object holds in the calling process, for leak checks."""
        assert self.process.stdout is not None
        return {self.process.stdout.fileno(), self._errors.fileno()}

    def __enter__(self) -> WeightServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

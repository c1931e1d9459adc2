"""The system's redis-server, a process in its own directory, for tests, benchmarks, the demo."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

if TYPE_CHECKING:
    import redis

    from tests.support.certificates import Authority, Issued

__all__ = ["RedisServer", "ServerError"]

# A server is ready within milliseconds; only an overloaded machine needs longer.
READY_SECONDS = 20.0


class ServerError(RuntimeError):
    """redis-server is missing or did not start; the message has its log."""


class RedisServer:
    """Runs redis-server on a free port of 127.0.0.1 (or on a unix socket) without persistence.

    With `tls` it speaks TLS only, by a certificate of that authority (or `certificate`); with
    `tls_clients` it wants one of its clients, and `client_certificate` is there to be shown.
    `executable="valkey-server"` runs that.

    The port is held by a socket that never listens, so that nobody else gets it before the server
    starts and while it is down. `users` are ACL rules as in `users.acl` without the word user:
    `"alice on >secret ~* +@all"`.

        with RedisServer(password="secret") as server:
            rdmaload.save(directory, server.url("llama"))
    """

    def __init__(
        self,
        *,
        password: str | None = None,
        users: Iterable[str] = (),
        maxmemory: str | int | None = None,
        maxmemory_policy: str | None = None,
        unix: bool = False,
        tls: Authority | None = None,
        certificate: Issued | None = None,
        tls_clients: bool = False,
        host: str = "127.0.0.1",
        args: Iterable[str] = (),
        executable: str = "redis-server",
    ) -> None:
        found = shutil.which(executable)
        if found is None:
            raise ServerError(f"{executable} not found: apt-get install {Path(executable).name}")
        self.family = "valkey" if "valkey" in executable else "redis"
        self.tls = tls
        self.client_certificate = tls.issue(names=("client",)) if tls is not None and tls_clients else None
        self.host = host
        self.port = 0
        self.password = password
        self.directory = Path(tempfile.mkdtemp(prefix="rdmaload-redis-"))
        self.log = self.directory / "log"
        self.path = self.directory / "redis.sock" if unix else None
        self._process: subprocess.Popen[bytes] | None = None
        self._reservation: socket.socket | None = None
        if unix:
            where = ["--port", "0", "--unixsocket", str(self.path)]
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._reservation = socket.socket(family)
            self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._reservation.bind((host, 0))
            self.port = int(self._reservation.getsockname()[1])
            where = ["--port", str(self.port), "--bind", host]
        if tls is not None:
            issued = certificate or tls.issue()
            where += ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "yes" if tls_clients else "no"]
            where += ["--tls-cert-file", str(issued.cert_file), "--tls-key-file", str(issued.key_file)]
            where += ["--tls-ca-cert-file", str(tls.ca_file)]
        self._command = [found, *where, "--save", "", "--appendonly", "no"]
        self._command += ["--dir", str(self.directory), "--daemonize", "no"]
        if password is not None:
            self._command += ["--requirepass", password]
        if maxmemory is not None:
            self._command += ["--maxmemory", str(maxmemory)]
        if maxmemory_policy is not None:
            self._command += ["--maxmemory-policy", maxmemory_policy]
        for user in users:
            self._command += ["--user", *user.split()]
        self._command += args
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    def start(self) -> None:
        """Start the process and return when it answers; `restart` and the constructor call it."""
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + READY_SECONDS
        while not self._answers():
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline:
                state = "did not answer in time" if code is None else f"exited with {code}"
                raise ServerError(f"redis-server {state}\n{self.log.read_text(errors='replace')}")
            time.sleep(0.002)

    def _answers(self) -> bool:
        family = socket.AF_UNIX if self.path else socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.settimeout(1)
            try:
                probe.connect(str(self.path) if self.path else (self.host, self.port))
                if self.tls is None:
                    return _pings(probe)
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE  # a test's certificate may be bad on purpose
                if self.client_certificate is not None:
                    context.load_cert_chain(self.client_certificate.cert_file, self.client_certificate.key_file)
                with context.wrap_socket(probe) as wrapped:
                    return _pings(wrapped)
            except OSError:
                return False

    @property
    def pid(self) -> int:
        """The process id; an error when the server is down."""
        if self._process is None:
            raise ServerError("redis-server is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def url(self, model: str, **query: object) -> str:
        """The url of `model` in this server, with the password and the options of `query`."""
        secret = f":{quote(self.password, safe='')}@" if self.password is not None else ""
        if self.path is not None:
            return f"{self.family}+unix://{secret}{self.path}?{urlencode({'model': model, **query})}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        scheme = self.family
        if self.tls is not None:
            scheme += "s"
            query = {"ca_file": self.tls.ca_file, **query}
            if self.client_certificate is not None:
                files = self.client_certificate
                query = {"client_cert_file": files.cert_file, "client_key_file": files.key_file, **query}
        text = f"{scheme}://{secret}{host}:{self.port}/{quote(model)}"
        return text + (f"?{urlencode(query)}" if query else "")

    def client(self, *, username: str | None = None, password: str | None = None) -> redis.Redis:
        """A new redis-py client that retries nothing; the caller closes it, best by `with`."""
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        tls: dict[str, object] = {}
        if self.tls is not None:
            tls = {"ssl": True, "ssl_ca_certs": str(self.tls.ca_file), "ssl_cert_reqs": "none"}
            if self.client_certificate is not None:
                tls["ssl_certfile"] = str(self.client_certificate.cert_file)
                tls["ssl_keyfile"] = str(self.client_certificate.key_file)
        return redis.Redis(
            **tls,
            host=self.host,
            port=self.port,
            unix_socket_path=None if self.path is None else str(self.path),
            username=username,
            password=self.password if password is None else password,
            retry=Retry(NoBackoff(), 0),
        )

    def flush(self) -> None:
        """Delete every key of every database."""
        with self.client() as client:
            client.flushall()

    def kill(self) -> None:
        """End the process as a crash does (SIGKILL); everything stored is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Kill the process if it runs, and start an empty one at the same address."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """End the process and remove its directory; may be called again."""
        self.kill()  # nothing is worth a clean shutdown: there is no persistence
        if self._reservation is not None:
            self._reservation.close()
            self._reservation = None
        shutil.rmtree(self.directory, ignore_errors=True)

    def file_descriptors(self) -> set[int]:
        """The descriptors that this object holds in the calling process, for leak checks."""
        return set() if self._reservation is None else {self._reservation.fileno()}

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        where = str(self.path) if self.path else f"{self.host}:{self.port}"
        return f"RedisServer({where}, {'running' if self.running else 'down'})"


def _pings(probe: socket.socket) -> bool:
    probe.sendall(b"PING\r\n")
    return probe.recv(64).startswith((b"+PONG", b"-NOAUTH"))

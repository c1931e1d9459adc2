"""S3 for tests: moto for what S3 answers, and a small server whose answers a test bends for what no S3 should do."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit
from urllib.request import Request as UrlRequest
from urllib.request import urlopen
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from tests.support.certificates import Issued

__all__ = ["Answer", "ConnectProxy", "HttpObjects", "Reply", "Request", "etag_of", "honest_reply", "moto_s3", "s3_url"]


def s3_url(endpoint: str, bucket: str, prefix: str = "", **options: object) -> str:
    """The url of a model in a store at `endpoint`; keys for moto, which takes any."""
    query = urlencode(
        {"endpoint_url": endpoint, "region": "us-east-1", "username": "testing", "password": "secret", **options}
    )
    return f"s3://{bucket}/{prefix}?{query}"


@contextlib.contextmanager
def moto_s3(*buckets: str) -> Iterator[str]:
    """The endpoint of a fresh S3 in this process, with these buckets."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    try:
        with contextlib.closing(boto_client(endpoint)) as client:
            for bucket in buckets:
                client.create_bucket(Bucket=bucket)
        yield endpoint
    finally:
        # Large objects are in files of its own until it is told to forget them.
        with urlopen(UrlRequest(f"{endpoint}/moto-api/reset", method="POST")):
            server.stop()


def boto_client(endpoint: str, *, checksums: bool = True) -> Any:
    """A plain client with keys that moto takes; the caller closes it. Without `checksums` as older tools upload."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="secret",
        config=Config(request_checksum_calculation="when_supported" if checksums else "when_required"),
    )


@dataclass(frozen=True)
class Request:
    """What a client asked."""

    method: str
    target: str
    """Path and query as they were sent."""
    headers: Mapping[str, str]
    """Names in lower case."""
    number: int
    """Counts from 0 over all connections."""
    body: bytes = b""

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.target).query).items()}

    @property
    def range(self) -> tuple[int, int] | None:
        """First and last byte asked for, inclusive."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        return (int(match[1]), int(match[2])) if match else None


@dataclass
class Reply:
    """An answer, and how it is bent on its way."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    """Send only so many bytes of the body, then do `then`."""
    then: str = "go on"
    """"go on", "close", "reset", or "stall": keep the connection and say nothing more."""


Answer = Callable[[Request, Reply], Reply]
"""Takes what an honest store would answer; gives what this one does."""


class HttpObjects:
    """Serves `objects` (by path, such as "/bucket/key") with ranges, ETags, If-Match and S3's listing.

    >>> with HttpObjects({"/b/m/config.json": b"{}"}) as server:
    ...     server.endpoint.startswith("http://127.0.0.1:")
    True
    """

    def __init__(
        self,
        objects: Mapping[str, bytes],
        answer: Answer = lambda request, honest: honest,
        tls: Issued | None = None,
    ) -> None:
        self.objects = dict(objects)
        self.answer = answer
        self.requests: list[Request] = []
        self.failure: BaseException | None = None
        self._mutex = threading.Lock()
        self._clients: set[socket.socket] = set()  # Guarded by _mutex, as is _closed.
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._tls: ssl.SSLContext | None = None
        if tls is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(tls.cert_file, tls.key_file)
        self._acceptor = threading.Thread(target=self._accept, name="http-objects")
        self._acceptor.start()

    def honest(self, request: Request) -> Reply:
        """What a store without faults answers."""
        if request.method in ("GET", "HEAD") and "list-type" in request.query:
            return self._listing(request)
        return honest_reply(request, self.objects.get(request.path))

    def _listing(self, request: Request) -> Reply:
        bucket, prefix = request.path.rstrip("/"), request.query.get("prefix", "")
        found = [path for path in sorted(self.objects) if path.startswith(f"{bucket}/{prefix}")]
        entries = "".join(
            f"<Contents><Key>{escape(path[len(bucket) + 1 :])}</Key><Size>{len(self.objects[path])}</Size>"
            f"<ETag>{escape(etag_of(self.objects[path]))}</ETag></Contents>"
            for path in found
        )
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        return Reply(200, {"Content-Type": "application/xml"}, body.encode())

    def close(self) -> None:
        """Drop every connection and join every thread; raises what `answer` raised, if it did."""
        with self._mutex:
            self._closed = True
            for client in self._clients:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        for thread in self._threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            with self._mutex:
                if self._closed:
                    client.close()
                    return
                self._clients.add(client)
            thread = threading.Thread(target=self._serve, args=(client,), name="http-objects-client")
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            if self._tls is not None:
                client = self._encrypted(client, self._tls)
            with client.makefile("rb") as stream:
                while (request := self._next(stream)) is not None and self._send(client, request):
                    pass
        except OSError:
            pass  # the client is gone, which is its right
        except BaseException as failure:  # kept for close(), where the test sees it
            self.failure = failure
        finally:
            with self._mutex:
                self._clients.discard(client)
                client.close()

    def _encrypted(self, client: socket.socket, tls: ssl.SSLContext) -> socket.socket:
        wrapped = tls.wrap_socket(client, server_side=True)
        with self._mutex:
            self._clients.discard(client)
            self._clients.add(wrapped)
        return wrapped

    def _next(self, stream: Any) -> Request | None:
        line = stream.readline()
        if not line:
            return None
        method, target, _ = line.decode("latin-1").split()
        headers = {}
        while (line := stream.readline().strip()) != b"":
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        body = stream.read(int(headers.get("content-length", 0)))
        with self._mutex:
            request = Request(method, target, headers, len(self.requests), body)
            self.requests.append(request)
        return request

    def _send(self, client: socket.socket, request: Request) -> bool:
        reply = self.answer(request, self.honest(request))
        headers = {"Content-Length": str(len(reply.body)), **reply.headers}
        head = f"HTTP/1.1 {reply.status} Status\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in headers.items()
        )
        body = b"" if request.method == "HEAD" else reply.body
        client.sendall(head.encode("latin-1") + b"\r\n" + (body if reply.cut is None else body[: reply.cut]))
        if reply.then == "stall":
            client.recv(1)  # until the client, or close(), ends it
        elif reply.then == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return reply.then == "go on"

    def __enter__(self) -> HttpObjects:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def honest_reply(request: Request, content: bytes | None) -> Reply:
    """What a store without faults answers about an object; None when there is none."""
    if request.method not in ("GET", "HEAD") or content is None:
        code = b"NoSuchKey" if content is None else b"MethodNotAllowed"
        return Reply(404 if content is None else 405, {}, b"<Error><Code>%b</Code></Error>" % code)
    etag = etag_of(content)
    headers = {"ETag": etag, "Accept-Ranges": "bytes"}
    if request.headers.get("if-match", etag) != etag:
        return Reply(412, {}, b"<Error><Code>PreconditionFailed</Code></Error>")
    if request.range is None:
        return Reply(200, headers, content)
    first, last = request.range
    if first >= len(content):
        return Reply(416, {"Content-Range": f"bytes */{len(content)}"}, b"<Error><Code>InvalidRange</Code></Error>")
    last = min(last, len(content) - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return Reply(206, headers, content[first : last + 1])


def etag_of(content: bytes) -> str:
    """The tag that S3 gives to what was written in one request."""
    return f'"{hashlib.md5(content).hexdigest()}"'


class ConnectProxy:
    """A proxy that carries bytes to a port of this machine, whatever host it is asked for (CONNECT), and nothing else.

    >>> with ConnectProxy("9") as proxy:
    ...     proxy.url.startswith("http://127.0.0.1:")
    True
    """

    def __init__(self, port: str) -> None:
        self.requests: list[tuple[str, str]] = []
        """Request line and Proxy-Authorization of each tunnel."""
        self._target = int(port)
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name="connect-proxy")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            self._sockets.append(client)
            self._start(self._tunnel, client)

    def _tunnel(self, client: socket.socket) -> None:
        head = b""
        with contextlib.suppress(OSError):
            while b"\r\n\r\n" not in head:
                head += client.recv(4096) or b"\r\n\r\n"
            lines = head.decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            self.requests.append((lines[0], headers.get("proxy-authorization", "")))
            server = socket.create_connection(("127.0.0.1", self._target))
            self._sockets.append(server)
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            self._start(_carry, client, server)
            _carry(server, client)

    def __enter__(self) -> ConnectProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for end in list(self._sockets):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join()
        for end in self._sockets:
            end.close()


def _carry(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)

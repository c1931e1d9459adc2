"""Redis and Valkey servers over TCP, TLS or a unix socket, through redis-py, for everything but reading weights.

Weights are read by the native transport; here are manifests, listings, saves and deletes. Values go
to the socket from the caller's memory, one connection per thread that asks at the same time. A
request that failed for want of a connection is sent again until `retry_timeout` has passed.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, TypeVar

import redis
from redis import exceptions as theirs
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.retry import Retry

from rdmaload.connectors.connector import KeyValueConnector
from rdmaload.connectors.tls import (
    check_tls_options,
    failure_passes,
    meaning_of_failure,
    native_context,
    python_context,
)
from rdmaload.errors import (
    AuthenticationError,
    FormatError,
    LoadTimeoutError,
    NotSupportedError,
    RdmaloadError,
    UnavailableError,
    UrlError,
)
from rdmaload.options import Options
from rdmaload.urls import Url

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["RedisConnector"]

_log = logging.getLogger("rdmaload")

_Result = TypeVar("_Result")
_OsError = TypeVar("_OsError", bound=OSError)

_SCAN_COUNT = 1000  # keys that the server looks at per SCAN: bounds how long it is busy with one
_DELETE_BATCH = 1000
_FIRST_PAUSE = 0.02  # seconds before the second attempt: a restarted server is often there by then
_LONGEST_PAUSE = 1.0

_MISSING_TRANSPORTS = {
    "redis+cluster": "the Redis Cluster connector",
    "valkey+cluster": "the Valkey Cluster connector",
    "redis+sentinel": "the Redis Sentinel connector",
    "valkey+sentinel": "the Valkey Sentinel connector",
}


_TLS_SCHEMES = ("rediss", "valkeys")
_LONGEST_SOCKET_PATH = 107  # bytes: sockaddr_un has 108, with the zero at the end


class _Packer:
    """Commands as lists of pieces for the socket, with memoryviews as pieces of their own.

    The serializer that redis-py takes when hiredis is installed copies every value twice.
    """

    def pack(self, *args: object) -> list[bytes | memoryview]:
        words = [
            *str(args[0]).split(),
            *args[1:],
        ]  # redis-py names commands such as "CONFIG GET" in one text
        pieces: list[bytes | memoryview] = []
        head = b"*%d\r\n" % len(words)
        for word in words:
            if isinstance(word, memoryview):
                pieces += [head + b"$%d\r\n" % word.nbytes, word]
                head = b"\r\n"
            else:
                data = word if isinstance(word, bytes) else str(word).encode()
                head += b"$%d\r\n%b\r\n" % (len(data), data)
        return [*pieces, head]


class _Sockets:
    """The sockets of one connector, so that another thread can end what they wait for.

    They are shut down, which wakes whoever is blocked in them, and closed only by the thread that
    uses them: a number closed under its feet could name another file by then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[socket.socket] = weakref.WeakSet()  # Guarded by _lock, as is _ended.
        self._ended = False
        self._process = os.getpid()

    def keep(self, sock: socket.socket) -> None:
        with self._lock:
            ended = self._ended
            if not ended:
                self._open.add(sock)
        if ended:
            sock.close()
            raise theirs.ConnectionError("the connector was closed")

    def end(self) -> None:
        with self._lock:
            self._ended = True
            left = list(self._open)
            self._open.clear()
        if os.getpid() != self._process:
            return  # after a fork they are the parent's, too
        for sock in left:
            try:
                # Not SSLSocket's own: under the feet of another thread it would turn TLS off.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                continue  # closed already


class _Connection(redis.Connection):
    """A connection whose socket `sockets` knows from its first byte on."""

    def __init__(
        self,
        *,
        sockets: _Sockets,
        socket_path: str = "",
        tls: ssl.SSLContext | None = None,
        server_name: str | None = None,
        **arguments: Any,
    ) -> None:
        self._sockets = sockets
        self._socket_path = socket_path
        self._tls = tls
        self._server_name = server_name
        super().__init__(**arguments)  # type: ignore[no-untyped-call]

    def _connect(self) -> socket.socket:
        sock = self._connect_unix() if self._socket_path else super()._connect()  # type: ignore[no-untyped-call]
        try:
            if self._tls is not None:
                sock = self._tls.wrap_socket(
                    sock, server_hostname=self._server_name or self.host, do_handshake_on_connect=False
                )
            self._sockets.keep(sock)
            if isinstance(sock, ssl.SSLSocket):
                sock.settimeout(self.socket_connect_timeout)
                sock.do_handshake()
                sock.settimeout(self.socket_timeout)
        except BaseException:
            sock.close()
            raise
        return sock

    def _connect_unix(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(self.socket_connect_timeout)
            sock.connect(self._socket_path)
            sock.settimeout(self.socket_timeout)
        except BaseException:
            sock.close()
            raise
        return sock

    def _host_error(self) -> str:
        return self._socket_path or super()._host_error()  # type: ignore[no-untyped-call]


class RedisConnector(KeyValueConnector):
    """A model in a Redis or Valkey server: `redis://[user:pass@]host[:6379]/model`.

    `rediss://` is the same over TLS, `redis+unix:///path.sock?model=model` over a unix socket.

    >>> from rdmaload.urls import parse_url
    >>> with RedisConnector(parse_url("redis://127.0.0.1:6379/llama")) as connector:
    ...     connector
    <RedisConnector redis://127.0.0.1:6379/llama open>
    """

    store_options = frozenset({"db"})

    def __init__(self, url: Url, options: Options | None = None) -> None:
        super().__init__(url, options)
        missing = _MISSING_TRANSPORTS.get(url.scheme)
        if missing is not None:
            raise NotSupportedError(
                f"{self.url} needs {missing}, which this release does not have; redis:// and valkey:// (TCP), "
                "rediss:// and valkeys:// (TLS), redis+unix:// and valkey+unix:// work",
                url=self.url,
            )
        tls = url.scheme in _TLS_SCHEMES
        with_tls = "valkeys://" if url.scheme.startswith("valkey") else "rediss://"
        check_tls_options(self.options, url=self.url, tls=tls, write=with_tls)
        length = len(os.fsencode(url.path))
        if length > _LONGEST_SOCKET_PATH:
            raise UrlError(
                f"{self.url}: the socket's path has {length} bytes, and a unix socket's may have "
                f"{_LONGEST_SOCKET_PATH}; connect by a shorter one, such as a symbolic link",
                url=self.url,
            )
        self._socket_path = url.path
        self._tls = python_context(self.options, url=self.url) if tls else None
        self._password = self.options.read_password(url=self.url)
        self._host = url.host or "localhost"
        self._port = self._tcp_port()
        self._reached = False  # Only ever becomes true; a stale read costs one shorter deadline.
        self._pool_lock = threading.Lock()
        self._sockets = _Sockets()
        self._ended = threading.Event()  # Set by close(), for those who wait to try again.
        self._client: Any = self._new_client()  # Any: redis-py declares every result as maybe awaitable.

    @property
    def password(self) -> str | None:
        """The password that the options give, wherever they say it is; never show it."""
        return self._password

    def _tcp_port(self) -> int:
        return self.location.port or 6379

    def _new_client(self) -> redis.Redis:
        options = self.options
        credentials = None
        if self._password is not None or options.username is not None:
            # A provider rather than arguments: those show in redis-py's reprs.
            credentials = redis.UsernamePasswordCredentialProvider(options.username, self._password or "")
        pool = redis.ConnectionPool(
            connection_class=_Connection,
            sockets=self._sockets,
            socket_path=self._socket_path,
            tls=self._tls,
            server_name=options.server_name,
            host=self._host,
            port=self._port,
            db=options.db,
            protocol=options.protocol,
            credential_provider=credentials,
            socket_connect_timeout=options.connect_timeout,
            socket_timeout=options.inactivity_timeout,
            socket_keepalive=True,
            max_connections=10_000,  # callers bound their threads: the client need not refuse
            retry=Retry(NoBackoff(), 0),  # `_call` retries, with a deadline and a record of it
            command_packer=_Packer(),
        )
        return redis.Redis(connection_pool=pool)

    def close(self) -> None:
        """Give connections back. Commands that other threads are waiting for fail soon."""
        super().close()
        self._ended.set()
        self._sockets.end()
        self._client.connection_pool.disconnect(inuse_connections=False)

    def _is_near(self) -> bool:
        # `rdmaload bench` asks more: it looks names up and knows this machine's other addresses, too. Here that
        # could wait for a name server before anything is connected, where only defaults depend on it.
        if self.location.scheme.endswith("+unix") or self._host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self._host).is_loopback
        except ValueError:
            return False  # a name, whose addresses only connecting would tell

    def native_transport(self) -> object | None:
        self._check_open()
        from rdmaload import _core

        options = self.options
        transport: object = _core.RespTransport(
            host=self._host,
            port=self._port,
            username=options.username,
            password=self._password,
            db=options.db,
            protocol=options.protocol,
            connections=self.connections,
            bytes_in_flight=self.bytes_in_flight,
            connect_timeout=options.connect_timeout,
            inactivity_timeout=options.inactivity_timeout,
            name=self.url,
            socket_path=self._socket_path,
            tls=None if self._tls is None else native_context(options, url=self.url),
        )
        return transport

    def get(self, key: str) -> bytes | None:
        value, _ = self._call(key, lambda: self._client.get(key))
        return None if value is None else bytes(value)

    def set(self, key: str, buffer: Buffer, *, if_absent: bool = False) -> bool:
        view = self.check_value(key, buffer)
        stored, attempts = self._call(key, lambda: self._client.set(key, view, nx=if_absent))
        if stored:
            return True
        # An attempt whose answer was lost may have stored the value that now stands in the way.
        return attempts > 1 and self.get(key) == bytes(view)

    def exists(self, key: str) -> bool:
        count, _ = self._call(key, lambda: self._client.exists(key))
        return bool(count)

    def peek(self, keys: Sequence[str], length: int) -> Sequence[tuple[int, bytes]]:
        if not keys:
            return []

        def run() -> Sequence[Any]:
            pipeline = self._client.pipeline(transaction=False)
            for key in keys:
                pipeline.strlen(key)
                pipeline.getrange(key, 0, length - 1)
            answers: Sequence[Any] = pipeline.execute()
            return answers

        answers, _ = self._call(keys[0], run)
        return [(int(size), bytes(head)) for size, head in zip(answers[::2], answers[1::2], strict=True)]

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        value, _ = self._call(key, lambda: self._client.getrange(key, offset, offset + length - 1))
        return bytes(value)

    def value_limit(self) -> int:
        """The server's proto-max-bulk-len; 512 MiB, its default, where we may not ask."""
        text = self.server_settings("proto-max-bulk-len").get("proto-max-bulk-len", "")
        if text.isdecimal():
            self.max_value_bytes = int(text)
        return self.max_value_bytes

    def list(self, prefix: str) -> Iterator[str]:
        self._check_open()
        pattern = re.sub(r"([\\*?\[\]])", r"\\\1", prefix) + "*"
        seen = {b""}  # no key of ours is empty
        cursor = 0
        while True:
            scan = self._scan(pattern, cursor)
            (cursor, keys), _ = self._call(prefix, scan)
            for key in keys:
                if key in seen:  # SCAN may repeat keys while the server resizes its table
                    continue
                seen.add(key)
                try:
                    yield key.decode()
                except UnicodeDecodeError:
                    continue  # not a key of ours
            if cursor == 0:
                return

    def _scan(self, pattern: str, cursor: int) -> Callable[[], tuple[int, Sequence[bytes]]]:
        return lambda: self._client.scan(cursor, match=pattern, count=_SCAN_COUNT, _type="STRING")

    def delete(self, *keys: str) -> int:
        removed = 0
        for start in range(0, len(keys), _DELETE_BATCH):
            batch = keys[start : start + _DELETE_BATCH]
            removed += self._unlink(batch)
        return removed

    def _unlink(self, batch: Sequence[str]) -> int:
        count, _ = self._call(batch[0], lambda: self._client.unlink(*batch))
        return int(count)

    def members_add(self, key: str, member: str) -> None:
        self._call(key, lambda: self._client.sadd(key, member))

    def members_remove(self, key: str, member: str) -> None:
        self._call(key, lambda: self._client.srem(key, member))

    def members(self, key: str) -> AbstractSet[str]:
        names, _ = self._call(key, lambda: self._client.smembers(key))
        return {name.decode(errors="replace") for name in names}

    def publish_warning(self, needed_bytes: int = 0) -> Sequence[str]:
        limit, used, policy = self._memory_settings()
        warnings = []
        if policy not in ("", "noeviction"):
            warnings.append(
                f"{self.url}: the server's maxmemory-policy is {policy}, so it may evict parts of "
                "a model; set it to noeviction (CONFIG SET maxmemory-policy noeviction)"
            )
        if limit and used + needed_bytes > limit:
            warnings.append(
                f"{self.url}: {needed_bytes / 1e9:.2f} GB more do not fit beside the "
                f"{used / 1e9:.2f} GB in use under the server's maxmemory of {limit / 1e9:.2f} GB; "
                "raise it, or `rdmaload prune` old generations"
            )
        return warnings

    def _memory_settings(self) -> tuple[int, int, str]:
        """maxmemory and used memory (bytes, 0 = unlimited or unknown) and the policy."""
        found = self.server_info("memory")
        if "maxmemory" not in found:  # a user who may not run INFO may still read settings
            settings = self.server_settings("maxmemory", "maxmemory-policy")
            found |= {name.replace("-", "_"): value for name, value in settings.items()}
        limit, used = (found.get(name, "") for name in ("maxmemory", "used_memory"))
        return (
            int(limit) if limit.isdecimal() else 0,
            int(used) if used.isdecimal() else 0,
            found.get("maxmemory_policy", ""),
        )

    def server_info(self, section: str | None = None) -> dict[str, str]:
        """The server's INFO, or a section of it, by name; `db0` is a dict's text. Empty where it is refused."""
        try:
            answer, _ = self._call(None, lambda: self._client.info(section))
        except (AuthenticationError, FormatError, UnavailableError) as err:
            _log.debug("%s: INFO: %s", self.url, err)
            return {}
        return {str(name): str(value) for name, value in answer.items()}

    def server_settings(self, *names: str) -> dict[str, str]:
        """Settings by name (CONFIG GET), those that the server has and this user may read."""
        found: dict[str, str] = {}
        for name in names:  # one by one: only new servers take several
            try:
                answer = self._setting(name)
            except (AuthenticationError, FormatError, UnavailableError) as err:
                _log.debug("%s: CONFIG GET: %s", self.url, err)
                break
            for key, value in answer.items():
                found[_as_text(key)] = _as_text(value)
        return found

    def _setting(self, name: str) -> dict[object, object]:
        answer, _ = self._call(None, lambda: self._client.config_get(name))
        return dict(answer)

    def _call(self, key: str | None, command: Callable[[], _Result]) -> tuple[_Result, int]:
        """Run a command, again while connections fail; its result and the number of attempts."""
        self._check_open()
        backoff = ExponentialWithJitterBackoff(cap=_LONGEST_PAUSE, base=_FIRST_PAUSE)
        started = time.monotonic()
        attempts = 0
        while True:
            attempts += 1
            try:
                result = command()
            except (theirs.RedisError, OSError, UnicodeError) as err:
                failure: Exception = err
            else:
                self._reached = True
                return result, attempts
            self._check_open()
            # A server that never answered is more likely a wrong address than one that restarts.
            patience = self.options.retry_timeout
            if not self._reached and not isinstance(failure, theirs.BusyLoadingError):
                patience = min(patience, self.options.connect_timeout)
            pause = backoff.compute(attempts)
            if not _may_pass(failure) or time.monotonic() - started + pause > patience:
                break
            if attempts == 1:
                _log.warning("%s: %s; trying again for %g s", self.url, self._text_of(failure), patience)
            self._count_retries()
            self._ended.wait(pause)
            self._check_open()
        # Raised here, outside of the handler: the failure is attached only where it shows no
        # secret.
        error = self._translated(failure, key, attempts)
        raise error from (failure if self._shows_no_secret(failure) else None)

    def _translated(self, failure: Exception, key: str | None, attempts: int) -> RdmaloadError:
        kind, advice = _meaning(failure)
        if self._socket_path and kind is UnavailableError and _caused_by(failure, OSError):
            advice = "check that the server runs, listens on this unix socket and that we may write to it"
        elif not self._reached and (kind is LoadTimeoutError or _closed_at_once(failure)):
            # A TLS port closes on plain text; a plain port waits for the rest of what it takes for a command.
            advice += "; is this its TLS port?" if self._tls else "; its TLS port needs rediss:// or valkeys://"
        place = f"{key} at {self.url}" if key else self.url
        tries = f" ({attempts} attempts)" if attempts > 1 else ""
        return kind(f"{place}: {self._text_of(failure)}{tries}: {advice}", url=self.url, key=key)

    def _text_of(self, failure: Exception) -> str:
        if self._shows_no_secret(failure):
            return str(failure) or type(failure).__name__
        return f"{type(failure).__name__} (its text is left out, because the password is in it)"

    def _shows_no_secret(self, failure: BaseException | None) -> bool:
        """Whether no error of a chain holds the password: servers quote what they refuse."""
        while failure is not None and self._password:
            if any(self._password in str(argument) for argument in (failure, *failure.args)):
                return False
            failure = failure.__cause__ or failure.__context__
        return True


def _as_text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _may_pass(failure: Exception) -> bool:
    """Whether the same command may succeed a little later on another connection."""
    if isinstance(failure, (theirs.AuthenticationError, theirs.AuthorizationError)):
        return False
    if isinstance(failure, (theirs.BusyLoadingError, theirs.MasterDownError, theirs.TryAgainError)):
        return True
    if not isinstance(failure, (theirs.ConnectionError, theirs.TimeoutError, OSError)):
        return False
    tls = _caused_by(failure, ssl.SSLError)
    if tls is not None and not failure_passes(tls):
        return False
    lookup = _caused_by(failure, socket.gaierror)
    return lookup is None or lookup.errno == socket.EAI_AGAIN


def _closed_at_once(failure: Exception) -> bool:
    if _caused_by(failure, ConnectionResetError) is not None:
        return True
    # Not isinstance: what a server says of logins or while it loads is a subclass, and came over a good connection.
    lost = type(failure) is theirs.ConnectionError and _caused_by(failure, OSError) is None
    return lost and not _is_full(failure)


def _is_full(failure: Exception) -> bool:
    """An error reply, though redis-py has no class of its own for it."""
    return isinstance(failure, theirs.ConnectionError) and "max number of clients" in str(failure)


def _caused_by(failure: BaseException | None, kind: type[_OsError]) -> _OsError | None:
    while failure is not None:
        if isinstance(failure, kind):
            return failure
        failure = failure.__cause__ or failure.__context__
    return None


def _meaning(failure: Exception) -> tuple[type[RdmaloadError], str]:
    """Our class for a failure, and what to do about it. Order matters: redis-py's classes nest."""
    text = str(failure)
    tls = _caused_by(failure, ssl.SSLError)
    if tls is not None:
        return meaning_of_failure(tls)
    if isinstance(failure, theirs.NoPermissionError):
        return (
            AuthenticationError,
            "the user's ACL lacks this command or key; grant it, or give another user",
        )
    if isinstance(
        failure,
        (
            theirs.AuthenticationError,
            theirs.AuthorizationError,
            theirs.AuthenticationWrongNumberOfArgsError,
        ),
    ):
        return (
            AuthenticationError,
            "give the right user and password in the url, or by password_file or password_env",
        )
    if isinstance(failure, theirs.BusyLoadingError):
        return (
            UnavailableError,
            "the server is still loading its data; wait, or raise retry_timeout",
        )
    if isinstance(failure, theirs.OutOfMemoryError):
        return (
            UnavailableError,
            "the server is full; raise its maxmemory, or free some with `rdmaload prune` or `rm`",
        )
    if isinstance(failure, theirs.AskError):  # and MovedError
        return (
            NotSupportedError,
            "the server is part of a cluster, which needs redis+cluster:// (not in this release)",
        )
    if isinstance(failure, theirs.ReadOnlyError):
        return UnavailableError, "the server is a read-only replica; give the url of its primary"
    if isinstance(failure, theirs.ClusterDownError):  # and MasterDownError
        return (
            UnavailableError,
            "the server cannot serve now; look at its replication or cluster state",
        )
    if isinstance(failure, theirs.TimeoutError):
        return (
            LoadTimeoutError,
            "the server did not answer in time; see connect_timeout and inactivity_timeout",
        )
    if isinstance(failure, UnicodeError):
        return UrlError, "this is no name of a host"
    if _is_full(failure):
        return UnavailableError, "the server has as many clients as it takes; raise its maxclients, or end some"
    if isinstance(failure, (theirs.ConnectionError, OSError)):
        return UnavailableError, "check that the server runs and that host and port are right"
    if isinstance(failure, theirs.ResponseError):
        if text.startswith("WRONGTYPE"):
            return FormatError, "the key holds a value of another kind, written by something else"
        if "DB index is out of range" in text or "invalid DB index" in text:
            return UrlError, "the server has no such database; correct db="
        return UnavailableError, "the server refused the command"
    return (
        FormatError,
        "the answer is not RESP; check that host and port are a Redis or Valkey server",
    )

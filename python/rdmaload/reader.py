"""Runs load plans over one opened model: the seam between Python's connectors and the native loader.

A StoreReader owns the model's transport (connections, threads) from the first read to close(). Any thread may use it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdmaload import _core
from rdmaload.connectors.connector import Connector, FileConnector, KeyValueConnector
from rdmaload.connectors.store_digests import FileDigest
from rdmaload.digests import WholeFiles
from rdmaload.disk_cache import cache_entries
from rdmaload.errors import (
    IntegrityError,
    LoadTimeoutError,
    NotFoundError,
    RdmaloadError,
    StaleGenerationError,
    UnavailableError,
)
from rdmaload.index import Index
from rdmaload.manifest import Manifest, manifest_key
from rdmaload.sglang_layout import READ_BYTES, check_unchanged
from rdmaload.stats import LoadStats

if TYPE_CHECKING:
    import torch

    from rdmaload.devices import DeviceRoad
    from rdmaload.timeline import Timeline

__all__ = ["Batch", "StoreReader", "Tick"]

_log = logging.getLogger("rdmaload")

Tick = Callable[[int, AbstractSet[str]], None]
"""Called now and then while reads run: the wanted bytes that have arrived, and the files that are done."""

_TICK_SECONDS = 0.1
_READ_BYTES = 8 * 2**20  # the longest read of a store without chunks
# Twice what is read ahead without a cache: half of it is on its way to the disk, where no connection works on it.
_CACHED_QUEUE_BYTES = 128 * 2**20
# From a Valkey over RDMA the first and last value of each run are copied: long runs need many reads to choose from.
_RDMA_QUEUE_BYTES = 256 * 2**20


@dataclass
class Batch:
    """Reads that run, or have run, into `destinations`."""

    plan: _core.LoadPlan
    destinations: Sequence[_core.HostArena | _core.ImportedTensor | _core.DeviceDestination]
    operation: _core.LoadOperation
    tensors: Sequence[torch.Tensor] = ()
    """On a GPU: those that the destinations are the memory of, one per selected tensor."""
    road: DeviceRoad | None = None
    """The way to the GPU that the destinations are on."""
    whole: WholeFiles | None = None
    """Where the store's own checksums of whole files are compared; of the load that this is a part of."""

    @property
    def arenas(self) -> Sequence[_core.HostArena]:
        """The destinations of a plan into arenas."""
        return [arena for arena in self.destinations if isinstance(arena, _core.HostArena)]


class StoreReader:
    """Plans and executes reads of the files of `index`; `generation` is None but for a model in format 1."""

    def __init__(self, connector: Connector, index: Index, generation: str | None) -> None:
        self._connector = connector
        self._generation = generation
        # Where there are checksums they say more; and tags in a manifest may be those of the store it was written to.
        self._etags = {file.path: file.etag for file in index.files if file.etag is not None and not index.crcs}
        self._maker = os.getpid()
        options = connector.options
        self._index = index
        self._digests: dict[int, FileDigest] = {}  # per file that has one
        self._asked_digests: set[int] = set()
        self._lock = threading.Lock()
        self._only_whole = False  # verify="require", and no checksums but those of whole files
        if options.verify != "off" and not index.crcs and options.cache_dir is None:
            self._ask_digests([position for position, file in enumerate(index.files) if file.header is not None])
            self._only_whole = options.verify == "require" and bool(self._digests)
        if options.verify == "require" and not index.crcs and index.total_bytes > 0 and not self._digests:
            remedy = "save the model to a store that keeps them"
            if index.checksums_pending:
                remedy = (
                    "the server is still computing them: try again later, or start it with `rdmaload serve "
                    "--wait-checksums`"
                )
            raise IntegrityError(
                f"{connector.url} has no checksums{' yet' * index.checksums_pending}, and verify='require' asks for "
                f"them: {remedy}, or use verify='auto'",
                url=connector.url,
            )
        self._verify = options.verify != "off" and bool(index.crcs)
        if index.checksums_pending and options.verify != "off":
            _log.warning(
                "%s: the server is still computing checksums, so what is loaded now is not verified; open the model "
                "again later, or start the server with `rdmaload serve --wait-checksums`",
                connector.url,
            )
        self._values = index.files if any(file.key is not None for file in index.files) else ()
        if self._values:
            files = [(file.key or "", file.size, 0) for file in index.files]
        elif isinstance(connector, KeyValueConnector):
            prefix = f"{connector.model}/chunks/{generation}"
            files = [(f"{prefix}/{file.number}/", file.size, file.first_chunk) for file in index.files]
        else:
            files = [(file.path, file.size, file.first_chunk) for file in index.files]
        chunked = isinstance(connector, KeyValueConnector) and not self._values
        self._cached: list[tuple[str, str]] = []  # per file; empty: there is no cache
        self._not_cached = ""
        if options.cache_dir is not None:
            block_bytes = index.chunk_bytes or _READ_BYTES
            self._cached, self._not_cached = cache_entries(connector, index, generation, block_bytes)
        self.read_bytes = self._longest_read(index)
        """No read is longer than this."""
        # What is kept on disk is kept in blocks, whether the store knows them or not.
        self._block_bytes = index.chunk_bytes or (_READ_BYTES if self._cached else 0)
        self._files, self._chunked, self._crcs = files, chunked, index.crcs
        self._layout = self._new_layout()
        self.timeline: Timeline | None = None
        """Gets the times of every read, where there is one."""
        self._paths = [file.path for file in index.files]
        self._logged_fallback: str | None = None
        self._logged_way: str | None = None
        self._transport: _core.Transport | None = None  # guarded by _lock
        self._closed = False  # guarded by _lock
        self._started: weakref.WeakSet[_core.LoadOperation] = weakref.WeakSet()  # guarded by _lock

    def _new_layout(self) -> _core.StoreLayout:
        kinds = [self._digests[at].kind if at in self._digests else "" for at in range(len(self._files))]
        return _core.StoreLayout(
            self._files, self._block_bytes, self._chunked, self._crcs, kinds if self._digests else ()
        )

    def _ask_digests(self, positions: Sequence[int]) -> None:
        """Learn what the store has of these files, once."""
        connector = self._connector
        if not isinstance(connector, FileConnector):
            return
        with self._lock:
            positions = [at for at in positions if at not in self._asked_digests]
            self._asked_digests.update(positions)
        found = connector.digests([self._index.files[at].path for at in positions]) if positions else {}
        for at in positions:
            digest = found.get(self._index.files[at].path)
            if digest is not None:
                self._digests[at] = digest

    def expect_whole(self, positions: Sequence[int]) -> None:
        """These files are going to be read whole: what the store has of them counts, too."""
        if self._connector.options.verify != "off" and not self._index.crcs and not self._cached:
            before = len(self._digests)
            self._ask_digests(positions)
            if len(self._digests) > before:
                self._layout = self._new_layout()

    @property
    def requires_whole(self) -> bool:
        """Whether every file that is read must be read whole, and have a checksum in the store."""
        return self._only_whole

    def require_whole(self, files: Callable[[], Mapping[str, tuple[int, int]]]) -> None:
        """With verify="require": raise IntegrityError where a load could not be verified.

        `files` are those that are read: the bytes that are wanted of each, and those that it has for tensors.
        """
        if not self._only_whole:
            return
        by_path = {file.path: at for at, file in enumerate(self._index.files)}
        for path, (wanted, nbytes) in files().items():
            why = ""
            if by_path[path] not in self._digests:
                why = "the store has no checksum of it that ranges can be compared with"
            elif not self.transport().keeps_digests:
                why = "what reads it here takes no checksums"
            elif wanted < nbytes:
                why = "the store's checksum is of the whole file, and only a part of it is selected"
            if why:
                raise IntegrityError(
                    f"{path} in {self._connector.url}: verify='require', but {why}. Save the model with rdmaload, "
                    "which keeps a checksum per chunk, or use verify='auto'",
                    url=self._connector.url,
                    key=path,
                )

    def whole_files(self) -> WholeFiles:
        """For one load, whose parts all get it: what the store has of whole files is compared with all of them."""
        return WholeFiles(self._connector.url, self._index.files, self._digests, must=self._only_whole)

    def close(self) -> None:
        """Close the connections; reads that run end with an error first."""
        if (
            os.getpid() != self._maker
        ):  # the threads, and maybe a held lock, are those of the process we were forked from
            self._closed = True
            return
        with self._lock:
            self._closed = True
            transport, self._transport = self._transport, None
            started = list(self._started)
        for operation in started:
            operation.cancel()
        for operation in started:  # a reader in Python that outlives the interpreter would bring the process down
            while not operation.wait_for(_TICK_SECONDS):
                pass
        del transport

    def transport(self) -> _core.Transport:
        """The transport, made on first use."""
        if os.getpid() != self._maker:
            raise UnavailableError(
                f"{self._connector.url} was opened before this process was forked: open it again",
                url=self._connector.url,
            )
        with self._lock:
            if self._closed:
                raise self._closed_error()
            if self._transport is None:
                native = self._connector.native_transport()
                if native is None:
                    native = self._python_transport()
                assert isinstance(native, _core.Transport)
                self._transport = self._with_cache(native) if self._cached else native
            return self._transport

    def _with_cache(self, source: _core.Transport) -> _core.Transport:
        options = self._connector.options
        assert options.cache_dir is not None
        return _core.CachingTransport(
            source,
            directory=os.path.abspath(os.path.expanduser(options.cache_dir)),
            limit_bytes=options.cache_bytes,
            block_bytes=self._block_bytes,
            object_per_block=self._chunked,
            entries=[(*file, *entry) for file, entry in zip(self._files, self._cached, strict=True)],
            crcs=self._crcs,
            threads=options.threads,
            io=options.file_io,
            patience=options.inactivity_timeout,
        )

    def _closed_error(self) -> UnavailableError:
        return UnavailableError(f"{self._connector.url} is closed: open it again", url=self._connector.url)

    def _python_transport(self) -> _core.Transport:
        connector = self._connector
        options = connector.options
        if isinstance(connector, KeyValueConnector):
            store = connector

            def read_value(key: str, offset: int, buffer: memoryview) -> int:
                return store.get_into(key, buffer)

            def read_range(key: str, offset: int, buffer: memoryview) -> int:
                data = store.get_range(key, offset, len(buffer))
                buffer[: len(data)] = data
                return len(data)

            if self._values:
                return _core.PythonTransport(read_range, max(connector.connections, options.threads))

            return _core.PythonTransport(read_value, max(connector.connections, options.threads))
        assert isinstance(connector, FileConnector)
        return _core.PythonTransport(connector.read_into, options.threads)

    def _longest_read(self, index: Index) -> int:
        connector = self._connector
        longest = index.chunk_bytes or _READ_BYTES
        if self._values:
            assert isinstance(connector, KeyValueConnector)
            if type(connector).get_range is KeyValueConnector.get_range:  # each range would cost the whole value
                longest = 1 << 62
            else:
                longest = min(READ_BYTES, max(1, connector.bytes_in_flight // connector.connections))
        return max(1, min(longest, max((file.size for file in index.files), default=1)))

    def _limits(self, *, alone: bool) -> _core.PlanLimits:
        if self._values:
            return _core.PlanLimits(whole_chunks=False, read_bytes=self.read_bytes)
        # A connector written in Python reads values whole.
        whole = self._verify or bool(self._cached) or self.transport().path == "python"
        if not alone:
            return _core.PlanLimits(whole_chunks=whole, read_bytes=_READ_BYTES, coalesce_gap=0)
        return _core.PlanLimits(whole_chunks=whole, read_bytes=_READ_BYTES)

    def plan(
        self, tensors: _core.TensorIndex, selection: Sequence[int], *, into_tensors: bool = False, alone: bool = True
    ) -> _core.LoadPlan:
        """A plan that puts the selected tensors into arenas, or each into a destination of its own.

        Where it is not `alone`, other plans read the tensors between those: no byte must come twice, or the checksum
        of a whole file could not be made of what came.
        """
        make = _core.plan_into_tensors if into_tensors else _core.plan_into_arenas
        return make(tensors, self._layout, list(selection), self._limits(alone=alone or not self._digests))

    def start(
        self,
        plan: _core.LoadPlan,
        destinations: Sequence[_core.HostArena | _core.ImportedTensor | _core.DeviceDestination],
        *,
        deadline: float | None = None,
        road: DeviceRoad | None = None,
        tensors: Sequence[torch.Tensor] = (),
        whole: WholeFiles | None = None,
    ) -> Batch:
        """Begin to read; the destinations are written until finish() has returned or raised.

        `deadline` (of time.monotonic) is that of a work of which this is a part; without it `timeout` begins now.
        Destinations on a GPU, the memory of `tensors`, are reached by its `road`. `whole` is that of the same work.
        """
        options = self._connector.options
        timeout = options.timeout if deadline is None else max(0.001, deadline - time.monotonic())
        transport = self.transport() if road is None else road.transport
        operation = _core.LoadOperation(
            transport,
            self._layout,
            plan,
            list(destinations),
            verify=self._verify or bool(self._digests),
            max_integrity_attempts=options.max_integrity_attempts,
            retry_timeout=options.retry_timeout,
            timeout=timeout,
            queued_bytes=self._queued_bytes(transport) if road is None else road.queued_bytes,
            trace=self.timeline is not None,
        )
        with self._lock:
            if self._closed:
                raise self._closed_error()
            self._started.add(operation)
        operation.start()
        return Batch(plan, destinations, operation, tensors, road, whole or self.whole_files())

    def _queued_bytes(self, transport: _core.Transport) -> int | None:
        if self._cached:
            return _CACHED_QUEUE_BYTES
        return _RDMA_QUEUE_BYTES if isinstance(transport, _core.RdmaTransport) else None

    def finish(self, batch: Batch, stats: LoadStats, tick: Tick | None = None) -> None:
        """Wait until everything has arrived and is verified; add what it took to `stats`. Raises the first error."""
        operation = batch.operation
        try:
            while not operation.wait_for(_TICK_SECONDS):
                self._tell(batch, tick)
        except BaseException:  # interrupted: nothing may still write when the caller goes on
            operation.cancel()
            while not operation.wait_for(_TICK_SECONDS):
                pass
            raise
        finally:
            self._count(batch, stats)
        self._tell(batch, tick)
        try:
            operation.throw_if_failed()
        except RdmaloadError as error:
            if self._closed and type(error) is RdmaloadError:  # cancelled, by close()
                raise self._closed_error() from None
            raise self._explained(error, operation.failed_object or None) from None
        self._check_unchanged(batch.plan)
        if batch.whole is not None and self._digests:
            verified = batch.whole.add(operation.digests())
            stats.verified_bytes += verified
            stats.unverified_bytes -= verified

    def _tell(self, batch: Batch, tick: Tick | None) -> None:
        """Chunks on the border of two plans are read for both, so that what is read can be more than is wanted."""
        if tick is not None:
            plan, operation = batch.plan, batch.operation
            done = operation.counters()["done_bytes"] * plan.wanted_bytes // max(1, plan.read_bytes)
            tick(done, {self._paths[file] for file in operation.finished_files()})

    def stream(
        self,
        plans: Iterator[_core.LoadPlan],
        *,
        window_bytes: int,
        stats: LoadStats,
        tick: Tick | None = None,
        reuse: bool = False,
        road: DeviceRoad | None = None,
        empty: Callable[[_core.LoadPlan], list[torch.Tensor]] | None = None,
        whole: WholeFiles | None = None,
    ) -> Iterator[Batch]:
        """Execute plans in order, reading ahead at most `window_bytes` (but one plan always), and yield each when done.

        `timeout` is for all of them. Plans follow each other in the order of the files. With `reuse`, arenas of a batch
        are used again once the consumer has come back for the next. With a `road`, plans are into tensors, which
        `empty` makes.
        """
        timeout = self._connector.options.timeout
        deadline = None if timeout is None else time.monotonic() + timeout
        whole = whole or self.whole_files()
        ahead: deque[Batch] = deque()
        ahead_bytes = 0
        spare: list[_core.HostArena] = []
        done_before = 0
        finished: set[str] = set()
        waiting = next(plans, None)
        try:
            while ahead or waiting is not None:
                while waiting is not None and (not ahead or ahead_bytes + waiting.wanted_bytes <= window_bytes):
                    if road is not None and empty is not None:
                        tensors = empty(waiting)
                        batch = self.start(
                            waiting,
                            road.destinations(tensors),
                            deadline=deadline,
                            road=road,
                            tensors=tensors,
                            whole=whole,
                        )
                        del tensors
                    else:
                        arenas = [_take(spare, nbytes) for nbytes in waiting.region_bytes]
                        batch = self.start(waiting, arenas, deadline=deadline, whole=whole)
                    ahead.append(batch)
                    del batch
                    ahead_bytes += waiting.wanted_bytes
                    waiting = next(plans, None)
                batch = ahead[0]
                later = ahead[1].plan if len(ahead) > 1 else waiting
                unfinished = {self._paths[file] for file in later.files} if later is not None and tick else set()
                self.finish(batch, stats, None if tick is None else _shifted(tick, done_before, finished, unfinished))
                if tick is not None:
                    finished |= {self._paths[file] for file in batch.plan.files} - unfinished
                if road is not None:
                    road.hand_out(batch.tensors)
                done_before += batch.plan.wanted_bytes
                yield batch
                ahead.popleft()
                ahead_bytes -= batch.plan.wanted_bytes
                if reuse:
                    spare.extend(batch.arenas)
                del batch  # its memory is free before more is asked for
        finally:
            forked = os.getpid() != self._maker  # then nobody here completes them, and nothing of them is ours
            for batch in ahead if not forked else ():
                batch.operation.cancel()
            if road is not None and not forked:  # torch may give the tensors' memory to others as soon as we return
                for batch in ahead:
                    while not batch.operation.wait_for(_TICK_SECONDS):
                        pass

    def _check_unchanged(self, plan: _core.LoadPlan) -> None:
        """Raise IntegrityError when a plain file or value is another one than when the model was opened.

        What was read before and after a replacement does not belong together, and nothing else would show it.
        """
        if self._values and isinstance(self._connector, KeyValueConnector):
            check_unchanged(self._connector, [self._values[file] for file in plan.files])
            return
        if not self._etags or not isinstance(self._connector, FileConnector) or self._connector.pins_versions:
            return
        now = {info.path: info.etag for info in self._connector.list_files()}
        for path, etag in self._etags.items():
            if now.get(path) != etag:
                raise IntegrityError(
                    f"{self._connector.url}: {path} was changed or replaced while the model was read: open it again",
                    url=self._connector.url,
                    key=path,
                )

    def _count(self, batch: Batch, stats: LoadStats) -> None:
        counters = batch.operation.counters()
        transport = self._transport
        if self.timeline is not None:
            self.timeline.add(batch.operation.trace(), self._paths)
            self.timeline.path = "" if transport is None else transport.path
        if transport is not None:
            # The source's part is known only now: files are read in ways that are chosen as they are opened.
            way = batch.road or transport
            stats.path = way.path
            stats.connections = transport.connections
            reasons = [way.fallback_reason or self._connector.fallback_reason, self._not_cached]
            self._note_fallback("; ".join(reason for reason in reasons if reason), stats)
            self._note_way(transport.description)
        stats.generation = self._generation
        stats.retries += counters["retries"]
        stats.verified_bytes += counters["verified_bytes"]
        stats.unverified_bytes += counters["unverified_bytes"]
        stats.copied_bytes += counters["copied_bytes"]
        stats.cached_bytes += counters["cached_bytes"]
        if batch.road is not None:
            stats.device_verified_bytes += batch.road.newly_verified_bytes()
        stats.read_bytes += batch.plan.read_bytes
        for stage, seconds in (("read", counters["seconds"]), ("checksum", counters["checksum_seconds"])):
            stats.stages[stage] = stats.stages.get(stage, 0.0) + seconds

    def _note_fallback(self, reason: str, stats: LoadStats) -> None:
        if not reason:
            return
        stats.fallback_reason = reason
        if reason != self._logged_fallback:
            self._logged_fallback = reason
            # What was not asked for is a choice rather than a loss.
            asked_for = (
                isinstance(self._connector, KeyValueConnector)
                or self._connector.options.file_io != "auto"
                or "cache_dir: " in reason
            )
            level = logging.WARNING if asked_for else logging.INFO
            _log.log(level, "%s: %s", self._connector.url, reason)

    def _note_way(self, description: str) -> None:
        if description and description != self._logged_way:
            self._logged_way = description
            _log.info("%s: %s", self._connector.url, description)

    def _explained(self, error: RdmaloadError, key: str | None) -> RdmaloadError:
        """The error with its url and key; for a missing chunk, which of the two reasons it is."""
        connector = self._connector
        if self._values and isinstance(error, (NotFoundError, IntegrityError)):
            kind = type(error)
            error = kind(f"{error}: the value was replaced or removed while the model was read; open it again")
        elif isinstance(error, NotFoundError) and isinstance(connector, KeyValueConnector):
            error = self._why_missing(connector, error, key)
        if isinstance(error, LoadTimeoutError) and key is None:  # the deadline of the whole, not of a connection
            timeout = connector.options.timeout
            error = LoadTimeoutError(f"{connector.url}: the load took longer than timeout={timeout:g} s ({error})")
        missing = [name for name in (connector.url, key) if name and name not in str(error)]
        if missing:
            error = type(error)(f"{' '.join(missing)}: {error}")
        error.url = connector.url
        error.key = key
        return error

    def _why_missing(self, connector: KeyValueConnector, error: RdmaloadError, key: str | None) -> RdmaloadError:
        where = f"{connector.url}: chunk '{key}' is gone"
        try:
            value = connector.get(manifest_key(connector.model))
            published = Manifest.decode(value).generation if value is not None else None
        except RdmaloadError as second:
            return NotFoundError(f"{where}, and the manifest cannot be read to say why ({second})")
        if published == self._generation:
            return NotFoundError(
                f"{where} although the manifest still names its generation: the server has evicted or lost it. Set "
                "maxmemory-policy noeviction (or more maxmemory) and save the model again"
            )
        now = "removed" if published is None else f"replaced by generation {published}"
        return StaleGenerationError(
            f"{where}: generation {self._generation} was {now} and pruned while it was read; open the model again"
        )


def _shifted(tick: Tick, before: int, finished: AbstractSet[str], unfinished: AbstractSet[str]) -> Tick:
    """The tick of one of several plans: after so many bytes and files, with files that later plans go on with."""
    return lambda done, files: tick(before + done, finished | (files - unfinished))


def _take(spare: list[_core.HostArena], nbytes: int) -> _core.HostArena:
    """An arena of at least `nbytes`, used before if one is large enough."""
    for position, arena in enumerate(spare):
        if arena.nbytes >= nbytes:
            return spare.pop(position)
    return _core.HostArena(nbytes)

"""save(): a model into a key-value store or a directory, in parallel, resumably, all or nothing.

Into a key-value store a save writes to a generation of its own and publishes it by one SET of the
manifest. Until then readers see the old model or none, however many savers run or die. An
interrupted save of a directory goes on where it stopped when it is called again; see journal.py for
what it keeps in the store, publish.py for the last steps.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rdmaload import metrics
from rdmaload._sglang_save import SglangSave
from rdmaload.connectors import FileConnector, KeyValueConnector, connector_for
from rdmaload.connectors.local import LocalConnector
from rdmaload.connectors.objects import ObjectConnector
from rdmaload.errors import (
    AlreadyExistsError,
    AuthenticationError,
    FormatError,
    LoadTimeoutError,
    NotFoundError,
    NotSupportedError,
    RdmaloadError,
    UnavailableError,
    UrlError,
)
from rdmaload.files_save import save_files
from rdmaload.index import DEFAULT_CHUNK_BYTES, index_key
from rdmaload.journal import SAVE_ID, SaveKeys, encode_part
from rdmaload.manifest import GENERATION_PATTERN, Manifest, manifest_key, utc_now
from rdmaload.meter import Meter
from rdmaload.object_save import save_objects
from rdmaload.options import Options
from rdmaload.publish import Publisher
from rdmaload.sglang_layout import find_tensor
from rdmaload.sglang_state import engine_state
from rdmaload.sources import SourceModel, directory_model, plain_files, read_index, stored_model
from rdmaload.stats import Progress, SaveStats
from rdmaload.upload import Overtaken, Upload
from rdmaload.urls import parse_url

if TYPE_CHECKING:
    import torch

__all__ = ["save"]

_log = logging.getLogger("rdmaload")

# prune takes a save for dead after a grace of minutes to hours; ten seconds cost nothing.
_BEAT_SECONDS = 10.0

# A connection is busy or waiting for the server's answer; two threads per connection read and
# checksum the next chunk meanwhile.
_THREADS_PER_CONNECTION = 2

# Every restart sends again what other attempts have not finished; each takes another attempt that
# ended in this moment, so more of them than these mean a store that drops keys.
_RESTARTS = 3
_JOINS = 10  # the same for joining, which costs a few round trips only

_PATHS = {"redis": "resp-tcp", "valkey": "resp-tcp", "memory": "memory"}
_PATHS |= {"rediss": "resp-tls", "valkeys": "resp-tls", "redis+unix": "resp-unix", "valkey+unix": "resp-unix"}


def save(
    source: str | os.PathLike[str] | Mapping[str, torch.Tensor] | torch.nn.Module,
    url: str | os.PathLike[str],
    *,
    rank: int | None = None,
    world_size: int | None = None,
    save_id: str | None = None,
    layout: Literal["rdmaload", "sglang"] = "rdmaload",
    overwrite: bool = True,
    chunk_bytes: int | None = None,
    files: str | os.PathLike[str] | None = None,
    parallel: Mapping[str, int] | None = None,
    identity: Mapping[str, str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    options: Options | None = None,
    **opts: object,
) -> SaveStats:
    """Save a directory, a state dict, a module, or another model (by its url) to `url`.

    The ranks of a sharded model each call save with their own `rank`, the same `world_size` and the
    same `save_id`; whoever finishes last publishes. A save id names one content: take a new one for
    every save (a step number and a job id, say), and the same one to repeat a rank that died. A
    directory saved again after an interruption is recognised without a save id, unless it changed.

    A key-value store shows the old model or the new one, never a mix; superseded chunks stay until
    `prune`. Into a directory, files appear whole and one by one, the list of weight files and
    config.json last; weight files at its root that the new model lacks are then removed.

    Args:
        layout: "sglang" writes what SGLang's own Redis connector loads (docs/format.md): no checksums, no resuming,
            one value per tensor, and while a model is replaced there is none.
        overwrite: False refuses to replace a model that exists.
        chunk_bytes: bytes per value in a key-value store; None: the source's, or 2^20 - 4096.
        files: with a state dict or a module, a directory whose files other than weights are saved beside the tensors.
        parallel, identity: with a state dict or a module, what its manifest says of how the model was cut (sizes such
            as tp and pp) and of what wrote it (engine, version, dtype ...); None: nothing.
        progress: called with a Progress in this thread about ten times a second.
        options, **opts: see Options; they are those of the destination.

    Returns what was sent. Stages "read", "checksum" and "send" are summed over the threads.

    Raises IntegrityError when the source changes meanwhile or a copied chunk does not match its
    checksum, LayoutMismatchError when ranks do not fit together, AlreadyExistsError (in any case
    for a model in the other layout), NotSupportedError for tensors that safetensors cannot
    hold, LoadTimeoutError after `timeout`, and what the stores raise. Nothing is published then.
    """
    _check_arguments(rank, world_size, save_id, layout)
    if layout == "sglang" and (save_id is not None or chunk_bytes is not None):
        raise UrlError("layout='sglang' resumes nothing and has no chunks: leave out save_id and chunk_bytes")
    started = time.perf_counter()
    if chunk_bytes is not None:
        opts["chunk_bytes"] = chunk_bytes
    with connector_for(url, options, **opts) as connector:
        path = _PATHS.get(connector.location.scheme, "python")
        metrics.began("save")
        try:
            if layout == "sglang" and not isinstance(connector, KeyValueConnector):
                raise NotSupportedError(
                    f"{connector.url} keeps files: layout='sglang' is for Redis and Valkey", url=connector.url
                )
            if isinstance(connector, FileConnector) and connector.read_only:
                raise NotSupportedError(f"{connector.url}: {connector.read_only}", url=connector.url)
            model = _source_model(source, rank, world_size, layout)
            try:
                _describe(model, source, files, parallel, identity)
                model.check_weights()
                watch = _Watch(model, connector.options.timeout, progress, started, connector.url)
                watch.stages["plan"] = time.perf_counter() - started
                if isinstance(connector, KeyValueConnector) and layout == "sglang":
                    values = SglangSave(
                        connector,
                        model,
                        rank,
                        overwrite=overwrite,
                        keep_aliases=not isinstance(source, (str, os.PathLike)),
                        tick=watch.tick,
                        stages=watch.stages,
                        expect=watch.sends_values,
                    )
                    with _Deadline(watch, values.interrupt):
                        stats = values.run()
                elif isinstance(connector, KeyValueConnector):
                    attempt = _KeyValueSave(connector, model, rank, save_id, overwrite=overwrite, watch=watch)
                    with _Deadline(watch, attempt.interrupt):
                        stats = attempt.run()
                elif isinstance(connector, ObjectConnector):
                    stats = save_objects(
                        connector,
                        model,
                        rank=rank,
                        save_id=save_id,
                        overwrite=overwrite,
                        writer=_writer(),
                        tick=watch.tick,
                        publishes=watch.publishes,
                    )
                elif isinstance(connector, FileConnector):
                    _check_places(source, connector)
                    save_files(
                        connector,
                        model,
                        rank=rank,
                        overwrite=overwrite,
                        tick=watch.tick,
                        threads=connector.options.threads,
                    )
                    stats = SaveStats(published=True, connections=connector.options.threads)
                else:
                    raise TypeError(f"{connector!r} is neither a key-value nor a file connector")
            finally:
                model.close()
            if layout == "rdmaload":  # else they were counted by value
                stats.bytes = model.bytes
                stats.files = len(model.files)
            stats.path = connector.write_path or path
            stats.stages = watch.stages
            stats.retries = connector.retries
            stats.seconds = time.perf_counter() - started
        except BaseException as error:
            spent = SaveStats(path=path, seconds=time.perf_counter() - started, retries=connector.retries)
            metrics.ended("save", spent, error)
            raise
        metrics.ended("save", stats, None)
    watch.finish(stats.skipped_bytes)
    return stats


def _check_arguments(rank: int | None, world_size: int | None, save_id: str | None, layout: str) -> None:
    if layout not in ("rdmaload", "sglang"):
        raise NotSupportedError(f"layout={layout!r} cannot be written; there are 'rdmaload' and 'sglang'")
    if (rank is None) != (world_size is None):
        raise UrlError("rank and world_size go together")
    if rank is not None and world_size is not None and not 0 <= rank < world_size:
        raise UrlError(f"rank {rank} is not one of 0 to {world_size - 1} (world_size {world_size})")
    if save_id is not None and not SAVE_ID.fullmatch(save_id):
        raise UrlError(f"save_id {save_id[:200]!r} is not 1 to 128 of A-Z a-z 0-9 . _ -")
    if layout == "rdmaload" and save_id is None and world_size is not None and world_size > 1:
        raise UrlError(
            "a sharded save needs a save_id that all its ranks share and no other save has: "
            "it is what keeps two saves at once from being mixed"
        )


def _source_model(source: object, rank: int | None, world_size: int | None, layout: str) -> SourceModel:
    if isinstance(source, (str, os.PathLike)):
        location = parse_url(source)
        connector = connector_for(location)
        try:
            if isinstance(connector, LocalConnector):
                return directory_model(connector, connector.root, rank=rank, world_size=world_size)
            if rank is not None:
                raise UrlError(f"{connector.url} is a model with ranks of its own: copy it without rank=")
            model = stored_model(connector)
        except BaseException:
            connector.close()
            raise
        model.on_close = connector.close
        return model
    from rdmaload.state_dict import state_dict_model

    state_dict = getattr(source, "state_dict", None)
    if not isinstance(source, Mapping) and callable(state_dict):
        source = state_dict()
    if isinstance(source, Mapping):
        state = engine_state(source) if layout == "sglang" else source
        return state_dict_model(state, rank=rank, world_size=world_size)
    raise TypeError(f"cannot save a {type(source).__name__}: give a directory, a state dict, a module or a url")


def _describe(
    model: SourceModel,
    source: object,
    files: str | os.PathLike[str] | None,
    parallel: Mapping[str, int] | None,
    identity: Mapping[str, str] | None,
) -> None:
    """Give a model made of tensors in memory what a directory or a store would have said of it."""
    if files is None and parallel is None and identity is None:
        return
    if isinstance(source, (str, os.PathLike)):
        raise UrlError("files=, parallel= and identity= are for a state dict or a module: a stored model has its own")
    model.layout = dict(parallel or {})
    model.identity = dict(identity or {})
    if files is not None:
        model.files += plain_files(Path(files), but={file.path for file in model.files})


def _check_places(source: object, connector: FileConnector) -> None:
    if isinstance(source, (str, os.PathLike)) and isinstance(connector, LocalConnector):
        location = parse_url(source)
        if location.scheme == "file" and Path(location.path).resolve() == connector.root.resolve():
            raise UrlError(f"{connector.url} is both source and destination")


class _Watch:
    """Progress, deadline and stage times of one save."""

    def __init__(
        self,
        model: SourceModel,
        timeout: float | None,
        progress: Callable[[Progress], None] | None,
        started: float,
        url: str,
    ) -> None:
        self.stages: dict[str, float] = {}
        self._timeout = timeout
        self._meter = (
            None
            if progress is None
            else Meter("save", progress, bytes_total=model.bytes, files_total=len(model.files), stage="send")
        )
        self._started = started
        self._url = url

    def tick(self, bytes_done: int, files_done: int, skipped_bytes: int = 0) -> None:
        self.check()
        if self._meter is not None:
            self._meter.update(bytes_done, files_done, skipped_bytes)

    def sends_values(self, count: int, nbytes: int) -> None:
        """It is not files that are sent but so many values."""
        if self._meter is not None:
            self._meter.files_total, self._meter.bytes_total = count, nbytes

    def publishes(self) -> None:
        """Everything is sent; what is left is to let readers see it."""
        if self._meter is not None:
            self._meter.enter("publish")

    def check(self) -> None:
        """Raise LoadTimeoutError after the deadline."""
        left = self.seconds_left()
        if left is not None and left < 0:
            raise self.too_late("nothing was published")

    def seconds_left(self) -> float | None:
        return None if self._timeout is None else self._timeout - (time.perf_counter() - self._started)

    def too_late(self, outcome: str) -> LoadTimeoutError:
        return LoadTimeoutError(
            f"the save to {self._url} took longer than timeout={self._timeout:g} s; {outcome}. "
            "Allow more, or call it again: finished files are not sent twice.",
            url=self._url,
        )

    def finish(self, skipped_bytes: int) -> None:
        if self._meter is not None:
            self._meter.finish(skipped_bytes)


class _Deadline:
    """Ends the save when its time is up, wherever it waits: a server that stopped answering holds a
    command for as long as inactivity_timeout. One thread while there is a timeout."""

    def __init__(self, watch: _Watch, interrupt: Callable[[], None]) -> None:
        self._watch = watch
        self._interrupt = interrupt
        self._expired = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> None:
        left = self._watch.seconds_left()
        if left is not None:
            self._timer = threading.Timer(max(0.0, left), self._expire)
            self._timer.daemon = True
            self._timer.start()

    def _expire(self) -> None:
        self._expired = True
        self._interrupt()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._timer is None:
            return
        self._timer.cancel()
        self._timer.join()
        if self._expired and isinstance(error, UnavailableError):
            outcome = "nothing was published, unless that was its last step"
            raise self._watch.too_late(outcome) from error


class _KeyValueSave:
    """One attempt of one rank."""

    def __init__(
        self,
        connector: KeyValueConnector,
        model: SourceModel,
        rank: int | None,
        save_id: str | None,
        *,
        overwrite: bool,
        watch: _Watch,
    ) -> None:
        self._connector = connector
        self._model = model
        self._rank = rank
        self._watch = watch
        self._overwrite = overwrite
        self._parts = model.world_size if rank is not None else 1
        wanted = connector.options.chunk_bytes or model.chunk_bytes or DEFAULT_CHUNK_BYTES
        self._chunk_bytes = min(wanted, connector.max_value_bytes)
        # Without a name of ours the save id says what the content is: an attempt that finds it
        # published has nothing left to do.
        self._id_names_content = save_id is None and model.content_id is not None
        self._keys = SaveKeys(connector.model, save_id or self._default_save_id())
        self._last_beat = 0.0

    def _default_save_id(self) -> str:
        if self._model.content_id is None:
            return secrets.token_hex(16)
        text = f"{self._model.content_id} {self._chunk_bytes} {self._rank} {self._parts}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def run(self) -> SaveStats:
        for warning in self._connector.publish_warning(self._model.bytes):
            _log.warning("%s", warning)
        for _ in range(1 + _RESTARTS):
            self._watch.check()
            generation, published = self._join()
            if published:
                return SaveStats(
                    save_id=self._keys.save_id,
                    generation=generation,
                    skipped_bytes=self._model.bytes,
                    published=True,
                )
            try:
                return self._attempt(generation)
            except Overtaken:
                if not self._was_published(generation):
                    break
                _log.info("save %s was ended by another attempt; starting anew", self._keys.save_id)
        raise self._lost()

    def interrupt(self) -> None:
        """Make every command that is under way fail soon; from any thread."""
        self._connector.close()
        if self._model.on_close is not None:
            self._model.on_close()

    def _was_published(self, generation: str) -> bool:
        """Whether another attempt ended this generation by publishing it, not the store by dropping its key."""
        published = self._publisher(generation).published_manifest()
        if published is not None and published.generation == generation:
            return True
        # Replaced since, but not pruned.
        return self._connector.exists(index_key(self._connector.model, generation))

    def _lost(self) -> NotFoundError:
        return NotFoundError(
            f"{self._keys.generation} on {self._connector.url} is gone while the save is under way: the "
            "store evicts values (set its maxmemory-policy to noeviction and make room) or the save "
            "was pruned or removed. Nothing was published; save again.",
            url=self._connector.url,
            key=self._keys.generation,
        )

    def _attempt(self, generation: str) -> SaveStats:
        stats = SaveStats(save_id=self._keys.save_id, generation=generation)
        upload = Upload(
            self._connector,
            self._keys,
            generation,
            self._model.files,
            chunk_bytes=self._chunk_bytes,
            rank=self._rank,
            world_size=self._parts,
        )

        def tick() -> None:
            self._beat()
            self._watch.tick(upload.bytes_done, upload.files_done, upload.skipped_bytes)

        threads = self._connector.connections * _THREADS_PER_CONNECTION
        index = upload.run(threads, tick, self.interrupt)
        # Every file was whole when it was sent; together they are a model only if none has changed
        # since the first.
        self._model.check_unchanged()
        started = time.perf_counter()
        self._watch.publishes()
        self._beat(now=True)
        encoded = index.encode()
        part = Manifest.of(
            encoded,
            generation=generation,
            files=len(index.files),
            bytes=index.total_bytes,
            writer=_writer(),
            kind=self._model.kind,
            world_size=self._model.world_size,
            layout=self._model.layout,
            identity=self._model.identity,
        )
        self._connector.set(self._keys.part(generation, self._rank or 0), encode_part(part, encoded))
        stats.published = self._publisher(generation).publish(index)
        self._watch.stages.update(upload.stages)
        self._watch.stages["publish"] = time.perf_counter() - started
        stats.connections = threads
        stats.chunks = upload.chunks_sent
        stats.skipped_bytes = upload.skipped_bytes
        return stats

    def _publisher(self, generation: str) -> Publisher:
        return Publisher(
            self._connector,
            self._keys,
            generation,
            parts=self._parts,
            overwrite=self._overwrite,
        )

    def _join(self) -> tuple[str, bool]:
        """The generation that all attempts of this save write to, and whether it is published."""
        if not self._connector.exists(manifest_key(self._connector.model)):
            self._refuse_sglang()
        for _ in range(_JOINS):
            self._watch.check()
            fresh = secrets.token_hex(16)
            if not self._overwrite:
                # Before anything is written: a refused save leaves nothing behind.
                mine = self._connector.get(self._keys.generation) or b""
                self._publisher(mine.decode("ascii", "replace")).check_absent()
            # The sign of life first: prune must not find a save without one.
            self._beat(now=True)
            self._connector.set(self._keys.generation, fresh.encode(), if_absent=True)
            # And again: another attempt's cleaning up may have taken the first.
            self._beat(now=True)
            value = self._connector.get(self._keys.generation)
            if value is None:
                continue  # another attempt has just finished
            generation = value.decode("ascii", "replace")
            if not GENERATION_PATTERN.fullmatch(generation):
                raise FormatError(
                    f"{self._keys.generation} on {self._connector.url} holds no generation; delete "
                    "it, or save under another save_id.",
                    url=self._connector.url,
                    key=self._keys.generation,
                )
            if generation == fresh:
                return generation, False  # of this moment: it is not published
            published = self._publisher(generation).published_manifest()
            if published is None or published.generation != generation:
                return generation, False
            # Published, but the attempt that did it had no time to clean up.
            if self._id_names_content and self._is_whole(published):
                self._publisher(generation).finish()
                return generation, True
            self._publisher(generation).clean_up()
        raise self._lost()

    def _refuse_sglang(self) -> None:
        """Raise AlreadyExistsError for a model in SGLang's layout: our readers would take the new model, SGLang
        would go on to load the old one."""
        connector = self._connector
        try:
            key = find_tensor(connector)
        except AuthenticationError as error:
            _log.warning("whether SGLang has saved a model at %s cannot be seen: %s", connector.url, error)
            return
        if key is not None:
            raise AlreadyExistsError(
                f"{connector.url} holds a model in SGLang's layout ({key}), which SGLang would go on to load: remove "
                "it first (`rdmaload rm`), or save under another name. Nothing was written",
                url=connector.url,
                key=key,
            )

    def _is_whole(self, published: Manifest) -> bool:
        try:
            index = read_index(self._connector, published)
            self._publisher(published.generation).check_present(index)
        except RdmaloadError:
            return False
        return True

    def _beat(self, *, now: bool = False) -> None:
        moment = time.monotonic()
        if now or moment - self._last_beat >= _BEAT_SECONDS:
            self._last_beat = moment
            self._connector.set(self._keys.beat, utc_now().encode())


def _writer() -> str:
    try:
        return f"rdmaload {importlib.metadata.version('rdmaload')}"
    except importlib.metadata.PackageNotFoundError:
        return "rdmaload (not installed)"

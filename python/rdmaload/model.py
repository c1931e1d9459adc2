"""A model in a store, opened: what it holds, and the ways to get it.

with rdmaload.open("redis://127.0.0.1:6379/llama") as model:
    model.pull_files("config/", allow_pattern=["*.json", "tokenizer*"])
    for name, tensor in model.weight_iterator():
        ...
"""

from __future__ import annotations

import atexit
import logging
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Literal

from rdmaload import _core, host_memory
from rdmaload.connectors.connector import Connector, FileConnector, KeyValueConnector
from rdmaload.devices import DeviceRoad, checked_device, open_road
from rdmaload.errors import (
    IntegrityError,
    LayoutMismatchError,
    LoadTimeoutError,
    NotFoundError,
    NotSupportedError,
    PartialLoadError,
    RdmaloadError,
    UnavailableError,
    UrlError,
)
from rdmaload.file_manifest import resolve_files
from rdmaload.generations import resolve_any
from rdmaload.gpu_stream import stream_to_gpu
from rdmaload.index import IndexFile
from rdmaload.manifest import Manifest
from rdmaload.node_group import NodeGroup
from rdmaload.reader import StoreReader
from rdmaload.report import ProgressCallback, Report
from rdmaload.selection import (
    Names,
    Patterns,
    RankTensors,
    as_patterns,
    is_selected,
    placed_tensors,
    plans_of,
    state_of,
)
from rdmaload.stats import LoadStats
from rdmaload.tensors import TensorSpec, check_dtype, converted_bytes
from rdmaload.timeline import Timeline
from rdmaload.weights import has_weight_suffix

if TYPE_CHECKING:
    import torch
    from torch import nn
    from typing_extensions import Self

__all__ = ["Model"]

_log = logging.getLogger("rdmaload")

_open_models: weakref.WeakSet[Model] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Threads that call into Python must be gone before the interpreter is."""
    for model in list(_open_models):
        model.close()


class Model:
    """One model, resolved to one generation. Made by `open`; may be used by several threads; a context manager.

    >>> import torch, rdmaload
    >>> _ = rdmaload.save({"w": torch.ones(2)}, "memory://doc/tiny")
    >>> with rdmaload.open("memory://doc/tiny") as model:
    ...     model.load()["w"].tolist()
    [1.0, 1.0]
    """

    def __init__(self, connector: Connector, *, owns_connector: bool = False) -> None:
        begin = time.perf_counter()
        self._connector = connector
        self._owns_connector = owns_connector
        self._closed = False
        self._weights: dict[int | None, RankTensors] = {}
        self.stats = LoadStats()
        """What the last finished load, iteration or pull took."""
        self._manifest: Manifest | None = None
        if isinstance(connector, KeyValueConnector):
            self._manifest, self._index = resolve_any(connector)
        elif isinstance(connector, FileConnector):
            self._manifest, self._index = resolve_files(connector)
        else:
            raise NotSupportedError(f"{type(connector).__name__} is neither a KeyValueConnector nor a FileConnector")
        self._reader = StoreReader(connector, self._index, self.generation)
        self._open_seconds = time.perf_counter() - begin
        _open_models.add(self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.kind}, {len(self._index.files)} files"
        return f"<Model {self._connector.url} {state}>"

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give connections and threads back; tensors that were loaded stay valid. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._reader.close()
        if self._owns_connector:
            self._connector.close()

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError(f"{self._connector.url} is closed: open it again", url=self._connector.url)

    @property
    def url(self) -> str:
        """The url without secrets."""
        return self._connector.url

    @property
    def files(self) -> Sequence[IndexFile]:
        """The model's files, in the order in which they are read."""
        return self._index.files

    @property
    def chunk_bytes(self) -> int | None:
        """Bytes per chunk, which has one checksum; None for plain files."""
        return self._index.chunk_bytes

    @property
    def kind(self) -> str:
        """ "checkpoint" (every rank reads all of it) or "sharded" (each rank has its own files)."""
        if self._manifest is not None:
            return self._manifest.kind
        return "sharded" if any(file.rank is not None for file in self._index.files) else "checkpoint"

    @property
    def world_size(self) -> int:
        """Ranks that a sharded model was saved for; 1 for a checkpoint."""
        if self._manifest is not None:
            return self._manifest.world_size
        return 1 + max((file.rank for file in self._index.files if file.rank is not None), default=0)

    @property
    def checksums_pending(self) -> bool:
        """The server that exports the model was still computing checksums when it was opened: nothing is verified."""
        return self._index.checksums_pending

    @property
    def manifest(self) -> Manifest | None:
        """What the writer said of the model; None for a store of plain files and in SGLang's layout."""
        return self._manifest

    @property
    def store_layout(self) -> Literal["rdmaload", "sglang", "files"]:
        """How the store keeps the model: format 1, the values that SGLang writes, or plain files."""
        if self._manifest is not None:
            return "rdmaload"
        return "files" if isinstance(self._connector, FileConnector) else "sglang"

    @property
    def generation(self) -> str | None:
        """The generation that this object reads, whatever is published meanwhile; None for plain files."""
        return None if self._manifest is None else self._manifest.generation

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor of a checkpoint by name; of a sharded model, see `rank_tensors`."""
        return self.rank_tensors(None)

    def rank_tensors(self, rank: int | None) -> Mapping[str, TensorSpec]:
        """The tensors that `rank` loads, tied names included. Raises LayoutMismatchError as `load` does."""
        weights = self._weights_of(rank)
        named = {spec.name: spec for spec in weights.specs}
        for alias, name in weights.tied.items():
            spec = named[name]
            named[alias] = TensorSpec(alias, spec.dtype, spec.shape, spec.file, spec.nbytes)
        return MappingProxyType(named)

    def record(self) -> Timeline:
        """From now on keep when each read was asked for, arrived and ended, about 300 bytes each, for pictures."""
        self._check_open()
        timeline = Timeline(self.url, time.perf_counter())
        self._reader.timeline = timeline
        return timeline

    def load(
        self,
        *,
        rank: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
        stats: LoadStats | None = None,
        progress: ProgressCallback | None = None,
    ) -> dict[str, torch.Tensor]:
        """Every selected tensor, in memory that the tensors own, in the order file, then offset.

        `rank` picks one rank's tensors of a sharded model (a checkpoint gives all to every rank). `dtype` converts
        floating-point tensors. `include` and `exclude` are fnmatch patterns, applied before anything is read. Tied
        names give one tensor. Raises TypeError for what is no floating-point dtype, LayoutMismatchError,
        IntegrityError, NotFoundError, StaleGenerationError, UnavailableError, LoadTimeoutError, MemoryLimitError,
        DeviceError.
        """
        place = checked_device(device)
        check_dtype(dtype)
        if place.type == "cuda":
            stats = self.stats_for(stats)
            return dict(self._stream_to_gpu(rank, place, dtype, include, exclude, stats, progress, None))
        if dtype is not None or place.type != "cpu":
            window, stats = self._window(None), self.stats_for(stats)
            if place.type == "cpu":
                self._require_converted(rank, dtype, include, exclude, window)
            return dict(self._stream(rank, place, dtype, include, exclude, stats, progress, window, False))
        self._check_open()
        stats = self.stats_for(stats)
        with self._load_report(stats, progress) as report:
            begin = time.perf_counter()
            weights = self._weights_of(rank)
            selection, names = self._select(weights, include, exclude)
            plan = self._reader.plan(weights.native, selection)
            report.stage("plan", begin)
            host_memory.require(
                sum(plan.region_bytes), limit=self._connector.options.max_host_bytes, url=self._connector.url
            )
            arenas = [_core.HostArena(nbytes) for nbytes in plan.region_bytes]
            batch = self._reader.start(plan, arenas)
            begin = time.perf_counter()
            try:  # while the bytes arrive: 20,000 tensors take as long as a third of a GB
                tensors = state_of(batch, weights, names)
            except BaseException:
                batch.operation.cancel()
                raise
            report.stage("export", begin)
            self._reader.finish(batch, stats, report.expect(plan.wanted_bytes, len(plan.files)))
            stats.bytes = plan.wanted_bytes
        return tensors

    def weight_iterator(
        self,
        rank: int | None = None,
        *,
        device: str | torch.device = "cpu",
        include: Patterns = None,
        exclude: Patterns = None,
        window_bytes: int | None = None,
        borrow: bool = False,
        node: NodeGroup | None = None,
        stats: LoadStats | None = None,
        progress: ProgressCallback | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors as they arrive, in the order file, then offset.

        At most `window_bytes` (default: the option of that name) are read ahead and not yet yielded; a larger tensor
        is read alone. Yielded tensors are the caller's. With `borrow=True` they are valid only until the iterator is
        asked for the next one, and memory is used again: copy what you keep. With `node`, the processes of that group
        read the model once, together: one reads, all get every tensor, in memory that they share until one of them
        writes to it; all must ask for the same. Raises as `load` does.
        """
        window = self._window(window_bytes)
        self._weights_of(rank)  # errors of layout come from this call, not from the first next()
        place = checked_device(device)
        if node is not None and node.size > 1:
            return self._stream_shared(rank, place, include, exclude, self.stats_for(stats), progress, window, node)
        if place.type == "cuda":
            return self._stream_to_gpu(rank, place, None, include, exclude, self.stats_for(stats), progress, window)
        return self._stream(rank, place, None, include, exclude, self.stats_for(stats), progress, window, borrow)

    def _require_converted(
        self, rank: int | None, dtype: torch.dtype | None, include: Patterns, exclude: Patterns, window: int
    ) -> None:
        """Raise MemoryLimitError unless the converted tensors fit beside the window that they are converted from."""
        weights = self._weights_of(rank)
        chosen = [weights.specs[position] for position in weights.select(include, exclude)[0]]
        stored = sum(spec.nbytes for spec in chosen)
        host_memory.require(
            sum(converted_bytes(spec, dtype) for spec in chosen) + min(window, stored),
            limit=self._connector.options.max_host_bytes,
            url=self._connector.url,
        )

    def _load_report(self, stats: LoadStats, progress: ProgressCallback | None) -> Report:
        import torch  # noqa: F401  (the first import takes a second or two, which are not the load's)

        report = Report("load", stats, progress)
        opening, self._open_seconds = self._open_seconds, 0.0  # a part of the first load alone
        stats.stages["open"] = stats.stages.get("open", 0.0) + opening
        return report

    @staticmethod
    def _files_of(weights: RankTensors, selection: Sequence[int]) -> int:
        """How many files the selected tensors are in."""
        return len({weights.specs[position].file for position in selection})

    def stats_for(self, stats: LoadStats | None) -> LoadStats:
        """The object that an operation fills: the caller's, and the one that `stats` shows, are the same."""
        self.stats = LoadStats() if stats is None else stats
        return self.stats

    def _window(self, window_bytes: int | None) -> int:
        self._check_open()
        options = self._connector.options
        window = options.window_bytes if window_bytes is None else window_bytes
        if window < 1:
            raise UrlError(f"{self.url}: window_bytes must be positive, not {window}", url=self.url)
        return window if options.max_host_bytes is None else min(window, options.max_host_bytes)

    def _stream(
        self,
        rank: int | None,
        device: torch.device,
        dtype: torch.dtype | None,
        include: Patterns,
        exclude: Patterns,
        stats: LoadStats,
        progress: ProgressCallback | None,
        window: int,
        borrow: bool,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        self._check_open()
        with self._load_report(stats, progress) as report:
            weights = self._weights_of(rank)
            selection, names = self._select(weights, include, exclude)
            plans = plans_of(self._reader, weights, selection, window)
            total = sum(weights.specs[position].nbytes for position in selection)
            limit = self._connector.options.max_host_bytes
            largest = max((weights.specs[position].nbytes for position in selection), default=0)
            host_memory.require(max(largest, min(window, total)), limit=limit, url=self._connector.url)
            tick = report.expect(total, self._files_of(weights, selection))
            batches = self._reader.stream(plans, window_bytes=window, stats=stats, tick=tick, reuse=borrow)
            try:
                for batch in batches:
                    before = -1
                    for position, name, tensor in placed_tensors(batch, weights, names):
                        if position != before:  # else tied to the one before: the same tensor again
                            moved = tensor
                            if dtype is not None and tensor.is_floating_point():
                                moved = tensor.to(dtype)
                                stats.copied_bytes += moved.nbytes if moved is not tensor else 0
                            if device.type != "cpu":
                                moved = moved.to(device)
                            stats.bytes += tensor.nbytes
                            before = position
                        del tensor
                        yield name, moved
                    self._check_open()
            finally:
                batches.close()  # type: ignore[attr-defined]  # a generator: stops reading at once

    def _stream_shared(
        self,
        rank: int | None,
        device: torch.device,
        include: Patterns,
        exclude: Patterns,
        stats: LoadStats,
        progress: ProgressCallback | None,
        window: int,
        node: NodeGroup,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        from rdmaload.node_share import SharedRead, meet

        self._check_open()
        weights = self._weights_of(rank)
        selection, names = self._select(weights, include, exclude)
        total = sum(weights.specs[position].nbytes for position in selection)
        options = self._connector.options
        host_memory.require(min(window, total), limit=options.max_host_bytes, url=self.url)
        report = self._load_report(stats, progress)
        tick = report.expect(total, self._files_of(weights, selection))
        identity = [self.generation, [(file.path, file.size, file.etag) for file in self._index.files]]
        try:
            shared = meet(
                SharedRead(
                    self._reader,
                    weights,
                    selection,
                    window,
                    node,
                    self.url,
                    identity,
                    options.inactivity_timeout,
                    stats,
                )
            )
        except LoadTimeoutError as error:  # correct all the same, and slower: not a reason to fail
            stats.fallback_reason = f"every member reads for itself: {error}"
            _log.warning("%s", stats.fallback_reason)
            alone = self.weight_iterator(
                rank,
                device=device,
                include=include,
                exclude=exclude,
                window_bytes=window,
                stats=stats,
                progress=progress,
            )
            yield from alone
            return
        finished: set[str] = set()
        file = ""
        with report:
            try:
                for position, tensor in shared:
                    if weights.specs[position].file != file:
                        finished |= {file} - {""}
                        file = weights.specs[position].file
                    moved = tensor if device.type == "cpu" else tensor.to(device)
                    stats.bytes += tensor.nbytes
                    for name in names[position]:
                        yield name, moved
                    if tick is not None:
                        tick(stats.bytes, finished)
                    self._check_open()
            finally:
                shared.close()  # type: ignore[attr-defined]  # a generator: tells the others at once

    def _stream_to_gpu(
        self,
        rank: int | None,
        device: torch.device,
        dtype: torch.dtype | None,
        include: Patterns,
        exclude: Patterns,
        stats: LoadStats,
        progress: ProgressCallback | None,
        window: int | None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """As `_stream`, into GPU memory. Without a window all is read at once, unless `dtype` converts it in parts."""
        self._check_open()
        weights = self._weights_of(rank)
        selection, names = self._select(weights, include, exclude)
        total = sum(weights.specs[position].nbytes for position in selection)
        road = self.road_to(device.index, stats, total)
        if road is None:  # a torch that calls another maker's GPUs "cuda"
            fallback = self._window(None) if window is None else window
            yield from self._stream(rank, device, dtype, include, exclude, stats, progress, fallback, False)
            return
        with self._load_report(stats, progress) as report:
            tensors = stream_to_gpu(
                self._reader,
                weights,
                selection,
                names,
                road=road,
                dtype=dtype,
                window=window,
                host_window=self._window(None),
                stats=stats,
                tick=report.expect(total, self._files_of(weights, selection)),
            )
            try:
                for name, tensor in tensors:
                    yield name, tensor
                    self._check_open()
            finally:
                tensors.close()  # type: ignore[attr-defined]  # a generator: stops reading at once

    def road_to(self, ordinal: int, stats: LoadStats, expected_bytes: int) -> DeviceRoad | None:
        """The road to the memory of a GPU; None, with the reason in `stats`, when there is none."""
        return open_road(
            self._reader.transport(),
            ordinal,
            self._connector.options,
            stats,
            read_bytes=self._reader.read_bytes,
            expected_bytes=expected_bytes,
        )

    def load_into(
        self,
        target: nn.Module | Mapping[str, torch.Tensor],
        *,
        rank: int | None = None,
        strict: bool = True,
        cast: bool = False,
        include: Patterns = None,
        exclude: Patterns = None,
        stats: LoadStats | None = None,
        progress: ProgressCallback | None = None,
    ) -> LoadStats:
        """Fill existing tensors: a module's parameters and buffers, or a mapping's values, in place.

        Contiguous host tensors of the stored dtype are written directly; the others through a bounded buffer. With
        `strict`, the names must be the same on both sides (a target tied to a loaded one counts as loaded). Everything
        is checked before anything is read: LayoutMismatchError for names and shapes, TypeError for a dtype that needs
        `cast=True`. A failure while reading is PartialLoadError, whose `.loaded` names the complete tensors.
        """
        from rdmaload.fill import Filling
        from rdmaload.targets import Targets

        self._check_open()
        stats = self.stats_for(stats)
        with self._load_report(stats, progress) as report:
            weights = self._weights_of(rank)
            selection, names = self._select(weights, include, exclude)
            wanted = {name: weights.specs[position] for position in selection for name in names[position]}
            targets = Targets(target, wanted, self.url)
            targets.check_names(strict=strict, filtered=include is not None or exclude is not None)
            filling = Filling(weights, {position: names[position] for position in selection}, targets, cast=cast)
            try:
                filling.run(self._reader, stats, report, self._window(None), self.road_to)
            except RdmaloadError as error:
                # Of a file that is not what the store says, any tensor may be the wrong one.
                wrong = error.key if isinstance(error, IntegrityError) else None
                loaded = [name for name in filling.loaded if wrong is None or wanted[name].file != wrong]
                raise PartialLoadError(
                    f"{self.url}: {len(loaded)} of {len(wanted)} tensors were loaded, then: {error}",
                    url=self.url,
                    key=error.key,
                    loaded=loaded,
                ) from error
        return stats

    def pull_files(
        self,
        target: str | Path | None = None,
        *,
        allow_pattern: Patterns = None,
        ignore_pattern: Patterns = None,
        stats: LoadStats | None = None,
        progress: ProgressCallback | None = None,
    ) -> Path:
        """Copy files into the directory `target` (default: a new temporary one, the caller's to remove); returns it.

        Patterns are fnmatch on the path; without `allow_pattern` all files but weights are copied. Each file appears
        whole, verified, or not at all. Raises NotFoundError when `allow_pattern` matches nothing. Tensors in SGLang's
        layout are copied value by value, with a warning: `save(url, directory)` makes weight files of them.
        """
        from rdmaload.pull import blocks_of, check_weights, pull

        self._check_open()
        allow, ignore = as_patterns(allow_pattern), as_patterns(ignore_pattern)
        chosen = [
            (position, file)
            for position, file in enumerate(self._index.files)
            if (allow is not None or not has_weight_suffix(file.path)) and is_selected(file.path, allow, ignore)
        ]
        check_weights(self._index, chosen, allow, "DIR" if target is None else str(target), self.url)
        if allow is not None and not chosen:
            raise NotFoundError(f"{self.url} has no file that matches {', '.join(allow)}", url=self.url)
        directory = Path(tempfile.mkdtemp(prefix="rdmaload-") if target is None else target)
        stats = self.stats_for(stats)
        with Report("pull", stats, progress) as report:
            total = sum(file.size for _, file in chosen)
            tick = report.expect(total, len(chosen))
            pull(blocks_of(self._reader, self._index, chosen, stats, tick), directory)
            stats.bytes = total
        return directory

    def verify(self, *, stats: LoadStats | None = None, progress: ProgressCallback | None = None) -> LoadStats:
        """Read every chunk of every file and compare its checksum; nothing is kept. Raises IntegrityError.

        `stats.unverified_bytes` says how much has no checksum to compare with.
        """
        from rdmaload.pull import blocks_of

        self._check_open()
        stats = self.stats_for(stats)
        files = list(enumerate(self._index.files))
        with Report("verify", stats, progress) as report:
            tick = report.expect(self._index.total_bytes, len(files))
            for _, blocks in blocks_of(self._reader, self._index, files, stats, tick):
                for block in blocks:
                    stats.bytes += len(block)
        return stats

    def _select(self, weights: RankTensors, include: Patterns, exclude: Patterns) -> tuple[Sequence[int], Names]:
        selection, names = weights.select(include, exclude)
        self._reader.require_whole(lambda: weights.read_of(selection))
        return selection, names

    def _weights_of(self, rank: int | None) -> RankTensors:
        self._check_open()
        world_size = self.world_size
        if self.kind == "sharded":
            if rank is None:
                if world_size != 1:
                    raise LayoutMismatchError(
                        f"{self.url} is sharded over {world_size} ranks: say which one with rank=", url=self.url
                    )
                rank = 0
            if not 0 <= rank < world_size:
                raise LayoutMismatchError(
                    f"{self.url} is sharded over {world_size} ranks: there is no rank {rank}", url=self.url
                )
        else:
            rank = None
        if rank not in self._weights:
            files = [
                (position, file)
                for position, file in enumerate(self._index.files)
                if file.header is not None and (rank is None or file.rank in (None, rank))
            ]
            if not files:
                raise NotFoundError(
                    f"{self.url} has no weight files (*.safetensors) to load; convert other formats first",
                    url=self.url,
                )
            self._weights[rank] = RankTensors(files, self.url)
        return self._weights[rank]

"""A model in a store, opened: what it holds, and the ways to get it.

    with rdmaload.open("redis://127.0.0.1:6379/llama") as model:
        model.pull_files("config/", allow_pattern=["*.json", "tokenizer*"])
        for name, tensor in model.weight_iterator():
            ...
"""

from __future__ import annotations

import atexit
import fnmatch
import hashlib
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING

from rdmaload import _core, host_memory
from rdmaload.connectors.connector import Connector, FileConnector, KeyValueConnector
from rdmaload.connectors.registry import connector_for
from rdmaload.errors import (
    FormatError,
    IntegrityError,
    LayoutMismatchError,
    NotFoundError,
    NotSupportedError,
    PartialLoadError,
    RdmaloadError,
    StaleGenerationError,
    UnavailableError,
)
from rdmaload.index import Index, IndexFile, index_key, index_of_files
from rdmaload.manifest import Manifest, manifest_key
from rdmaload.options import Options
from rdmaload.reader import Batch, StoreReader, Tick
from rdmaload.stats import LoadStats, Progress
from rdmaload.tensors import TensorSpec, export_tensor, import_target, torch_dtype
from rdmaload.weights import has_weight_suffix

if TYPE_CHECKING:
    import torch
    from torch import nn
    from typing_extensions import Self

__all__ = ["Model", "load", "load_into", "open", "pull_files", "weight_iterator"]

Patterns = str | Sequence[str] | None
ProgressCallback = Callable[[Progress], None]

# A window is read in this many parts, so that reading goes on while the first is consumed.
_WINDOW_PARTS = 4
_PULL_WINDOW_BYTES = 128 << 20  # files are written as they come
_PULL_BLOCK_BYTES = 16 << 20

_open_models: weakref.WeakSet[Model] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Threads that call into Python must be gone before the interpreter is."""
    for model in list(_open_models):
        model.close()


def _patterns(patterns: Patterns) -> list[str] | None:
    if patterns is None:
        return None
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _selected(name: str, include: list[str] | None, exclude: list[str] | None) -> bool:
    if include is not None and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
        return False
    return exclude is None or not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)


class _Weights:
    """The tensors of the files that one rank reads: the native index, and the same by name."""

    def __init__(self, files: Sequence[tuple[int, IndexFile]], url: str) -> None:
        self.native = _core.TensorIndex()
        self.tied: dict[str, str] = {}  # alias: stored name
        by_position = dict(files)
        for position, file in files:
            assert file.header is not None
            self.native.add_file(position, file.path, file.size, file.header)
            self.tied.update(file.tied)
        self.specs: list[TensorSpec] = []
        self.position: dict[str, int] = {}
        for name, dtype, shape, position, nbytes in self.native.tensors():
            file = by_position[position]
            if name in self.position:
                first = self.specs[self.position[name]].file
                raise FormatError(
                    f"{url}: tensor {name} is in {first} and in {file.path}; a *.safetensors.index.json would say "
                    "which file counts",
                    url=url,
                    key=file.path,
                )
            self.position[name] = len(self.specs)
            self.specs.append(TensorSpec(name, dtype, shape, file.path, nbytes))
        for alias, name in self.tied.items():
            if name not in self.position or alias in self.position:
                raise FormatError(f"{url}: tied name {alias} does not stand for a stored tensor ({name})", url=url)

    def select(self, include: Patterns, exclude: Patterns) -> tuple[list[int], dict[int, list[str]]]:
        """Positions to read in file order, and the names that each is delivered under."""
        include, exclude = _patterns(include), _patterns(exclude)
        names: dict[int, list[str]] = {}
        for position, spec in enumerate(self.specs):
            if _selected(spec.name, include, exclude):
                names.setdefault(position, []).append(spec.name)
        for alias, name in self.tied.items():
            if _selected(alias, include, exclude):
                names.setdefault(self.position[name], []).append(alias)
        return sorted(names), names


class _Report:
    """Times one operation, fills its stats and calls its progress callback."""

    def __init__(self, operation: str, stats: LoadStats, progress: ProgressCallback | None, files: int) -> None:
        self.stats = stats
        self._operation = operation
        self._progress = progress
        self._files = files
        self._total = 0
        self._begin = time.perf_counter()

    def expect(self, nbytes: int) -> Tick | None:
        """From now on `nbytes` are to be read; the tick that reports them, if anybody listens."""
        self._total = nbytes
        return self.tick if self._progress is not None else None

    def tick(self, done: int) -> None:
        if self._progress is None:
            return
        finished = self._files if done >= self._total else 0
        seconds = time.perf_counter() - self._begin
        self._progress(Progress(self._operation, done, self._total, finished, self._files, seconds))

    def stage(self, name: str, begin: float) -> None:
        self.stats.stages[name] = self.stats.stages.get(name, 0.0) + time.perf_counter() - begin

    def end(self) -> None:
        self.stats.seconds = time.perf_counter() - self._begin


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
        self._weights: dict[int | None, _Weights] = {}
        self.stats = LoadStats()
        """What the last finished load, iteration or pull took."""
        self._manifest: Manifest | None = None
        if isinstance(connector, KeyValueConnector):
            self._manifest, self._index = _resolve(connector)
        elif isinstance(connector, FileConnector):
            if connector.options.generation is not None:
                raise NotSupportedError(f"{connector.url} keeps plain files, which have no generations", connector.url)
            self._index = index_of_files(connector)
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
    def kind(self) -> str:
        """"checkpoint" (every rank reads all of it) or "sharded" (each rank has its own files)."""
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
    def manifest(self) -> Manifest | None:
        """What the writer said of the model; None for a store of plain files."""
        return self._manifest

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
        names give one tensor. Raises LayoutMismatchError, IntegrityError, NotFoundError, StaleGenerationError,
        UnavailableError, LoadTimeoutError, MemoryLimitError.
        """
        if dtype is not None or str(device) != "cpu":
            streamed = self._stream(
                rank, device, dtype, include, exclude, self.stats_for(stats), progress, "load", self._window(None), False
            )
            return dict(streamed)
        self._check_open()
        stats = self.stats_for(stats)
        weights = self._weights_of(rank)
        report = _Report("load", stats, progress, len(self._index.files))
        stats.stages["open"] = self._open_seconds
        begin = time.perf_counter()
        selection, names = weights.select(include, exclude)
        plan = self._reader.plan(weights.native, selection)
        report.stage("plan", begin)
        host_memory.require(
            sum(plan.region_bytes), limit=self._connector.options.max_host_bytes, url=self._connector.url
        )
        arenas = [_core.HostArena(nbytes) for nbytes in plan.region_bytes]
        try:
            batch = self._reader.start(plan, arenas)
            self._reader.finish(batch, stats, report.expect(plan.read_bytes))
            begin = time.perf_counter()
            tensors = dict(_tensors_of(batch, weights, names))
            report.stage("export", begin)
            stats.bytes = plan.wanted_bytes
        finally:
            report.end()
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
        stats: LoadStats | None = None,
        progress: ProgressCallback | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors as they arrive, in the order file, then offset.

        At most `window_bytes` (default: the option of that name) are read ahead and not yet yielded; a larger tensor
        is read alone. Yielded tensors are the caller's. With `borrow=True` they are valid only until the iterator is
        asked for the next one, and memory is used again: copy what you keep. Raises as `load` does.
        """
        window = self._window(window_bytes)
        self._weights_of(rank)  # errors of layout come from this call, not from the first next()
        return self._stream(
            rank, device, None, include, exclude, self.stats_for(stats), progress, "load", window, borrow
        )

    def stats_for(self, stats: LoadStats | None) -> LoadStats:
        """The object that an operation fills: the caller's, and the one that `stats` shows, are the same."""
        self.stats = LoadStats() if stats is None else stats
        return self.stats

    def _window(self, window_bytes: int | None) -> int:
        self._check_open()
        options = self._connector.options
        window = options.window_bytes if window_bytes is None else window_bytes
        if window < 1:
            raise ValueError(f"window_bytes must be positive, not {window}")
        return window if options.max_host_bytes is None else min(window, options.max_host_bytes)

    def _stream(
        self,
        rank: int | None,
        device: str | torch.device,
        dtype: torch.dtype | None,
        include: Patterns,
        exclude: Patterns,
        stats: LoadStats,
        progress: ProgressCallback | None,
        operation: str,
        window: int,
        borrow: bool,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        self._check_open()
        weights = self._weights_of(rank)
        report = _Report(operation, stats, progress, len(self._index.files))
        stats.stages["open"] = self._open_seconds
        selection, names = weights.select(include, exclude)
        parts = _parts(selection, [weights.specs[i].nbytes for i in selection], max(1, window // _WINDOW_PARTS))
        plans = (self._reader.plan(weights.native, part) for part in parts)
        total = sum(weights.specs[position].nbytes for position in selection)
        limit = self._connector.options.max_host_bytes
        largest = max((weights.specs[position].nbytes for position in selection), default=0)
        host_memory.require(max(largest, min(window, total)), limit=limit, url=self._connector.url)
        batches = self._reader.stream(
            plans, window_bytes=window, stats=stats, tick=report.expect(total), reuse=borrow
        )
        try:
            for batch in batches:
                for name, tensor in _tensors_of(batch, weights, names):
                    moved = tensor
                    if dtype is not None and tensor.is_floating_point():
                        moved = tensor.to(dtype)
                    if str(device) != "cpu":
                        moved = moved.to(device)
                    stats.bytes += tensor.nbytes
                    del tensor
                    yield name, moved
                self._check_open()
        finally:
            batches.close()  # type: ignore[attr-defined]  # a generator: stops reading at once
            report.end()

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
        from rdmaload.targets import Targets

        self._check_open()
        stats = self.stats_for(stats)
        weights = self._weights_of(rank)
        report = _Report("load", stats, progress, len(self._index.files))
        stats.stages["open"] = self._open_seconds
        selection, names = weights.select(include, exclude)
        wanted = [(position, name) for position in selection for name in names[position]]
        targets = Targets(target, {name: weights.specs[position] for position, name in wanted}, self.url)
        filtered = include is not None or exclude is not None
        targets.check_names(strict=strict, filtered=filtered)
        plan_of: list[tuple[int, str]] = []
        staged: dict[int, list[str]] = {}
        taken: set[int] = set()
        for position, name in wanted:
            if name not in targets:
                continue
            if position not in taken and targets.direct(name, cast=cast):
                plan_of.append((position, name))
                taken.add(position)
            elif not targets.is_same_memory(name, [other for p, other in plan_of if p == position]):
                staged.setdefault(position, []).append(name)
        loaded: list[str] = []
        try:
            plan = self._reader.plan(weights.native, [position for position, _ in plan_of], into_tensors=True)
            destinations = [import_target(name, targets[name], weights.specs[p].nbytes) for p, name in plan_of]
            tick = report.expect(plan.read_bytes + sum(weights.specs[position].nbytes for position in staged))
            batch = self._reader.start(plan, destinations)
            try:
                self._reader.finish(batch, stats, tick)
            finally:
                unfinished = set(batch.operation.unfinished_regions())
                loaded += [name for i, (_, name) in enumerate(plan_of) if i not in unfinished]
            stats.bytes += plan.wanted_bytes
            loaded += self._load_staged(staged, weights, targets, stats)
        except RdmaloadError as error:
            raise PartialLoadError(
                f"{self.url}: {len(loaded)} of {len(wanted)} tensors were loaded, then: {error}",
                url=self.url,
                key=error.key,
                loaded=loaded,
            ) from error
        finally:
            report.end()
        return stats

    def _load_staged(
        self, staged: Mapping[int, list[str]], weights: _Weights, targets: Mapping[str, torch.Tensor], stats: LoadStats
    ) -> list[str]:
        import torch

        loaded = []
        selection = sorted(staged)
        window = self._window(None)
        parts = _parts(selection, [weights.specs[i].nbytes for i in selection], max(1, window // _WINDOW_PARTS))
        plans = (self._reader.plan(weights.native, part) for part in parts)
        for batch in self._reader.stream(plans, window_bytes=window, stats=stats, reuse=True):
            for position, name, tensor in _placed_tensors(batch, weights, staged):
                with torch.no_grad():
                    targets[name].copy_(tensor)
                loaded.append(name)
                stats.bytes += weights.specs[position].nbytes
                stats.copied_bytes += weights.specs[position].nbytes
        return loaded

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
        whole, verified, or not at all. Raises NotFoundError when `allow_pattern` matches nothing.
        """
        from rdmaload.pull import pull

        self._check_open()
        allow, ignore = _patterns(allow_pattern), _patterns(ignore_pattern)
        chosen = [
            (position, file)
            for position, file in enumerate(self._index.files)
            if (allow is not None or not has_weight_suffix(file.path)) and _selected(file.path, allow, ignore)
        ]
        if allow is not None and not chosen:
            raise NotFoundError(f"{self.url} has no file that matches {', '.join(allow)}", url=self.url)
        directory = Path(tempfile.mkdtemp(prefix="rdmaload-") if target is None else target)
        stats = self.stats_for(stats)
        report = _Report("pull", stats, progress, len(chosen))
        try:
            total = sum(file.size for _, file in chosen)
            pull(self._blocks(chosen, stats, report.expect(total)), directory)
            stats.bytes = total
        finally:
            report.end()
        return directory

    def verify(
        self, *, stats: LoadStats | None = None, progress: ProgressCallback | None = None
    ) -> LoadStats:
        """Read every chunk of every file and compare its checksum; nothing is kept. Raises IntegrityError.

        `stats.unverified_bytes` says how much has no checksum to compare with.
        """
        self._check_open()
        stats = self.stats_for(stats)
        files = list(enumerate(self._index.files))
        report = _Report("verify", stats, progress, len(files))
        try:
            for _, blocks in self._blocks(files, stats, report.expect(self._index.total_bytes)):
                for block in blocks:
                    stats.bytes += len(block)
        finally:
            report.end()
        return stats

    def _blocks(
        self, files: Sequence[tuple[int, IndexFile]], stats: LoadStats, tick: Tick | None
    ) -> Iterator[tuple[IndexFile, Iterator[memoryview]]]:
        """Each file with its content in blocks; a block is valid until the next is asked for."""
        done_before = 0
        for position, file in files:
            native = _core.TensorIndex()
            native.add_blocks(position, file.size, self._block_bytes())
            plans = (self._reader.plan(native, [block]) for block in range(len(native)))
            tick_of = None if tick is None else (lambda done, before=done_before: tick(before + done))
            batches = self._reader.stream(
                plans, window_bytes=_PULL_WINDOW_BYTES, stats=stats, tick=tick_of, reuse=True
            )
            yield file, (memoryview(batch.destinations[0])[: batch.plan.wanted_bytes] for batch in batches)
            done_before += file.size

    def _block_bytes(self) -> int:
        # Whole chunks, so that no chunk is read for two blocks.
        chunk = self._index.chunk_bytes or 1
        return max(1, _PULL_BLOCK_BYTES // chunk) * chunk

    def _weights_of(self, rank: int | None) -> _Weights:
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
            self._weights[rank] = _Weights(files, self.url)
        return self._weights[rank]


def _resolve(connector: KeyValueConnector) -> tuple[Manifest, Index]:
    """The manifest and index to read: two round trips, one more when a pinned generation was replaced."""
    options, model, url = connector.options, connector.model, connector.url
    for attempt in range(2):
        key = manifest_key(model)
        value = connector.get(key)
        if value is None:
            raise NotFoundError(f"there is no model at {url} (no key {key}); see `rdmaload ls`", url=url, key=key)
        manifest = Manifest.decode(value, url=url, key=key)
        pinned = options.generation
        if pinned is not None and manifest.generation != pinned:
            published = manifest.generation
            key = manifest_key(f"{model}/chunks/{pinned}")
            value = connector.get(key)
            if value is None:
                raise StaleGenerationError(
                    f"{url}: generation {pinned} is gone; generation {published} has replaced it. Every rank must "
                    "start again from the new one",
                    url=url,
                    key=key,
                )
            manifest = Manifest.decode(value, url=url, key=key)
        digest = hashlib.sha256(value).hexdigest()
        if options.manifest_sha256 is not None and digest != options.manifest_sha256:
            raise IntegrityError(
                f"{url}: the manifest has SHA-256 {digest}, manifest_sha256= asks for {options.manifest_sha256}: it is "
                "another model or was tampered with",
                url=url,
                key=key,
            )
        key = index_key(model, manifest.generation)
        encoded = connector.get(key)
        if encoded is None:
            if attempt == 0:  # replaced and pruned between the two reads: look once more
                continue
            raise NotFoundError(
                f"{url}: the manifest names generation {manifest.generation}, whose index {key} is gone: evicted or "
                "deleted by hand; save the model again",
                url=url,
                key=key,
            )
        if len(encoded) != manifest.index_bytes or f"{_core.crc32c(encoded):08x}" != manifest.index_crc32c:
            raise IntegrityError(
                f"{url}: index {key} differs from what the manifest says ({len(encoded)} bytes, CRC32C "
                f"{_core.crc32c(encoded):08x}; expected {manifest.index_bytes}, {manifest.index_crc32c}): save the "
                "model again",
                url=url,
                key=key,
            )
        return manifest, Index.decode(encoded)
    raise AssertionError("unreachable")


def _parts(selection: Sequence[int], sizes: Sequence[int], part_bytes: int) -> Iterator[list[int]]:
    """Runs of the selection of at most `part_bytes` together; a larger tensor is a run of its own."""
    part: list[int] = []
    total = 0
    for position, nbytes in zip(selection, sizes, strict=True):
        if part and total + nbytes > part_bytes:
            yield part
            part, total = [], 0
        part.append(position)
        total += nbytes
    if part:
        yield part


def _placed_tensors(
    batch: Batch, weights: _Weights, names: Mapping[int, list[str]]
) -> Iterator[tuple[int, str, torch.Tensor]]:
    for position, region, offset in batch.plan.placements():
        spec = weights.specs[position]
        arena = batch.destinations[region]
        assert isinstance(arena, _core.HostArena)
        tensor = export_tensor(spec, arena, offset)
        for name in names[position]:
            yield position, name, tensor


def _tensors_of(
    batch: Batch, weights: _Weights, names: Mapping[int, list[str]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for _, name, tensor in _placed_tensors(batch, weights, names):
        yield name, tensor


def open(url: str | Path, *, options: Options | None = None, **opts: object) -> Model:
    """Open the model at `url`; keywords are options (see docs/settings.md).

    Raises UrlError, AuthenticationError, NotFoundError, UnavailableError, IntegrityError, FormatError.
    """
    connector = connector_for(url, options, **opts)
    try:
        return Model(connector, owns_connector=True)
    except BaseException:
        connector.close()
        raise


def load(
    url: str | Path,
    *,
    rank: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    stats: LoadStats | None = None,
    progress: ProgressCallback | None = None,
    options: Options | None = None,
    **opts: object,
) -> dict[str, torch.Tensor]:
    """`open(url).load(...)`: a dict of tensors that own their memory."""
    with open(url, options=options, **opts) as model:
        return model.load(
            rank=rank, device=device, dtype=dtype, include=include, exclude=exclude, stats=stats, progress=progress
        )


def weight_iterator(
    url: str | Path,
    rank: int | None = None,
    *,
    device: str | torch.device = "cpu",
    include: Patterns = None,
    exclude: Patterns = None,
    borrow: bool = False,
    stats: LoadStats | None = None,
    options: Options | None = None,
    **opts: object,
) -> Iterator[tuple[str, torch.Tensor]]:
    """`open(url).weight_iterator(...)`, closed at the end. `window_bytes` is an option like any other."""
    with open(url, options=options, **opts) as model:
        yield from model.weight_iterator(
            rank, device=device, include=include, exclude=exclude, borrow=borrow, stats=stats
        )


def load_into(
    target: nn.Module | Mapping[str, torch.Tensor],
    url: str | Path,
    *,
    rank: int | None = None,
    strict: bool = True,
    cast: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
    stats: LoadStats | None = None,
    progress: ProgressCallback | None = None,
    options: Options | None = None,
    **opts: object,
) -> LoadStats:
    """`open(url).load_into(target, ...)`."""
    with open(url, options=options, **opts) as model:
        return model.load_into(
            target,
            rank=rank,
            strict=strict,
            cast=cast,
            include=include,
            exclude=exclude,
            stats=stats,
            progress=progress,
        )


def pull_files(
    url: str | Path,
    target: str | Path | None = None,
    *,
    allow_pattern: Patterns = None,
    ignore_pattern: Patterns = None,
    stats: LoadStats | None = None,
    progress: ProgressCallback | None = None,
    options: Options | None = None,
    **opts: object,
) -> Path:
    """`open(url).pull_files(target, ...)`."""
    with open(url, options=options, **opts) as model:
        return model.pull_files(
            target, allow_pattern=allow_pattern, ignore_pattern=ignore_pattern, stats=stats, progress=progress
        )

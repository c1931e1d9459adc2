"""Configuration and tokenizer files of models, kept in directories for engines that want a directory.

    model = resolve_model("redis://10.0.0.5/llama")
    model.directory     all its files but weights
    model.url           the same url with the generation pinned: what every other process and rank must use

A directory belongs to one generation of one model and never changes once it is there: it is filled beside its place and
renamed. Two locks (flock, which end with their process) go with it: `KEY.pull` while one process fills or removes it,
`KEY.use`, shared, as long as a process lives that was given it. What nobody uses is removed a week after its last use,
the oldest first when there are more than 64.

Of a checkpoint's weight files only the safetensors headers are there, under their names. Engines read them to learn
which tensors a checkpoint has (a separate lm_head, layers that were not quantised). Whoever takes such a file for the
weights gets an error of safetensors ("incomplete metadata"), not wrong numbers.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rdmaload import loading
from rdmaload.errors import LoadTimeoutError
from rdmaload.index import IndexFile
from rdmaload.model import Model
from rdmaload.urls import parse_url, with_option

__all__ = ["EngineModel", "cache_root", "header_file", "release", "resolve_model", "write_kept_headers"]

_log = logging.getLogger("rdmaload")

HEADERS_DIRECTORY = "rdmaload-headers"
"""Where a model that was sharded by an engine keeps the headers of the checkpoint that it was made from."""

_HEADER_SUFFIX = ".header"
_KEEP_SECONDS = 7 * 86400.0
_KEEP_ENTRIES = 64  # a few MB each
_PULL_SECONDS = 600.0  # for another process to pull some MB, with a store that is slow to answer
_POLL_SECONDS = 0.05

_lock = threading.Lock()
_used: dict[Path, int] = {}  # Guarded by _lock: descriptors whose shared lock keeps a directory.


@dataclass(frozen=True)
class EngineModel:
    """A model as an engine needs it, resolved once for all processes."""

    url: str = field(repr=False)
    """Pins the generation where the store has one. May hold secrets."""
    shown: str
    """The same without secrets."""
    directory: Path
    kind: str
    world_size: int
    store_layout: str
    layout: Mapping[str, int]
    identity: Mapping[str, str]


def cache_root() -> Path:
    """Where the directories are: RDMALOAD_CACHE_DIR, else rdmaload/ in XDG_CACHE_HOME or ~/.cache; else a new
    temporary directory, when that place cannot be written or others can write to it."""
    given = os.environ.get("RDMALOAD_CACHE_DIR")
    root = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdmaload"
    root = root / "engines"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.stat()
        # Models may come with code that an engine runs when it is told to trust it.
        if status.st_uid == os.geteuid() and not status.st_mode & 0o022 and os.access(root, os.W_OK):
            return root
        problem = "others may write to it"
    except OSError as error:
        problem = str(error.strerror)
    return _fallback_root(root, problem)


@functools.cache
def _fallback_root(root: Path, problem: str) -> Path:
    """One for the whole process: an engine resolves a model again and expects the directory that it was given."""
    fallback = Path(tempfile.mkdtemp(prefix="rdmaload-engines-"))
    _log.warning("%s cannot be used (%s): files of models go to %s, which nothing cleans up", root, problem, fallback)
    return fallback


def resolve_model(url: str, *, root: Path | None = None, weights: bool = False, **opts: object) -> EngineModel:
    """Pin the generation that `url` means now and bring the model's files, weights excepted, into a directory.

    With `weights` it is a whole copy, for models as small as adapters.

    Raises what `open` and `pull_files` raise, and LoadTimeoutError when another process that pulls does not finish.
    """
    with loading.open(url, **opts) as model:  # type: ignore[arg-type]  # names of Options, checked there
        location = parse_url(url)
        pinned, shown = location.text, location.redacted
        if model.generation is not None and "generation" not in location.query:
            pinned = with_option(location, "generation", model.generation)
            shown = parse_url(pinned).redacted
        key = hashlib.sha256("\n".join([_without_generation(location.redacted), *_version(model)]).encode())
        name = key.hexdigest()[:32] + ("-whole" if weights else "")
        directory = _directory(cache_root() if root is None else root, name, model)
        manifest = model.manifest
        return EngineModel(
            url=pinned,
            shown=shown,
            directory=directory,
            kind=model.kind,
            world_size=model.world_size,
            store_layout=model.store_layout,
            layout={} if manifest is None else dict(manifest.layout),
            identity={} if manifest is None else dict(manifest.identity),
        )


def release() -> None:
    """Let go of every directory that this process was given: others may then remove them."""
    with _lock:
        for descriptor in _used.values():
            os.close(descriptor)
        _used.clear()


def _without_generation(url: str) -> str:
    """So that a pinned url and the one that it was made from have one directory."""
    start, _, query = url.partition("?")
    return "&".join([start, *(item for item in query.split("&") if item and not item.startswith("generation="))])


def _version(model: Model) -> list[str]:
    """What changes when the model does."""
    if model.generation is not None:
        return [model.generation]
    return [f"{file.path} {file.size} {file.etag or ''}" for file in model.files]


def _directory(root: Path, key: str, model: Model) -> Path:
    directory = root / key
    with _lock:
        held = directory in _used
    if not held:
        descriptor = _acquire(root / f"{key}.use", fcntl.LOCK_SH, model.url)
        with _lock:
            if directory in _used:
                os.close(descriptor)  # another thread was first
            else:
                _used[directory] = descriptor
    os.utime(root / f"{key}.use")
    if not directory.is_dir():
        with _locked(root / f"{key}.pull", model.url):
            if not directory.is_dir():
                _fill(directory, model)
    _clean_up(root)
    return directory


def _fill(directory: Path, model: Model) -> None:
    for leftover in directory.parent.glob(f"{directory.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{directory.name}.partial-", dir=directory.parent))
    try:
        if directory.name.endswith("-whole"):
            model.pull_files(partial, allow_pattern="*")
        else:
            model.pull_files(partial)
            _write_headers(partial, model)
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_headers(directory: Path, model: Model) -> None:
    for file in model.files:
        if model.kind == "checkpoint" and file.header is not None and file.tensor is None and "/" not in file.path:
            (directory / file.path).write_bytes(header_file(file))
    kept = directory / HEADERS_DIRECTORY
    for header in sorted(kept.glob(f"*{_HEADER_SUFFIX}")) if kept.is_dir() else ():
        header.rename(directory / header.name.removesuffix(_HEADER_SUFFIX))


def header_file(file: IndexFile) -> bytes:
    """A weight file cut off after its header."""
    assert file.header is not None
    return len(file.header).to_bytes(8, "little") + file.header


def _clean_up(root: Path) -> None:
    """Remove what no process uses: directories that are old or too many, and what pulls that died have left."""
    with contextlib.suppress(OSError):
        entries = sorted(root.glob("*.use"), key=lambda path: path.stat().st_mtime, reverse=True)
        limit = time.time() - _KEEP_SECONDS
        for place, use in enumerate(entries):
            with contextlib.suppress(OSError):
                if place >= _KEEP_ENTRIES or use.stat().st_mtime < limit:
                    _remove(root, use.name.removesuffix(".use"))


def _remove(root: Path, key: str) -> None:
    with contextlib.ExitStack() as stack:
        for name in (f"{key}.pull", f"{key}.use"):
            descriptor = _try_lock(root / name, fcntl.LOCK_EX)
            if descriptor is None:
                return  # in use
            stack.callback(os.close, descriptor)
        # Out of sight at once: a process that comes now makes a new one.
        for entry in (root / key, *root.glob(f"{key}.partial-*")):
            if entry.is_dir():
                doomed = Path(tempfile.mkdtemp(prefix="doomed-", dir=root))
                entry.rename(doomed / "entry")
                shutil.rmtree(doomed, ignore_errors=True)
        for name in (f"{key}.use", f"{key}.pull"):
            with contextlib.suppress(FileNotFoundError):
                (root / name).unlink()


@contextlib.contextmanager
def _locked(path: Path, url: str) -> Iterator[None]:
    descriptor = _acquire(path, fcntl.LOCK_EX, url)
    try:
        yield
    finally:
        os.close(descriptor)


def _acquire(path: Path, kind: int, url: str) -> int:
    deadline = time.monotonic() + _PULL_SECONDS
    while (descriptor := _try_lock(path, kind)) is None:
        if time.monotonic() > deadline:
            raise LoadTimeoutError(
                f"{url}: another process has been pulling its files for {_PULL_SECONDS:g} s ({path} is locked); end "
                "that process, or set RDMALOAD_CACHE_DIR to another directory",
                url=url,
            )
        time.sleep(_POLL_SECONDS)
    return descriptor


def _try_lock(path: Path, kind: int) -> int | None:
    """A descriptor that holds the lock; None when another process has it, or has just removed the file."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        here = os.stat(path)
        mine = os.fstat(descriptor)
        if (here.st_dev, here.st_ino) == (mine.st_dev, mine.st_ino):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def write_kept_headers(headers: Iterable[tuple[str, bytes]], directory: Path) -> None:
    """Write the headers of a checkpoint's weight files, by name, where a sharded model keeps them."""
    target = directory / HEADERS_DIRECTORY
    target.mkdir()
    for name, content in headers:
        (target / f"{name}{_HEADER_SUFFIX}").write_bytes(content)

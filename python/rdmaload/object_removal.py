"""Removes models, and what saves left of them, from an object store, where files lie beside their manifest."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from rdmaload.connectors.objects import ObjectConnector
from rdmaload.errors import NotFoundError, NotSupportedError
from rdmaload.file_manifest import FILE_MANIFEST, file_index_path
from rdmaload.index import Index
from rdmaload.manifest import Manifest

__all__ = ["RemovedObjects", "prune_objects", "remove_objects"]

_INDEX = re.compile(r"\.rdmaload/([0-9a-f]{32})/index")
_PART = re.compile(r"\.rdmaload/parts/([0-9a-f]{32})/[0-9]+")
_NOTE = re.compile(r"\.rdmaload/saving/[0-9a-f]{32}")

# What nobody has added to for so long is not of a save that is alive, whatever grace is asked for: a save notes each
# file when it ends, and the upload of one file takes minutes.
_SAVE_SECONDS = 120.0
_UPLOAD_SECONDS = 3600.0


@dataclass
class RemovedObjects:
    """What `prune_objects` removed."""

    generations: int = 0
    saves: int = 0
    keys: int = 0
    waiting: int = 0


def prune_objects(connector: ObjectConnector, *, grace: float) -> RemovedObjects:
    """Remove indexes that the manifest does not name, what saves left, and uploads that nobody ended.

    `grace` is in seconds since each was written. Files are not removed: those of an older model went when they were
    replaced. Raises what reading a damaged manifest raises, before anything is removed.
    """
    value = connector.read_small(FILE_MANIFEST)
    published = None if value is None else Manifest.decode(value, url=connector.url, key=FILE_MANIFEST).generation
    now = time.time()
    removed = RemovedObjects()
    saves = set()
    for path, written in connector.list_kept():
        index, part = _INDEX.fullmatch(path), _PART.fullmatch(path)
        if index is not None and index.group(1) == published:
            continue
        if index is None and part is None and _NOTE.fullmatch(path) is None:
            continue  # the manifest, or something that a newer release keeps
        if written > now - (grace if index is not None else max(grace, _SAVE_SECONDS)):
            removed.waiting += index is not None
            continue
        removed.keys += connector.delete(path)
        removed.generations += index is not None
        if index is None:
            saves.add(path if part is None else part.group(1))
    removed.saves = len(saves) + connector.abort_uploads(now - max(grace, _UPLOAD_SECONDS))
    return removed


def remove_objects(connector: ObjectConnector) -> int:
    """Remove the manifest, the files that it names, and what saves left; how many objects.

    What has no manifest was put there by something else, and may be more than a model.
    """
    value = connector.read_small(FILE_MANIFEST)
    paths: list[str] = []
    if value is not None:
        generation = Manifest.decode(value, url=connector.url, key=FILE_MANIFEST).generation
        index = connector.read_small(file_index_path(generation))
        paths = [] if index is None else [file.path for file in Index.decode(index).files]
    removed = int(connector.delete(FILE_MANIFEST))
    kept = [path for path, _ in connector.list_kept() if path != FILE_MANIFEST]
    removed += sum(connector.delete(path) for path in [*paths, *kept])
    connector.abort_uploads(time.time() - _UPLOAD_SECONDS)
    if removed:
        return removed
    try:
        connector.list_files()
    except NotFoundError:
        raise NotFoundError(f"there is no model at {connector.url}.", url=connector.url) from None
    raise NotSupportedError(
        f"{connector.url} has files and no manifest, so that rdmaload did not save them: remove them with the store's "
        "own tools",
        url=connector.url,
    )

"""What the files of a model are called in `cache_dir`: the same name for the same bytes, another for any others."""

from __future__ import annotations

import hashlib

from rdmaload.connectors.connector import Connector, KeyValueConnector
from rdmaload.index import Index, IndexFile

__all__ = ["cache_entries"]


def cache_entries(
    connector: Connector, index: Index, generation: str | None, block_bytes: int
) -> tuple[list[tuple[str, str]], str]:
    """Name and description of each file in a cache, and why some are not kept ("" when all are).

    The version is part of both: the generation of a model in format 1, the strong ETag of a file. What has none gets
    no name, and the list is empty when nothing has one. No secret is in either. Files are kept in blocks of
    `block_bytes`, and those of another size are other files there.
    """
    place = connector.cache_identity()
    entries = [_entry(place, file, _version(connector, file, generation), block_bytes) for file in index.files]
    unnamed = sum(not name for name, _ in entries)
    if not unnamed:
        return entries, ""
    what = "values of SGLang's layout" if isinstance(connector, KeyValueConnector) else "files without a strong ETag"
    reason = f"cache_dir: {unnamed} {what} are not kept, because nothing tells one version of them from another"
    return (entries if unnamed < len(entries) else []), reason


def _version(connector: Connector, file: IndexFile, generation: str | None) -> str | None:
    if isinstance(connector, KeyValueConnector):
        return None if file.key is not None or generation is None else f"{generation}/{file.number}"
    # Strong as HTTP writes it, in quotes: a date, which some stores give instead, outlives a change within its second.
    strong = file.etag is not None and len(file.etag) > 2 and file.etag[0] == file.etag[-1] == '"'
    return file.etag if strong else None


def _entry(place: str, file: IndexFile, version: str | None, block_bytes: int) -> tuple[str, str]:
    if version is None:
        return "", ""
    description = f"{place}\n{file.path}\n{version}\n{file.size} {block_bytes}\n"
    return hashlib.sha256(description.encode()).hexdigest(), description

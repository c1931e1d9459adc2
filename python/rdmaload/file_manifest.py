"""The manifest and the index of a model in a store of plain files: beside them where there is one, else a listing."""

from __future__ import annotations

import hashlib
import logging

from rdmaload.connectors.connector import FileConnector
from rdmaload.connectors.objects import ObjectConnector
from rdmaload.errors import AuthenticationError, IntegrityError, NotFoundError, NotSupportedError, StaleGenerationError
from rdmaload.generations import check_digest
from rdmaload.index import Index, index_of_files
from rdmaload.manifest import Manifest

__all__ = ["FILE_MANIFEST", "file_index_path", "part_path", "resolve_files"]

_log = logging.getLogger("rdmaload")

FILE_MANIFEST = ".rdmaload/manifest"
"""Where the manifest lies beside the files of an object store."""


def file_index_path(generation: str) -> str:
    """Where the index of a generation lies beside the files of an object store."""
    return f".rdmaload/{generation}/index"


def part_path(save_id: str, rank: int) -> str:
    """Where a rank of a sharded save says what it has written; all of them together become the manifest."""
    return f".rdmaload/parts/{hashlib.sha256(save_id.encode()).hexdigest()[:32]}/{rank}"


def resolve_files(connector: FileConnector) -> tuple[Manifest | None, Index]:
    """The manifest and index beside a store's files; None and what a listing says where there is no manifest.

    The connector is pinned to the versions of the files that the index names, so that a file that was replaced is an
    error and not half of another model.
    """
    manifest = None
    connector.pin({})
    if connector.keeps_manifest:
        manifest, index = _manifest_and_index(connector)
    if manifest is None:
        if connector.options.generation is not None:
            raise NotSupportedError(f"{connector.url} keeps plain files, which have no generations", url=connector.url)
        if connector.options.manifest_sha256 is not None:
            raise NotSupportedError(
                f"{connector.url} has no manifest to compare with manifest_sha256", url=connector.url
            )
        index = index_of_files(connector)
    tags = {file.path: file.etag for file in index.files if file.etag is not None}
    if manifest is not None and index.crcs and connector.options.verify != "off" and tags:
        tags |= _vouched_for(connector, index)
    if tags:
        connector.pin(tags)
    return manifest, index


def _vouched_for(connector: FileConnector, index: Index) -> dict[str, str]:
    """The ETags that files have now where they are not those of the manifest, but the size is.

    So it is when a model was copied from bucket to bucket. Its checksums say whether these are the files that were
    saved: every chunk is compared, and the ETag is pinned for the length of the load only.
    """
    if not isinstance(connector, ObjectConnector) or not connector.pins_versions:
        return {}
    try:
        now = {info.path: info for info in connector.list_files()}
    except (AuthenticationError, NotFoundError) as err:  # who may read need not be let list
        _log.info("%s: files are pinned to the manifest's ETags, as they cannot be listed: %s", connector.url, err)
        return {}
    found = {}
    for file in index.files:
        info = now.get(file.path)
        if file.header is not None and info is not None and info.size != file.size:
            raise IntegrityError(
                f"{file.path} at {connector.url} differs from its manifest: it has {info.size} bytes, was saved with "
                f"{file.size}, and has been replaced by something else than rdmaload: save the model again (or, while "
                "a save of it runs, open it after that)",
                url=connector.url,
                key=file.path,
            )
        if file.etag and info is not None and info.etag and info.size == file.size and info.etag != file.etag:
            found[file.path] = info.etag
    if found:
        _log.info(
            "%s: %d files have other ETags than when they were saved (copied, or replaced): checksums decide",
            connector.url,
            len(found),
        )
    return found


def _manifest_and_index(connector: FileConnector) -> tuple[Manifest | None, Index]:
    options, url = connector.options, connector.url
    for attempt in range(2):  # a save may replace both between the two reads
        value = connector.read_small(FILE_MANIFEST)
        if value is None:
            return None, Index(())
        manifest = Manifest.decode(value, url=url, key=FILE_MANIFEST)
        if options.generation is not None and manifest.generation != options.generation:
            raise StaleGenerationError(
                f"{url}: generation {options.generation} is gone; generation {manifest.generation} has replaced it. "
                "Every rank must start again from the new one",
                url=url,
                key=FILE_MANIFEST,
            )
        check_digest(value, options, url=url, key=FILE_MANIFEST)
        key = file_index_path(manifest.generation)
        encoded = connector.read_small(key)
        if encoded is not None:
            manifest.check_index(encoded, url=url, key=key)
            return manifest, Index.decode(encoded)
        if attempt:
            break
    raise NotFoundError(
        f"{url}: the manifest names an index {key} that is gone; save the model again", url=url, key=key
    )

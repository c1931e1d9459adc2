"""Which model in a key-value store a url means: a generation of format 1, or values in SGLang's layout."""

from __future__ import annotations

from rdmaload.connectors.connector import KeyValueConnector
from rdmaload.errors import (
    AuthenticationError,
    FormatError,
    IntegrityError,
    NotFoundError,
    NotSupportedError,
    StaleGenerationError,
)
from rdmaload.index import Index, index_key
from rdmaload.manifest import Manifest, generation_manifest_key, manifest_key
from rdmaload.options import Options
from rdmaload.sglang_layout import find_index

__all__ = ["check_digest", "resolve", "resolve_any"]


def resolve_any(connector: KeyValueConnector) -> tuple[Manifest | None, Index]:
    """As `resolve`; without a manifest, the index of a model in SGLang's layout. Raises NotFoundError without both.

    A url that pins a generation or a manifest means format 1 only.
    """
    try:
        return resolve(connector)
    except _NoManifestError as error:
        problem, key = str(error), error.key
    if connector.options.generation is None and connector.options.manifest_sha256 is None:
        try:
            index = find_index(connector)
        except AuthenticationError as error:
            problem += f" (and whether SGLang has saved one there cannot be seen: {error})"
        else:
            if index is not None:
                return None, index
    raise NotFoundError(problem, url=connector.url, key=key)


def resolve(connector: KeyValueConnector) -> tuple[Manifest, Index]:
    """The manifest and index to read: two round trips, one more when a pinned generation was replaced.

    What does not fit together is read again, `max_integrity_attempts` times in all: bytes may have been damaged on the
    way, or a save may have replaced the model between the two reads.
    """
    attempts = max(2, connector.options.max_integrity_attempts)
    for attempt in range(1, attempts + 1):
        try:
            manifest = _manifest(connector)
            return manifest, _index(connector, manifest)
        except (FormatError, IntegrityError, _IndexGoneError):
            if attempt == attempts:
                raise
    raise AssertionError("unreachable")


class _NoManifestError(NotFoundError):
    """There is no model in format 1."""


class _IndexGoneError(NotFoundError):
    """The manifest names an index that is not there."""


def _manifest(connector: KeyValueConnector) -> Manifest:
    options, model, url = connector.options, connector.model, connector.url
    key = manifest_key(model)
    value = connector.get(key)
    if value is None:
        raise _NoManifestError(f"there is no model at {url} (no key {key}); see `rdmaload ls`", url=url, key=key)
    manifest = Manifest.decode(value, url=url, key=key)
    pinned = options.generation
    if pinned is not None and manifest.generation != pinned:
        published = manifest.generation
        key = generation_manifest_key(model, pinned)
        value = connector.get(key)
        if value is None:
            raise StaleGenerationError(
                f"{url}: generation {pinned} is gone; generation {published} has replaced it. Every rank must "
                "start again from the new one",
                url=url,
                key=key,
            )
        manifest = Manifest.decode(value, url=url, key=key)
    check_digest(value, options, url=url, key=key)
    return manifest


def _index(connector: KeyValueConnector, manifest: Manifest) -> Index:
    url = connector.url
    key = index_key(connector.model, manifest.generation)
    encoded = connector.get(key)
    if encoded is None:
        raise _IndexGoneError(
            f"{url}: the manifest names generation {manifest.generation}, whose index {key} is gone: evicted or "
            "deleted by hand; save the model again",
            url=url,
            key=key,
        )
    manifest.check_index(encoded, url=url, key=key)
    try:
        return Index.decode(encoded)
    except (FormatError, NotSupportedError) as error:
        raise type(error)(f"{key} at {url}: {error}", url=url, key=key) from error.__cause__


def check_digest(value: bytes, options: Options, *, url: str, key: str) -> None:
    """Raise IntegrityError unless a manifest's bytes are those that `manifest_sha256` asks for."""
    digest = Manifest.sha256(value)
    if options.manifest_sha256 is not None and digest != options.manifest_sha256:
        raise IntegrityError(
            f"{url}: the manifest has SHA-256 {digest}, manifest_sha256= asks for {options.manifest_sha256}: it is "
            "another model or was tampered with",
            url=url,
            key=key,
        )

"""Which generation of a model in a key-value store a url means: its manifest and its index."""

from __future__ import annotations

from rdmaload.connectors.connector import KeyValueConnector
from rdmaload.errors import FormatError, IntegrityError, NotFoundError, NotSupportedError, StaleGenerationError
from rdmaload.index import Index, index_key
from rdmaload.manifest import Manifest, generation_manifest_key, manifest_key

__all__ = ["resolve"]


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


class _IndexGoneError(NotFoundError):
    """The manifest names an index that is not there."""


def _manifest(connector: KeyValueConnector) -> Manifest:
    options, model, url = connector.options, connector.model, connector.url
    key = manifest_key(model)
    value = connector.get(key)
    if value is None:
        raise NotFoundError(f"there is no model at {url} (no key {key}); see `rdmaload ls`", url=url, key=key)
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
    digest = Manifest.sha256(value)
    if options.manifest_sha256 is not None and digest != options.manifest_sha256:
        raise IntegrityError(
            f"{url}: the manifest has SHA-256 {digest}, manifest_sha256= asks for {options.manifest_sha256}: it is "
            "another model or was tampered with",
            url=url,
            key=key,
        )
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

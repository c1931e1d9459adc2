"""Turn the finished parts of a save into the published model.

Any rank that sees all parts may publish, several at once: the index is stored only if it is absent,
and whoever comes second publishes the one that is there. The manifest is one SET, so that a reader
sees the old model or the new one. What a late attempt finds gone was finished by another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from rdmaload.connectors.connector import MODELS_KEY, KeyValueConnector
from rdmaload.errors import (
    AlreadyExistsError,
    FormatError,
    IntegrityError,
    LayoutMismatchError,
    NotFoundError,
    NotSupportedError,
    RdmaloadError,
    StaleGenerationError,
)
from rdmaload.index import Index, IndexFile, chunk_key, index_key
from rdmaload.journal import SaveKeys, decode_part, delete_keys
from rdmaload.manifest import Manifest, generation_manifest_key, manifest_key, utc_now

__all__ = ["Publisher", "manifest_of", "merge_parts", "superseded_key"]

_log = logging.getLogger("rdmaload")


def superseded_key(model: str, generation: str) -> str:
    """Where the time stands at which a generation was replaced."""
    return f"{model}/superseded/{generation}"


class Publisher:
    """The last steps of one save: `parts` ranks have to finish before the model appears."""

    def __init__(
        self,
        connector: KeyValueConnector,
        keys: SaveKeys,
        generation: str,
        *,
        parts: int,
        overwrite: bool,
    ) -> None:
        self._connector = connector
        self._keys = keys
        self._generation = generation
        self._parts = parts
        self._overwrite = overwrite
        self._url = connector.url

    def published_manifest(self) -> Manifest | None:
        """What is published now; a damaged manifest counts as none, as the save will replace it."""
        key = manifest_key(self._keys.model)
        value = self._connector.get(key)
        if value is None:
            return None
        try:
            return Manifest.decode(value, url=self._url, key=key)
        except (FormatError, IntegrityError, NotSupportedError) as err:
            if not self._overwrite:
                raise self._exists() from err
            _log.warning("%s is replaced although it cannot be read: %s", key, err)
            return None

    def check_absent(self) -> None:
        """Raise AlreadyExistsError for another save's model that must not be replaced."""
        published = self.published_manifest()
        if published is not None and published.generation != self._generation:
            raise self._exists()

    def publish(self, mine: Index) -> bool:
        """Publish if all parts are there; whether this call did. `mine` is what the caller saved.

        Raises LayoutMismatchError when the parts do not fit together, AlreadyExistsError when the
        model exists and must not be replaced, or when this save id stands for other content, and
        StaleGenerationError when the save was pruned or removed meanwhile.
        """
        keys = [self._keys.part(self._generation, rank) for rank in range(self._parts)]
        if not all(self._connector.exists(key) for key in keys):
            return self._left_to_others()
        parts = []
        for key in keys:
            value = self._connector.get(key)
            if value is None:
                return self._left_to_others()
            parts.append(decode_part(value, url=self._url, key=key))
        merged, dropped = merge_parts(parts, self._url)
        index, value = self._settle(merged)
        self._check_is_mine(index, mine)
        self.check_present(index)
        manifest = self._settle_manifest(manifest_of(index, value, self._generation, parts[0][0]))
        if self._connector.get(self._keys.generation) != self._generation.encode():
            return self._left_to_others()
        if not self._set_manifest(manifest):
            return False
        # Readers see the model from here on: what fails now is told, and left to prune.
        numbers = {file.number for file in index.files}
        doubles = [file for file in dropped if file.number not in numbers]
        self._try("copies of its files were not deleted", lambda: self._delete_files(doubles, index))
        self.finish()
        return True

    def check_present(self, index: Index) -> None:
        """Raise NotFoundError when the first chunk of any file is gone again."""
        for file in index.files:
            if not file.size:
                continue
            key = chunk_key(self._keys.model, self._generation, file.number, 0)
            if not self._connector.exists(key):
                raise NotFoundError(
                    f"{key} on {self._url} is gone before the model was complete: the store evicts "
                    "values (see its maxmemory and maxmemory-policy) or the save was pruned. "
                    "Nothing was published; make room and save again.",
                    url=self._url,
                    key=key,
                )

    def finish(self) -> None:
        """What a published save still has to do; failures are logged, as the model is there."""
        self._try("what the save kept for itself was not removed", self.clean_up)

    def clean_up(self) -> None:
        """Remove what the save kept for itself, the generation before the claims: an attempt that
        is late then learns that its claims mean nothing any more (see upload.py)."""
        connector, keys = self._connector, self._keys
        self._try("it was not added to the list of models", lambda: connector.members_add(MODELS_KEY, keys.model))
        # Listed while the generation is still there: nothing of a later save can be among it.
        left = [key for key in connector.list(f"{keys.root}/") if key not in (keys.generation, keys.beat)]
        if connector.get(keys.generation) == self._generation.encode():
            connector.delete(keys.generation, keys.beat)
        else:
            left = [key for key in left if key.startswith(f"{keys.root}/{self._generation}/")]
        delete_keys(connector, left)

    def _settle(self, merged: Index) -> tuple[Index, bytes]:
        """The one index of this generation: ours, or the one of whoever was first."""
        key = index_key(self._keys.model, self._generation)
        value = merged.encode()
        if self._connector.set(key, value, if_absent=True):
            return merged, value
        stored = self._connector.get(key)
        if stored is None:
            raise self._gone()
        return Index.decode(stored), stored

    def _settle_manifest(self, manifest: Manifest) -> bytes:
        """The manifest of this generation as its copy holds it, which readers that have pinned the generation use
        when another one is published: ours, or the one of whoever was first."""
        key = generation_manifest_key(self._keys.model, self._generation)
        value = manifest.encode()
        if self._connector.set(key, value, if_absent=True):
            return value
        stored = self._connector.get(key)
        if stored is None:
            raise self._gone()
        Manifest.decode(stored, url=self._url, key=key)
        return stored

    def _check_is_mine(self, index: Index, mine: Index) -> None:
        """Several attempts under one save id must mean one content. Plain files may have come from
        another rank, weight files may not."""
        theirs = {file.path: file for file in index.files}
        for file in mine.files:
            if self._parts > 1 and file.header is None:
                continue
            other = theirs.get(file.path)
            same = (
                other is not None
                and (other.size, other.rank) == (file.size, file.rank)
                and index.chunk_bytes == mine.chunk_bytes
                and _crcs(index, other) == _crcs(mine, file)
            )
            if not same:
                raise AlreadyExistsError(
                    f"save id {self._keys.save_id!r} of {self._url} already stands for other "
                    f"content ({file.path} differs). Give every save its own save_id.",
                    url=self._url,
                    key=self._keys.root,
                )

    def _set_manifest(self, value: bytes) -> bool:
        model = self._keys.model
        key = manifest_key(model)
        old = self.published_manifest()
        if not self._connector.set(key, value, if_absent=not self._overwrite):
            if self._connector.get(key) == value:  # a retry after a lost reply
                return True
            now = self.published_manifest()
            if now is not None and now.generation == self._generation:
                return False
            raise self._exists()
        if old is not None and old.generation != self._generation:
            note = superseded_key(model, old.generation)
            self._try("the old generation was not marked", lambda: self._connector.set(note, utc_now().encode()))
        return True

    def _try(self, failure: str, action: Callable[[], object]) -> None:
        try:
            action()
        except RdmaloadError as err:
            _log.warning("%s is published, but %s: %s", self._url, failure, err)

    def _delete_files(self, files: Sequence[IndexFile], index: Index) -> None:
        """Copies of plain files that several ranks brought: the lowest rank's stays."""
        delete_keys(
            self._connector,
            (
                chunk_key(self._keys.model, self._generation, file.number, chunk)
                for file in files
                for chunk in range(file.chunk_count(index.chunk_bytes))
            ),
        )

    def _left_to_others(self) -> bool:
        """False when other ranks are still at work or have published; an error when all is gone."""
        if self._connector.get(self._keys.generation) == self._generation.encode():
            return False
        published = self.published_manifest()
        if published is not None and published.generation == self._generation:
            return False
        if self._connector.exists(index_key(self._keys.model, self._generation)):
            return False  # published by another attempt, and replaced since
        raise self._gone()

    def _gone(self) -> StaleGenerationError:
        return StaleGenerationError(
            f"save {self._keys.save_id!r} of {self._url} was pruned or removed while it was under "
            "way (or another rank published it, and it was replaced and pruned since); this attempt "
            "published nothing. Save again.",
            url=self._url,
            key=self._keys.generation,
        )

    def _exists(self) -> AlreadyExistsError:
        return AlreadyExistsError(
            f"{self._url} exists and overwrite=False. Save under another name, or remove it first.",
            url=self._url,
            key=manifest_key(self._keys.model),
        )


def manifest_of(index: Index, value: bytes, generation: str, like: Manifest) -> Manifest:
    """A manifest for an encoded index, with the kind, layout and identity of `like`."""
    return Manifest.of(
        value,
        generation=generation,
        files=len(index.files),
        bytes=index.total_bytes,
        writer=like.writer,
        kind=like.kind,
        world_size=like.world_size,
        layout=like.layout,
        identity=like.identity,
    )


def merge_parts(parts: Sequence[tuple[Manifest, Index]], url: str) -> tuple[Index, list[IndexFile]]:
    """One index out of those of ranks 0, 1, ..., and the plain files that a lower rank has too."""
    first, first_index = parts[0]
    kept: dict[str, tuple[int, IndexFile]] = {}
    dropped: list[IndexFile] = []
    for rank, (manifest, index) in enumerate(parts):
        for name, one, other in (
            ("world size", first.world_size, manifest.world_size),
            ("kind", first.kind, manifest.kind),
            ("chunk size", first_index.chunk_bytes, index.chunk_bytes),
            ("layout", first.layout, manifest.layout),
            ("identity", first.identity, manifest.identity),
        ):
            if one != other:
                raise LayoutMismatchError(
                    f"the ranks of one save of {url} disagree: {name} is {one} on rank 0 and "
                    f"{other} on rank {rank}. Nothing was published; save all ranks alike under "
                    "a new save_id.",
                    url=url,
                )
        for file in index.files:
            owner, before = kept.setdefault(file.path, (rank, file))
            if before is file:
                continue
            if before.header is not None or file.header is not None:
                raise LayoutMismatchError(
                    f"ranks {owner} and {rank} of one save of {url} both have a weight file "
                    f"{file.path}. Nothing was published; name the files by rank, such as "
                    f"model-rank-{rank}-part-0.safetensors.",
                    url=url,
                )
            dropped.append(file)
    ordered = sorted(kept.values(), key=lambda item: item[1].path)
    index = Index.of(
        [file for _, file in ordered],
        chunk_bytes=first_index.chunk_bytes,
        crcs=b"".join(_crcs(parts[rank][1], file) for rank, file in ordered),
    )
    return index, dropped


def _crcs(index: Index, file: IndexFile) -> bytes:
    start = 4 * file.first_chunk
    return index.crcs[start : start + 4 * file.chunk_count(index.chunk_bytes)]

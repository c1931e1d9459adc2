"""prune, remove and models: what is in a key-value store besides the model that readers see.

Only keys of exactly the forms that a save writes are touched: a model `a` and a model `a/b` may lie
side by side. Nothing that a reader or a live save may still need is removed; see `prune`.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rdmaload import sglang_layout
from rdmaload.connectors import KeyValueConnector, connector_for
from rdmaload.connectors.connector import MODELS_KEY, Connector, FileConnector
from rdmaload.connectors.objects import ObjectConnector
from rdmaload.connectors.registry import connector_class
from rdmaload.errors import FormatError, IntegrityError, NotFoundError, NotSupportedError, UrlError
from rdmaload.index import Index, index_key
from rdmaload.journal import SaveKeys, delete_keys, parse_time
from rdmaload.manifest import GENERATION_PATTERN, Manifest, manifest_key, utc_now
from rdmaload.object_removal import prune_objects, remove_objects
from rdmaload.options import Options
from rdmaload.publish import superseded_key
from rdmaload.sources import read_index, read_manifest
from rdmaload.urls import parse_url

__all__ = ["PruneStats", "models", "prune", "remove"]

_log = logging.getLogger("rdmaload")

# A live save beats every 10 s. Within this time it counts as alive even for force=True: a server
# that pauses, or a request that is tried again for a minute, is no reason to lose a save.
_ALIVE_SECONDS = 120.0

_HEX = "[0-9a-f]{32}"
_CHUNK_KEY = re.compile(rf"({_HEX})/(?:index|manifest|([0-9]{{1,16}})/([0-9]{{1,16}}))", re.ASCII)
_SAVING_KEY = re.compile(
    r"([A-Za-z0-9._-]{1,128})/(?:generation|beat|"
    rf"{_HEX}/(?:claims/[0-9]+|journal/(?:all|[0-9]+)/{_HEX}|parts/[0-9]+))",
    re.ASCII,
)
_RANKED = re.compile(r"(.*?[^/])/keys/rank_0/.", re.DOTALL)  # SGLang's layout


@dataclass
class PruneStats:
    """What `prune` removed."""

    generations: int = 0
    """Generations whose chunks were removed, those of dead saves included."""
    saves: int = 0
    """Dead saves."""
    keys: int = 0
    """Keys that were deleted in all."""
    waiting: int = 0
    """Generations that a later prune removes, when their grace is over."""

    def to_json(self) -> dict[str, int]:
        return {
            "generations": self.generations,
            "saves": self.saves,
            "keys": self.keys,
            "waiting": self.waiting,
        }


def prune(
    url: str | os.PathLike[str],
    *,
    force: bool = False,
    grace: float = 3600.0,
    options: Options | None = None,
    **opts: object,
) -> PruneStats:
    """Remove what no reader needs: replaced generations, dead saves, chunks that no index names.

    A replaced generation stays for `grace` seconds after it was replaced, for readers that opened
    it before; one of which nobody knows when it was replaced counts from the first prune that sees
    it. A save is dead when it gave no sign of life for `grace` seconds (at least two minutes).
    `force` does not wait: replaced generations go at once, saves after two minutes. The published
    generation and live saves always stay. Where files lie beside their manifest in an object
    store, that means indexes that no manifest names, notes and parts of saves, and uploads that
    nobody ended.

    Raises IntegrityError or FormatError when the manifest is damaged: then nobody knows what is
    published, and nothing is removed.
    """
    if not grace >= 0:
        raise UrlError(f"grace={grace} is not seconds")
    with _opened(url, options, opts) as connector:
        if isinstance(connector, ObjectConnector):
            removed = prune_objects(connector, grace=0.0 if force else grace)
            return PruneStats(removed.generations, removed.saves, removed.keys, removed.waiting)
        return _Pruner(connector, force, grace).run()


def remove(url: str | os.PathLike[str], *, options: Options | None = None, **opts: object) -> int:
    """Remove a model with everything that saves left of it; the number of keys.

    The manifest goes first, so that nobody starts to read what disappears. A save that is under way
    fails. A model in SGLang's layout is removed with its files. In an object store the files that the manifest names
    go with it; what was put there without a manifest stays, and is NotSupportedError. Raises NotFoundError when there
    is nothing.
    """
    with _opened(url, options, opts) as connector:
        if isinstance(connector, ObjectConnector):
            return remove_objects(connector)
        model = connector.model
        keys = connector.delete(manifest_key(model))
        connector.members_remove(MODELS_KEY, model)
        # The generation of a save before its parts: an attempt that is about to publish looks.
        for save_id in _saves(connector):
            keys += connector.delete(SaveKeys(model, save_id).generation)
        for name, pattern in (
            ("chunks", _CHUNK_KEY),
            ("saving", _SAVING_KEY),
            ("superseded", GENERATION_PATTERN),
        ):
            keys += delete_keys(connector, (key for key, _ in _keys(connector, name, pattern)))
        keys += _remove_sglang(connector)
        if not keys:
            raise NotFoundError(f"there is no model at {connector.url}.", url=connector.url)
        return keys


def _remove_sglang(connector: KeyValueConnector) -> int:
    """Remove a model in SGLang's layout; how many keys it had."""
    keys = sglang_layout.layout_keys(connector)
    if not keys:
        return 0
    # From here on no reader opens it, and the next remove finds what one that died has left.
    mark = sglang_layout.mark_key(connector.model, 0)
    connector.set(mark, b"removing")
    removed = delete_keys(connector, (key for key in keys if key != mark))
    return removed + connector.delete(mark) - (mark not in keys)


def models(
    url: str | os.PathLike[str],
    *,
    scan: bool = False,
    options: Options | None = None,
    **opts: object,
) -> list[str]:
    """The names of the models in the server of `url`, sorted; a model in the url is ignored.

    Saves add to a list in the server, SGLang's do not. `scan` looks at every key instead and renews the list.
    """
    location = parse_url(url, require_model=False)
    cls = connector_class(location.scheme)
    connector = cls(location, Options.resolve(location, options, also=cls.url_options, defaults={}, **opts))
    with connector:
        if not isinstance(connector, KeyValueConnector):
            raise NotSupportedError(f"{connector.url} keeps no list of models", url=connector.url)
        listed = connector.members(MODELS_KEY)
        if not scan:
            return sorted(
                name for name in listed if connector.exists(manifest_key(name)) or _has_ranks(connector, name)
            )
        found = {name for name, ranked in _scan(connector) if ranked or _is_model(connector, name)}
        for name in found.difference(listed):
            connector.members_add(MODELS_KEY, name)
        for name in set(listed) - found:
            connector.members_remove(MODELS_KEY, name)
        return sorted(found)


def _has_ranks(connector: KeyValueConnector, name: str) -> bool:
    return any(True for _ in connector.list(f"{name}/keys/rank_0/"))


def _scan(connector: KeyValueConnector) -> Iterator[tuple[str, bool]]:
    """Names that a key speaks for: by a manifest to look at, or by tensors in SGLang's layout (True)."""
    for key in connector.list(""):
        ranked = _RANKED.match(key)
        if ranked:
            yield ranked[1], True
        name = key.removesuffix("/manifest")
        # A model's name has no segment "chunks": what looks like it is a generation's copy of its manifest.
        if name != key and "/chunks/" not in name:
            yield name, False


def _is_model(connector: KeyValueConnector, name: str) -> bool:
    value = connector.get(manifest_key(name))
    try:
        return value is not None and bool(Manifest.decode(value))
    except IntegrityError:
        return True  # a damaged model is one that the user wants to see
    except (FormatError, NotSupportedError):
        return False


def _opened(
    url: str | os.PathLike[str], options: Options | None, opts: dict[str, object]
) -> KeyValueConnector | ObjectConnector:
    connector = connector_for(url, options, **opts)
    if isinstance(connector, (KeyValueConnector, ObjectConnector)):
        return connector
    connector.close()
    raise nothing_to_remove(connector)


def nothing_to_remove(connector: Connector) -> NotSupportedError:
    """Why neither `prune` nor `remove` does anything to such a store."""
    if isinstance(connector, FileConnector) and connector.read_only:
        why = "is read only: remove the model where it is kept"
    else:
        why = "keeps plain files: there is nothing to prune, and to remove the model remove its directory"
    return NotSupportedError(f"{connector.url} {why}", url=connector.url)


def _keys(connector: KeyValueConnector, name: str, pattern: re.Pattern[str]) -> Iterator[tuple[str, re.Match[str]]]:
    """The keys `{model}/{name}/...` whose rest matches: others belong to other models."""
    prefix = f"{connector.model}/{name}/"
    for key in connector.list(prefix):
        match = pattern.fullmatch(key, len(prefix))
        if match:
            yield key, match


def _saves(connector: KeyValueConnector) -> set[str]:
    return {match[1] for _, match in _keys(connector, "saving", _SAVING_KEY)}


class _Pruner:
    """One prune of one model."""

    def __init__(self, connector: KeyValueConnector, force: bool, grace: float) -> None:
        self._connector = connector
        self._model = connector.model
        self._force = force
        self._grace = grace
        self._now = time.time()
        self._stats = PruneStats()

    def run(self) -> PruneStats:
        # The order matters. A generation that has chunks had its save registered before them, and
        # its save is forgotten only after the manifest names it: looked at in this order, a live
        # generation is found in the saves or in the manifest.
        generations = {match[1] for _, match in _keys(self._connector, "chunks", _CHUNK_KEY)}
        live: set[str] = set()
        dead: dict[str, str | None] = {}
        for save_id in sorted(_saves(self._connector)):
            generation = self._generation_of(save_id)
            if self._is_alive(save_id):
                live.add(generation or "")
            else:
                dead[save_id] = generation
        current = self._current()
        dead_generations = set()
        for save_id, generation in dead.items():
            if not self._forget_save(save_id):
                live.add(generation or "")
            elif generation is not None:
                dead_generations.add(generation)
        for generation in sorted(generations - live):
            if generation == current:
                continue
            if self._may_go(generation, generation in dead_generations):
                self._remove_generation(generation)
            else:
                self._stats.waiting += 1
        self._drop_notes(generations, current)
        if current is not None and current not in live:
            self._remove_orphans(current)
        return self._stats

    def _current(self) -> str | None:
        manifest = read_manifest(self._connector)
        return None if manifest is None else manifest.generation

    def _generation_of(self, save_id: str) -> str | None:
        value = self._connector.get(SaveKeys(self._model, save_id).generation)
        text = (value or b"").decode("ascii", "replace")
        return text if GENERATION_PATTERN.fullmatch(text) else None

    def _is_alive(self, save_id: str) -> bool:
        key = SaveKeys(self._model, save_id).beat
        beat = parse_time(self._connector.get(key))
        if beat is None:
            # A save without a readable sign of life: its time starts now.
            if not self._force:
                self._connector.set(key, utc_now().encode())
            return not self._force
        patience = _ALIVE_SECONDS if self._force else max(self._grace, _ALIVE_SECONDS)
        return self._now - beat <= patience

    def _is_over(self, generation: str) -> bool:
        """Whether a replaced generation may go; one without a readable note gets one."""
        if self._force:
            return True
        key = superseded_key(self._model, generation)
        since = parse_time(self._connector.get(key))
        if since is None:
            self._connector.set(key, utc_now().encode())
            return False
        return self._now - since >= self._grace

    def _may_go(self, generation: str, dead: bool) -> bool:
        # With an index it may have been published by a save that died before it cleaned up, and
        # replaced since: then readers may have it open.
        if dead and not self._connector.exists(index_key(self._model, generation)):
            return True
        return self._is_over(generation)

    def _forget_save(self, save_id: str) -> bool:
        """Remove what a dead save kept; False when it has come back to life meanwhile."""
        if self._is_alive(save_id):
            return False
        keys = SaveKeys(self._model, save_id)
        # The generation first: an attempt that wakes up sees that its save is gone.
        self._stats.keys += self._connector.delete(keys.generation)
        self._stats.keys += delete_keys(
            self._connector,
            (key for key, match in _keys(self._connector, "saving", _SAVING_KEY) if match[1] == save_id),
        )
        self._stats.saves += 1
        return True

    def _remove_generation(self, generation: str) -> None:
        if self._current() == generation:
            return  # published while we looked
        connector = self._connector
        # The index first: a reader then sees at once that the generation is gone.
        self._stats.keys += connector.delete(index_key(self._model, generation))
        self._stats.keys += delete_keys(connector, (key for key, _ in self._chunks(generation)))
        self._stats.keys += connector.delete(superseded_key(self._model, generation))
        self._stats.generations += 1

    def _chunks(self, generation: str) -> Iterator[tuple[str, re.Match[str]]]:
        prefix = f"{self._model}/chunks/"
        for key in self._connector.list(f"{prefix}{generation}/"):
            match = _CHUNK_KEY.fullmatch(key, len(prefix))
            if match:
                yield key, match

    def _drop_notes(self, generations: set[str], current: str | None) -> None:
        """Remove notes about what is gone, and of the published generation: it may have been
        replaced before it was published again."""
        for key, match in list(_keys(self._connector, "superseded", GENERATION_PATTERN)):
            if match[0] == current or match[0] not in generations:
                self._stats.keys += self._connector.delete(key)

    def _remove_orphans(self, current: str) -> None:
        """Chunks in the published generation that its index does not name: left by attempts that
        died before another one finished."""
        manifest = read_manifest(self._connector)
        if manifest is None or manifest.generation != current:
            return
        try:
            index: Index = read_index(self._connector, manifest)
        except (FormatError, IntegrityError, NotFoundError, NotSupportedError) as err:
            _log.warning("chunks of %s are left alone: %s", self._connector.url, err)
            return
        counts = {file.number: file.chunk_count(index.chunk_bytes) for file in index.files}
        self._stats.keys += delete_keys(
            self._connector,
            (
                key
                for key, match in self._chunks(current)
                if match[2] is not None and int(match[3]) >= counts.get(int(match[2]), 0)
            ),
        )

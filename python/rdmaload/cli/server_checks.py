"""What a Redis or Valkey server is set to, and what follows for models that it holds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rdmaload.amounts import count_text, size_text
from rdmaload.cli.checks import Check

if TYPE_CHECKING:
    from rdmaload.connectors.redis import RedisConnector

__all__ = ["room_check", "server_checks"]

_SETTINGS = (
    "save",
    "proto-max-bulk-len",
    "client-output-buffer-limit",
    "io-threads",
)
_DEFAULT_CHUNK_BYTES = 2**20 - 4096


def server_checks(connector: RedisConnector) -> Iterator[Check]:
    """The checks of the server."""
    facts = connector.server_info()
    if not facts:
        yield Check(
            "server",
            "warn",
            "unknown: INFO is refused to this user",
            "grant it to see version and memory (ACL SETUSER ... +info)",
        )
        return
    yield Check("server", "ok", _name(facts))
    yield _keys(facts, connector.options.db)
    yield _memory(facts)
    yield _policy(facts)
    evicted = _number(facts, "evicted_keys")
    if evicted:
        yield Check(
            "evicted keys",
            "warn",
            f"{evicted:,} since the server started",
            "models may have lost chunks: `rdmaload verify` them",
        )
    settings = connector.server_settings(*_SETTINGS)
    yield _persistence(facts, settings)
    if not settings:
        yield Check(
            "server settings",
            "warn",
            "unknown: CONFIG GET is refused to this user",
            "grant it to see limits that may end a load (ACL SETUSER ... +config|get)",
        )
        return
    yield from _limits(settings, connector)


def _number(facts: Mapping[str, str], name: str) -> int:
    text = facts.get(name, "")
    return int(text) if text.isdecimal() else 0


def _name(facts: Mapping[str, str]) -> str:
    """Which server it is: all of them say that they are some Redis, too."""
    for name in ("rdmaload", "valkey"):
        if f"{name}_version" in facts:
            return f"{name} {facts[f'{name}_version']}"
    return f"redis {facts.get('redis_version', 'unknown')}"


def _keys(facts: Mapping[str, str], db: int) -> Check:
    found = re.search(r"keys'?[=:] ?([0-9]+)", facts.get(f"db{db}", ""))
    return Check("keys", "ok", f"{count_text(int(found[1]) if found else 0, 'key')} in database {db}")


def _room(facts: Mapping[str, str]) -> int | None:
    """Bytes that the server can still take; None when it does not say."""
    limit = _number(facts, "maxmemory") or _number(facts, "total_system_memory")
    return max(0, limit - _number(facts, "used_memory")) if limit else None


def _memory(facts: Mapping[str, str]) -> Check:
    used, limit = _number(facts, "used_memory"), _number(facts, "maxmemory")
    room = _room(facts)
    value = f"{size_text(limit)}" if limit else "unlimited"
    value += f", {size_text(used)} in use, room for {'unknown' if room is None else size_text(room)}"
    if not limit:
        value += " in the machine's memory" if room is not None else ""
    # A save needs as much again, beside the generation that it replaces.
    if room is not None and room < used:
        return Check(
            "maxmemory",
            "warn",
            value,
            "what is there cannot be saved a second time: raise maxmemory, or `rdmaload prune`",
        )
    return Check("maxmemory", "ok", value)


def room_check(connector: RedisConnector, nbytes: int) -> Check:
    """Whether a model of `nbytes`, which is there, can be saved again."""
    room = _room(connector.server_info())
    if room is None:
        return Check("room for a new generation", "ok", "unknown: the server does not say how much memory it has")
    value = f"{size_text(nbytes)} of {size_text(room)}"
    if room < nbytes:
        return Check(
            "room for a new generation",
            "warn",
            value,
            f"the model cannot be replaced while it is there: {size_text(nbytes - room)} are missing; raise maxmemory, "
            "`rdmaload prune` old generations, or `rdmaload rm` it first",
        )
    return Check("room for a new generation", "ok", value)


def _policy(facts: Mapping[str, str]) -> Check:
    policy = facts.get("maxmemory_policy", "unknown")
    if policy == "noeviction":
        return Check("maxmemory-policy", "ok", policy)
    return Check(
        "maxmemory-policy",
        "warn",
        policy,
        "the server may evict parts of a model: CONFIG SET maxmemory-policy noeviction",
    )


def _persistence(facts: Mapping[str, str], settings: Mapping[str, str]) -> Check:
    """Snapshots fork the server: pages that change meanwhile exist twice, and weights are written to disk each time."""
    log = facts.get("aof_enabled") == "1"
    snapshots = settings.get("save")
    kinds = [*(["append-only file"] if log else []), *([f"snapshots ({snapshots})"] if snapshots else [])]
    if kinds:
        return Check(
            "persistence",
            "warn",
            " and ".join(kinds),
            "each snapshot or rewrite forks the server and writes all weights to its disk; if models can be saved "
            "again, turn it off: CONFIG SET save '' and appendonly no",
        )
    value = "off" if snapshots is not None else "no append-only file; snapshots unknown"
    return Check("persistence", "ok", f"{value}; models are gone when the server ends" if value == "off" else value)


def _limits(settings: Mapping[str, str], connector: RedisConnector) -> Iterator[Check]:
    bytes_in_flight = connector.bytes_in_flight
    longest = _number(settings, "proto-max-bulk-len")
    if longest:
        enough = longest >= (connector.options.chunk_bytes or _DEFAULT_CHUNK_BYTES)
        yield Check(
            "proto-max-bulk-len",
            "ok" if enough else "warn",
            size_text(longest),
            "" if enough else f"save with chunk_bytes={longest} or less, or raise it: longer values are refused",
        )
    threads = settings.get("io-threads")
    if threads is not None:
        yield Check("io-threads", "ok", threads)
    # normal <hard> <soft> <seconds> slave ...
    matched = re.match(r"normal (\d+) (\d+) (\d+)", settings.get("client-output-buffer-limit", ""))
    if matched:
        hard, soft = int(matched[1]), int(matched[2])
        tightest = min((limit for limit in (hard, soft) if limit), default=0)
        value = "unlimited" if not tightest else size_text(tightest)
        if tightest and tightest < 2 * bytes_in_flight:
            yield Check(
                "client-output-buffer-limit",
                "warn",
                value,
                f"the server drops a connection whose replies wait for more; a load has {size_text(bytes_in_flight)} "
                "in flight: CONFIG SET client-output-buffer-limit 'normal 0 0 0'",
            )
        else:
            yield Check("client-output-buffer-limit", "ok", value)

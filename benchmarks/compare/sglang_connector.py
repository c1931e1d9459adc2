"""The connector of SGLang's wheel, which is imported with this module; the rest of the engine is left out.

Only the start of its packages, which wants all of SGLang's dependencies, and what another connector needs of them are
replaced.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import redis

__all__ = ["connect"]


def _imported() -> Any:
    found = importlib.util.find_spec("sglang")
    assert found is not None
    assert found.submodule_search_locations is not None
    source = Path(found.submodule_search_locations[0]).parent
    for name in ("sglang", "sglang.srt"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(source, *name.split(".")))]
        sys.modules[name] = package
    utils: Any = types.ModuleType("sglang.srt.utils")  # the real ones want every part of the engine
    utils.parse_connector_type = lambda url: url.partition("://")[0]
    utils.init_custom_process_group = None
    utils.__path__ = []
    of_platforms: Any = types.ModuleType("sglang.srt.utils.common")
    of_platforms.is_npu = lambda: False
    sys.modules.update({"sglang.srt.utils": utils, "sglang.srt.utils.common": of_platforms})
    return importlib.import_module("sglang.srt.connector.redis")


_connector = _imported()


def connect(url: str, *, hiredis: bool) -> Any:
    """A connector that parses replies with or without hiredis (which redis-py takes where it is installed)."""
    connector = _connector.RedisConnector(url)
    if not hiredis and "hiredis" in str(redis.connection.DefaultParser).lower():
        from redis import _parsers

        options = connector.connection.connection_pool.connection_kwargs
        connector.connection = redis.Redis(
            connection_pool=redis.ConnectionPool(
                host=options["host"], port=options["port"], protocol=2, parser_class=_parsers._RESP2Parser
            )
        )
    return connector

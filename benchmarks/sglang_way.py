"""Loads from Redis the way SGLang's remote connector does: the alternative that users have today.

Written from a description of its layout and its order of calls: one redis-py connection, SCAN for
the keys of one rank, then GET and deserialise each value, which is a safetensors file of one tensor
named `tensor_bytes`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.checkpoints import read_safetensors, weight_files

if TYPE_CHECKING:
    import redis
    import torch

__all__ = ["connect", "load", "store", "weight_iterator"]


def connect(host: str, port: int, *, hiredis: bool) -> redis.Redis:
    """A redis-py client that parses replies with or without hiredis (with it by default)."""
    import redis
    from redis import _parsers

    options: dict[str, Any] = {"host": host, "port": port}
    if "hiredis" in str(redis.connection.DefaultParser).lower() and not hiredis:
        options |= {"protocol": 2, "parser_class": _parsers._RESP2Parser}
    elif hiredis and "hiredis" not in str(redis.connection.DefaultParser).lower():
        raise RuntimeError("hiredis is not installed: pip install hiredis")
    return redis.Redis(connection_pool=redis.ConnectionPool(**options))


def store(client: redis.Redis, model: str, directory: Path, rank: int = 0) -> int:
    """Write every tensor of `directory` in that layout; the number of tensor bytes."""
    total = 0
    for path in weight_files(directory):
        for name, (spec, data) in read_safetensors(path).items():
            entry = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [0, spec.bytes]}
            header = json.dumps({"tensor_bytes": entry}, separators=(",", ":")).encode()
            header += b" " * (-len(header) % 8)
            value = b"".join((len(header).to_bytes(8, "little"), header, data))
            client.set(f"{model}/keys/rank_{rank}/{name}", value)
            total += spec.bytes
    for path in directory.glob("*.json"):
        client.set(f"{model}/files/{path.name}", path.read_text(encoding="utf-8"))
    return total


def weight_iterator(client: redis.Redis, model: str, rank: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of one rank, in the order in which SCAN gave the keys."""
    import safetensors.torch

    prefix = f"{model}/keys/rank_{rank}/"
    binary: Any = client  # typed for clients that decode, which this one does not
    keys: list[str] = []
    cursor = 0
    while True:
        cursor, found = binary.scan(cursor=cursor, match=f"{prefix}*")
        keys += (key.decode() for key in found)
        if cursor == 0:
            break
    for key in keys:
        value = binary.get(key)
        if value is None:
            raise KeyError(key)
        yield key.removeprefix(prefix), safetensors.torch.load(value)["tensor_bytes"]


def load(client: redis.Redis, model: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return dict(weight_iterator(client, model, rank))

"""A writer and a reader of the layout that SGLang keeps in Redis, made from its description alone.

Nothing here uses rdmaload: redis-py sends and gets, safetensors packs and unpacks, as SGLang's own connector does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import safetensors.torch
import torch

if TYPE_CHECKING:
    import redis

__all__ = ["read_files", "read_rank", "sample_tensors", "same_tensors", "write_files", "write_rank"]


def sample_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of many dtypes and shapes, some larger than a range that is read at once."""
    generator = torch.Generator().manual_seed(seed)

    def raw(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)

    return {
        "model.embed.weight": raw(2_600_002).view(torch.bfloat16),
        "model.layers.0.mlp.weight": raw(1_044_480 - 72 - 8).view(torch.float32).reshape(-1, 4),
        "model.layers.0.attn.k_scale": raw(4).view(torch.float32).reshape(()),
        "model.layers.0.bias": raw(4).view(torch.bfloat16),
        "model.layers.1.weight_fp8": raw(300).view(torch.float8_e4m3fn).reshape(3, 100),
        "model.layers.1.table": raw(80).view(torch.int64).reshape(5, 2),
        "model.layers.1.flags": raw(7) > 100,
    }


def write_rank(client: redis.Redis, model: str, rank: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """What SGLang stores for one rank."""
    for name, tensor in tensors.items():
        value = safetensors.torch.save({"tensor_bytes": tensor.cpu().contiguous()})
        client.set(f"{model}/keys/rank_{rank}/{name}", value)


def write_files(client: redis.Redis, model: str, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        client.set(f"{model}/files/{name}", text)


def _names(client: redis.Redis, prefix: str) -> list[str]:
    """Every key with the prefix, by looking at all of them: no pattern that could be wrong."""
    keys = (key.decode() for key in client.scan_iter(count=10_000))
    return sorted({key.removeprefix(prefix) for key in keys if key.startswith(prefix)})


def read_rank(client: redis.Redis, model: str, rank: int) -> dict[str, torch.Tensor]:
    """What SGLang reads for one rank; every value must hold exactly one tensor."""
    prefix = f"{model}/keys/rank_{rank}/"
    found = {}
    for name in _names(client, prefix):
        loaded = safetensors.torch.load(client.get(prefix + name))
        assert list(loaded) == ["tensor_bytes"], name
        found[name] = loaded["tensor_bytes"]
    return found


def read_files(client: redis.Redis, model: str) -> dict[str, str]:
    prefix = f"{model}/files/"
    return {name: client.get(prefix + name).decode("utf-8") for name in _names(client, prefix)}


def same_tensors(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Whether names, dtypes, shapes and every byte are the same."""
    return left.keys() == right.keys() and all(
        tensor.dtype == right[name].dtype and tensor.shape == right[name].shape and _raw(tensor) == _raw(right[name])
        for name, tensor in left.items()
    )


def _raw(tensor: torch.Tensor) -> bytes:
    return safetensors.torch.save({"x": tensor.detach().contiguous()})

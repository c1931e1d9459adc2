"""Tensors between the native loader and torch: the dtype table, and DLPack in both directions.

A tensor that leaves here is its own storage with its own share of the arena it lies in: nothing ties it to its
neighbours but that memory goes back to the system when the last of them is dropped.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from rdmaload import _core
from rdmaload.errors import DeviceError, FormatError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DLPACK_TYPES",
    "TensorSpec",
    "check_dtype",
    "collector_paused",
    "converted_bytes",
    "export_tensor",
    "import_target",
    "taker",
    "torch_dtype",
]

DLPACK_TYPES = {
    "BOOL": (6, 8),
    "U8": (1, 8),
    "I8": (0, 8),
    "I16": (0, 16),
    "I32": (0, 32),
    "I64": (0, 64),
    "F16": (2, 16),
    "F32": (2, 32),
    "F64": (2, 64),
    "BF16": (4, 16),
    "C64": (5, 64),
}
"""safetensors name: DLPack type code and bits, for the types that DLPack has had from the start."""

# The others by torch's name, where this torch has it.
_BY_NAME = {
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
}
_UINT8 = DLPACK_TYPES["U8"]


class TensorSpec(NamedTuple):
    """What a header says of a tensor. A tuple, because models have tens of thousands of them."""

    name: str
    dtype: str
    """The safetensors name, such as "BF16"."""
    shape: tuple[int, ...]
    file: str
    nbytes: int


@lru_cache(maxsize=1)
def _torch_dtypes() -> dict[str, torch.dtype]:
    import torch

    table = {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "I16": torch.int16,
        "I32": torch.int32,
        "I64": torch.int64,
        "F16": torch.float16,
        "F32": torch.float32,
        "F64": torch.float64,
        "BF16": torch.bfloat16,
        "C64": torch.complex64,
    }
    for name, attribute in _BY_NAME.items():
        if hasattr(torch, attribute):
            table[name] = getattr(torch, attribute)
    return table


@lru_cache(maxsize=1)
def taker() -> Callable[[object], torch.Tensor]:
    """What makes a tensor of a DLPack capsule."""
    from torch.utils.dlpack import from_dlpack

    return from_dlpack


@contextmanager
def collector_paused() -> Iterator[None]:
    """Python's cyclic collector off, where it was on, while many tensors are made.

    Every 700 new objects set it off, and now and then it walks everything that the process keeps: 0.1 s and more once
    torch is imported, longer than reading a third of a GB. What it would have found waits for the next time. Of threads
    that overlap the first to end turns it on for all, and also where the application turned it off meanwhile.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def torch_dtype(spec: TensorSpec) -> tuple[torch.dtype, tuple[int, ...]]:
    """The torch dtype and shape that a stored tensor gets.

    F4 packs two elements into a byte, and so does torch's float4_e2m1fn_x2: the last dimension is halved. A type that
    this torch lacks (F6_E2M3, F6_E3M2; F4 with an odd last dimension) comes as its raw bytes: uint8, one dimension.
    """
    dtype = _torch_dtypes().get(spec.dtype)
    if dtype is None or (spec.dtype == "F4" and (not spec.shape or spec.shape[-1] % 2)):
        return _torch_dtypes()["U8"], (spec.nbytes,)
    if spec.dtype == "F4":
        return dtype, (*spec.shape[:-1], spec.shape[-1] // 2)
    return dtype, spec.shape


def check_dtype(dtype: object) -> None:
    """Raise TypeError unless `dtype` is None or a floating-point torch dtype, to which weights can be converted."""
    if dtype is None:
        return
    import torch

    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype!r}: floating-point tensors are converted to a dtype such as torch.bfloat16")


def converted_bytes(spec: TensorSpec, dtype: torch.dtype | None) -> int:
    """Bytes of the tensor once it is converted to `dtype`, as floating-point tensors are."""
    stored, shape = torch_dtype(spec)
    if dtype is None or not stored.is_floating_point:
        return spec.nbytes
    return math.prod(shape) * dtype.itemsize


def export_tensor(spec: TensorSpec, arena: _core.HostArena | None, offset: int) -> torch.Tensor:
    """The tensor at `offset` (bytes) of `arena`, which it shares the ownership of; without one, an empty tensor.

    By its bytes, whatever its type: those of DLPACK_TYPES come from the plan, at once.
    """
    if arena is None or spec.nbytes == 0:
        import torch

        dtype, shape = torch_dtype(spec)
        return torch.empty(shape, dtype=dtype)
    dtype, shape = torch_dtype(spec)
    raw = taker()(arena.tensor(offset, *_UINT8, (spec.nbytes,)))
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    import torch

    # set_ instead of view: a tensor of its own, not a view that remembers another one.
    return torch.empty(0, dtype=dtype).set_(raw.untyped_storage(), 0, shape, strides)


def import_target(name: str, target: torch.Tensor, nbytes: int) -> _core.ImportedTensor:
    """An existing contiguous host tensor as a destination; keeps it alive until the load is done."""
    import torch

    if target.device.type != "cpu":
        raise DeviceError(f"the target of {name} is on {target.device}, not in host memory")
    flat = target.detach().reshape(-1).view(torch.uint8)
    if flat.numel() != nbytes or flat.data_ptr() != target.data_ptr():
        raise FormatError(f"the target of {name} has {flat.numel()} bytes, the stored tensor {nbytes}")
    return _core.ImportedTensor(flat.__dlpack__())

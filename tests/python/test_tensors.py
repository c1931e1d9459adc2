"""The seam to torch: dtypes, storages that are their own, and targets that are written through DLPack."""

from __future__ import annotations

import copy
import gc
import io
import math

import pytest
import torch

from rdmaload import _core
from rdmaload.errors import DeviceError, FormatError
from rdmaload.tensors import TensorSpec, converted_bytes, export_tensor, import_target, torch_dtype
from tests.support.checkpoints import DTYPE_BITS

# By hand, as safetensors.torch has it; what torch lacks is missing.
EXPECTED = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
LATER = {  # of newer torch versions
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
}
RAW = {"F6_E2M3", "F6_E3M2"}


def spec_of(dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec("t", dtype, shape, "f", math.prod(shape) * DTYPE_BITS[dtype] // 8)


def filled(nbytes: int) -> _core.HostArena:
    arena = _core.HostArena(nbytes)
    memoryview(arena)[:] = bytes(i * 7 % 256 for i in range(nbytes))
    return arena


def test_every_dtype_of_safetensors_has_a_rule() -> None:
    assert set(EXPECTED) | set(LATER) | RAW == set(DTYPE_BITS)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
@pytest.mark.parametrize("shape", [(4, 8), (8,), (0, 8), (2, 0), (1, 1, 8)])
def test_dtypes_and_shapes(dtype: str, shape: tuple[int, ...]) -> None:
    spec = spec_of(dtype, shape)
    expected = EXPECTED.get(dtype) or getattr(torch, LATER.get(dtype, ""), None)
    if expected is None:
        assert torch_dtype(spec) == (torch.uint8, (spec.nbytes,))
    elif dtype == "F4":  # two to a byte, as torch has them
        assert torch_dtype(spec) == (expected, (*shape[:-1], shape[-1] // 2))
    else:
        assert torch_dtype(spec) == (expected, shape)
    arena = filled(64 + spec.nbytes)
    tensor = export_tensor(spec, arena, 64)
    assert (tensor.dtype, tuple(tensor.shape)) == torch_dtype(spec)
    assert tensor.untyped_storage().nbytes() == tensor.nbytes == spec.nbytes
    assert bytes(tensor.reshape(-1).view(torch.uint8).tolist() if spec.nbytes else b"") == bytes(arena)[64:]


@pytest.mark.parametrize("dtype", sorted(set(EXPECTED) | set(LATER)))
def test_scalars(dtype: str) -> None:
    if DTYPE_BITS[dtype] % 8:
        pytest.skip("a scalar that is no whole byte cannot be stored")
    spec = spec_of(dtype, ())
    tensor = export_tensor(spec, filled(spec.nbytes), 0)
    assert (tensor.dim(), tensor.nbytes) == (0, spec.nbytes)


@pytest.mark.parametrize("shape", [(2, 3), ()])
def test_an_odd_row_of_f4_comes_as_bytes(shape: tuple[int, ...]) -> None:
    spec = TensorSpec("t", "F4", shape, "f", 3)
    assert torch_dtype(spec) == (torch.uint8, (3,))
    assert export_tensor(spec, filled(3), 0).tolist() == [0, 7, 14]


def test_an_unknown_dtype_comes_as_bytes() -> None:
    spec = TensorSpec("t", "F5_FUTURE", (8,), "f", 5)
    assert export_tensor(spec, filled(5), 0).tolist() == [0, 7, 14, 21, 28]


@pytest.mark.parametrize("dtype", ["F32", "F8_E4M3", "U16"])  # by DLPack's own type, and by bytes
def test_a_tensor_is_a_storage_of_its_own(dtype: str) -> None:
    arena = filled(256)
    spec = spec_of(dtype, (8,))
    first, second = export_tensor(spec, arena, 0), export_tensor(spec, arena, 64)
    assert second.data_ptr() - first.data_ptr() == 64
    for tensor in (first, second):
        assert tensor.storage_offset() == 0
        assert not tensor._is_view()
        assert tensor._base is None
        assert not tensor.requires_grad
        assert tensor.is_leaf
    before = second.view(torch.uint8).tolist()
    first.view(torch.uint8).fill_(1)
    assert second.view(torch.uint8).tolist() == before
    restored = copy.deepcopy(first)
    assert restored.view(torch.uint8).tolist() == [1] * spec.nbytes
    file = io.BytesIO()
    torch.save(first, file)
    assert file.tell() < 4096
    with pytest.raises(RuntimeError, match="resiz"):  # never over its neighbours
        first.resize_(1000)


def test_a_tensor_keeps_its_arena_alive() -> None:
    tensor = export_tensor(spec_of("I32", (16,)), filled(64), 0)
    gc.collect()
    other = [_core.HostArena(64) for _ in range(100)]
    assert tensor.view(torch.uint8).tolist() == [i * 7 % 256 for i in range(64)]
    del other


def test_a_tensor_outside_of_its_arena_is_refused() -> None:
    arena = _core.HostArena(64)
    for offset, count in ((0, 17), (64, 1), (65, 0), (2**64 - 4, 1), (60, 2), (0, 2**62)):
        with pytest.raises(ValueError, match=r"outside|out of range"):
            arena.tensor(offset, 2, 32, [count])
    with pytest.raises(ValueError, match="out of range"):
        arena.tensor(0, 2, 32, [-1])
    assert arena.nbytes == 64


def test_a_capsule_that_nobody_takes_gives_its_share_back() -> None:
    for _ in range(1000):
        _core.HostArena(1 << 20).tensor(0, 1, 8, [1 << 20])


@pytest.mark.parametrize("size", [0, 1, 4096, (2 << 20) - 1, 2 << 20, (2 << 20) + 1])
def test_an_arena_is_aligned_and_zero(size: int) -> None:
    arena = _core.HostArena(size)
    view = memoryview(arena)
    assert (arena.nbytes, view.nbytes, view.readonly) == (size, size, False)
    assert not any(view[:1000])
    if size:
        tensor = export_tensor(TensorSpec("t", "U8", (size,), "f", size), arena, 0)
        assert tensor.data_ptr() % (2 << 20 if size >= 2 << 20 else 4096) == 0


def test_an_arena_that_does_not_fit_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        _core.HostArena(2**62)


# ---- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*EXPECTED.values(), torch.float8_e8m0fnu])
def test_a_target_is_the_tensors_own_memory(dtype: torch.dtype) -> None:
    target = torch.zeros(4, 6, dtype=dtype)
    imported = import_target("t", target, target.nbytes)
    assert imported.nbytes == target.nbytes


def test_a_target_with_grad_or_in_inference_mode() -> None:
    assert import_target("t", torch.zeros(3, requires_grad=True), 12).nbytes == 12
    with torch.inference_mode():
        made_in_it = torch.zeros(3)
    assert import_target("t", made_in_it, 12).nbytes == 12


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_small_targets(shape: tuple[int, ...]) -> None:
    target = torch.zeros(shape)
    assert import_target("t", target, target.nbytes).nbytes == target.nbytes


def test_targets_that_cannot_be_written() -> None:
    with pytest.raises(FormatError, match="12 bytes, the stored tensor 16"):
        import_target("t", torch.zeros(3), 16)
    with pytest.raises(FormatError):
        import_target("t", torch.zeros(4, 3).t(), 48)  # would be a copy
    with pytest.raises(DeviceError, match="meta"):
        import_target("t", torch.zeros(3, device="meta"), 12)


def test_a_capsule_is_taken_once_and_nothing_else_is_one() -> None:
    from torch.utils.dlpack import to_dlpack

    capsule = to_dlpack(torch.zeros(3))
    _core.ImportedTensor(capsule)
    with pytest.raises(ValueError, match="consumed"):
        _core.ImportedTensor(capsule)
    with pytest.raises(TypeError):
        _core.ImportedTensor(b"capsule")
    with pytest.raises(ValueError, match="contiguous"):
        _core.ImportedTensor(to_dlpack(torch.zeros(4, 3).t()))


@pytest.mark.parametrize(
    ("stored", "wanted", "nbytes"),
    [("F32", None, 64), ("F32", torch.float16, 32), ("BF16", torch.float32, 64), ("I64", torch.float16, 128),
     ("F8_E4M3", torch.float32, 64), ("C64", torch.float16, 128), ("F6_E2M3", torch.float32, 12)],
)  # fmt: skip
def test_bytes_after_conversion(stored: str, wanted: torch.dtype | None, nbytes: int) -> None:
    assert converted_bytes(spec_of(stored, (16,)), wanted) == nbytes

"""The fake CUDA driver and an allocator over it in place of torch's: GPU loads without a GPU.

Device memory of the fake is host memory, so its tensors look like ones of the CPU to torch. What a consumer would see
is read in the order of a fake stream, by `seen`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch

from rdmaload import _core

ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ROOT / "tests/cpp/support/fake_cuda"
_STATE_FIELDS = (
    "device_allocations",
    "device_bytes",
    "peak_device_bytes",
    "host_allocations",
    "host_bytes",
    "registrations",
    "streams",
    "events",
    "copies",
    "launches",
    "context_depth",
    "card_writes",
    "late_writes",
)


class _State(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in _STATE_FIELDS]


def library() -> Path:
    """The fake driver, compiled when its sources are newer."""
    built = ROOT / "build/fake_cuda/libfake_cuda.so"
    sources = [*_SOURCES.iterdir(), *(ROOT / "csrc/device").glob("*_abi.h")]
    if not built.exists() or built.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        built.parent.mkdir(parents=True, exist_ok=True)
        temporary = built.with_suffix(f".{os.getpid()}")
        command = ["c++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-I", "csrc", "-I", "tests/cpp", "-o"]
        files = [str(_SOURCES / name) for name in ("fake_cuda.cpp", "fake_cufile.cpp", "kernels.cpp")]
        subprocess.run([*command, str(temporary), *files], cwd=ROOT, check=True)
        temporary.rename(built)
    return built


class FakeGpu:
    """Two devices, and the `DeviceAllocator` of them. Make one per test; `close` says what is left."""

    is_fake = True
    ordinals = (0, 1)

    def __init__(self, seed: int = 1) -> None:
        path = str(library())
        _core.open_cuda_driver(path, b"any image")
        self.close_cufile()
        self._driver = ctypes.CDLL(path)
        self._driver.fake_cuda_reset(ctypes.c_uint64(seed))
        self._check("cuInit", 0)
        self._contexts = []
        self._streams = []
        self._owned: dict[int, tuple[int, int]] = {}  # address: size, ordinal
        self.recorded: list[tuple[int, int, int]] = []
        """Address, ordinal and stream of each `record_stream`."""
        self.late_fills = False
        """Whether memory comes with work of its last user that is still to run on the current stream."""
        for ordinal in (0, 1):
            context, stream = ctypes.c_void_p(), ctypes.c_void_p()
            self._check("cuDevicePrimaryCtxRetain", ctypes.byref(context), ordinal)
            self._contexts.append(context)
            self._on(ordinal, "cuStreamCreate", ctypes.byref(stream), 1)
            self._streams.append(stream)
        self._base = self.state()

    def open_cufile(self) -> None:
        """The fake cuFile is the process's from now on, closed as yet."""
        self._driver.fake_cufile_reset()
        _core.set_cufile_library(str(library()))

    def close_cufile(self) -> None:
        _core.set_cufile_library("libno-cufile-in-tests.so")

    def close(self) -> None:
        self._driver.fake_cuda_hold(0)
        self._driver.fake_cuda_reset(ctypes.c_uint64(1))
        for ordinal, stream in enumerate(self._streams):
            self._on(ordinal, "cuStreamDestroy_v2", stream)

    def _check(self, function: str, *arguments: object) -> None:
        result = getattr(self._driver, function)(*arguments)
        assert result == 0, f"{function}: {result}"

    def _on(self, ordinal: int, function: str, *arguments: object) -> None:
        mode = ctypes.c_int(2)  # relaxed, as torch calls the driver, whoever captures a graph meanwhile
        self._check("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        self._check("cuCtxPushCurrent_v2", self._contexts[ordinal])
        try:
            self._check(function, *arguments)
        finally:
            self._check("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
            self._check("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def state(self) -> dict[str, int]:
        state = _State()
        self._driver.fake_cuda_state(ctypes.byref(state))
        return {name: getattr(state, name) for name in _STATE_FIELDS}

    def fail_call(self, symbol: str, nth: int, result: int = 2) -> None:
        self._driver.fake_cuda_fail_call(symbol.encode(), nth, result)

    def set_attribute(self, attribute: int, value: int) -> None:
        self._driver.fake_cuda_set_attribute(attribute, value)

    def fail_work(self, nth: int, result: int) -> None:
        self._driver.fake_cuda_fail_work(nth, result)

    def corrupt_copy(self, nth: int) -> None:
        self._driver.fake_cuda_corrupt_copy(nth)

    def set_module_result(self, result: int) -> None:
        """What loading the kernels ends with; a device that has them keeps them."""
        self._driver.fake_cuda_set_module_result(result)

    def begin_capture(self, ordinal: int) -> None:
        """A CUDA graph is captured on the current stream of this device from now on."""
        self._driver.fake_cuda_begin_capture(self._streams[ordinal])

    def end_capture(self) -> bool:
        """Whether nothing spoilt it."""
        return bool(self._driver.fake_cuda_end_capture())

    def late_copy(self, stream: int, ordinal: int, target: torch.Tensor, source: torch.Tensor) -> None:
        """Work of another stream that takes its time: old bytes, and in the end those of `source`, in host memory."""
        on, pointer = ctypes.c_void_p(stream), ctypes.c_uint64(target.data_ptr())
        for _ in range(30):
            self._on(ordinal, "cuMemsetD32Async", pointer, 0xDEADBEEF, ctypes.c_size_t(target.nbytes // 4), on)
        size = ctypes.c_size_t(target.nbytes)
        self._on(ordinal, "cuMemcpyHtoDAsync_v2", pointer, ctypes.c_void_p(source.data_ptr()), size, on)

    def reset_peak(self) -> None:
        self._driver.fake_cuda_reset(ctypes.c_uint64(1))

    def seen(self, tensor: torch.Tensor) -> torch.Tensor:
        """What work on the tensor's current stream sees from now on, as a copy in host memory."""
        copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        if not tensor.nbytes:
            return copy
        ordinal = self.ordinal_of(tensor)
        assert ordinal is not None, "the tensor is not on a device"
        stream, size = self._streams[ordinal], ctypes.c_size_t(tensor.nbytes)
        pointers = ctypes.c_void_p(copy.data_ptr()), ctypes.c_uint64(tensor.data_ptr())
        self._on(ordinal, "cuMemcpyDtoHAsync_v2", *pointers, size, stream)
        self._on(ordinal, "cuStreamSynchronize", stream)
        return copy

    # What DeviceAllocator asks for:

    def unavailable_reason(self) -> str | None:
        return None

    def device_count(self) -> int:
        return 2

    def current_device(self) -> int:
        return 1

    def ordinal_of(self, tensor: torch.Tensor) -> int | None:
        pointer = tensor.data_ptr()
        for address, (size, ordinal) in self._owned.items():
            if address <= pointer < address + size:
                return ordinal
        return None

    def empty(self, shape: Sequence[int], dtype: torch.dtype, ordinal: int) -> torch.Tensor:
        nbytes = torch.empty(tuple(shape), dtype=dtype, device="meta").nbytes
        if nbytes == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        pointer = ctypes.c_uint64()
        self._on(ordinal, "cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(nbytes))
        memory = (ctypes.c_ubyte * nbytes).from_address(pointer.value)
        weakref.finalize(memory, self._free, pointer.value, ordinal)
        self._owned[pointer.value] = (nbytes, ordinal)
        if self.late_fills:
            words = ctypes.c_size_t(nbytes // 4)
            for _ in range(5):
                self._on(ordinal, "cuMemsetD32Async", pointer, 0xDEADBEEF, words, self._streams[ordinal])
        return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).reshape(tuple(shape))

    def _free(self, address: int, ordinal: int) -> None:
        del self._owned[address]
        self._on(ordinal, "cuStreamSynchronize", self._streams[ordinal])  # our own late fills
        self._on(ordinal, "cuMemFree_v2", ctypes.c_uint64(address))

    def current_stream(self, ordinal: int) -> int:
        return self._streams[ordinal].value or 0

    def record_stream(self, tensor: torch.Tensor, ordinal: int, stream: int) -> None:
        self.recorded.append((tensor.data_ptr(), ordinal, stream))

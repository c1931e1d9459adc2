"""GPUs as destinations: where their memory comes from, and the order between torch's streams and ours.

The memory is torch's: engines profile it and give it back through torch. What this package needs of torch is the
protocol `DeviceAllocator`, so that all the rest runs without a GPU on a fake driver. One `DeviceRoad` serves one load,
iteration or filling; use it from one thread.

The contract of streams: our stream waits for what torch's current stream has to do when destinations are made, before
the first write into them; the current stream waits for our copies before tensors are handed out; each tensor is
recorded on our stream, so that torch does not give its memory to somebody else while we may write.
"""

from __future__ import annotations

import atexit
import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from rdmaload import _core
from rdmaload.errors import DeviceError, NotSupportedError
from rdmaload.options import Options
from rdmaload.stats import LoadStats
from rdmaload.tensors import TensorSpec, torch_dtype

if TYPE_CHECKING:
    import torch

__all__ = [
    "DeviceAllocator",
    "DeviceRoad",
    "TorchAllocator",
    "allocator",
    "checked_device",
    "copy_in_slices",
    "open_road",
]

_log = logging.getLogger("rdmaload")

# Kept between loads; the driver may be gone after the end of main.
atexit.register(_core.release_pinned_memory)

_FLOATS = {"torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float32": "F32"}


class DeviceAllocator(Protocol):
    """What is needed of torch for CUDA devices; `ordinal` is torch's device index."""

    def unavailable_reason(self) -> str | None:
        """Why there are no CUDA devices; None when there are some."""

    def device_count(self) -> int: ...

    def current_device(self) -> int: ...

    def ordinal_of(self, tensor: torch.Tensor) -> int | None:
        """The device that the tensor is on; None for other memory."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, ordinal: int) -> torch.Tensor:
        """An uninitialised tensor. Raises DeviceError when there is no room."""

    def current_stream(self, ordinal: int) -> int:
        """The handle of the stream that torch puts this thread's work on."""

    def record_stream(self, tensor: torch.Tensor, ordinal: int, stream: int) -> None:
        """The memory is not given out again before work that is on `stream` when it is freed."""


class TorchAllocator:
    """torch's own CUDA memory and streams."""

    def unavailable_reason(self) -> str | None:
        import torch

        if torch.version.cuda is None and torch.version.hip is None:
            return f"this torch ({torch.__version__}) is built for the CPU: install one with CUDA"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device: is there a GPU, its driver, and is it in CUDA_VISIBLE_DEVICES?"
        return None

    def device_count(self) -> int:
        import torch

        return torch.cuda.device_count()

    def current_device(self) -> int:
        import torch

        return torch.cuda.current_device()

    def ordinal_of(self, tensor: torch.Tensor) -> int | None:
        return tensor.device.index if tensor.device.type == "cuda" else None

    def empty(self, shape: Sequence[int], dtype: torch.dtype, ordinal: int) -> torch.Tensor:
        import torch

        try:
            return torch.empty(tuple(shape), dtype=dtype, device=f"cuda:{ordinal}")
        except torch.OutOfMemoryError as err:
            raise DeviceError(f"cuda:{ordinal} has no room for a tensor of {list(shape)} {dtype}: {err}") from err

    def current_stream(self, ordinal: int) -> int:
        import torch

        return int(torch.cuda.current_stream(ordinal).cuda_stream)

    def record_stream(self, tensor: torch.Tensor, ordinal: int, stream: int) -> None:
        import torch

        tensor.record_stream(torch.cuda.ExternalStream(stream, device=f"cuda:{ordinal}"))  # type: ignore[no-untyped-call]


@functools.cache
def _torch_allocator() -> DeviceAllocator:
    return TorchAllocator()


def allocator() -> DeviceAllocator:
    """The one that loads use."""
    return _torch_allocator()


def checked_device(device: str | torch.device) -> torch.device:
    """The device, with its index, if this process has it. Raises DeviceError before anything is read."""
    import torch

    try:
        checked = torch.device(device)
    except RuntimeError as err:
        raise DeviceError(f"device={device!r} is no device that torch knows: {err}") from err
    if checked.type == "meta":
        raise DeviceError(
            "device='meta' holds no bytes: Model.tensors has names, dtypes and shapes without reading any"
        )
    if checked.type != "cuda":
        return checked
    devices = allocator()
    if reason := devices.unavailable_reason():
        raise DeviceError(f"device={str(device)!r}: {reason}")
    index = devices.current_device() if checked.index is None else checked.index
    if index >= devices.device_count():
        raise DeviceError(f"device={str(device)!r}: torch sees {devices.device_count()} CUDA devices here")
    return torch.device("cuda", index)


class DeviceRoad:
    """Reads of one source into memory of one GPU, straight or through page-locked buffers. Raises DeviceError."""

    def __init__(
        self,
        source: _core.Transport,
        ordinal: int,
        options: Options,
        *,
        read_bytes: int,
        expected_bytes: int,
        trace: bool = False,
    ) -> None:
        self._devices = allocator()
        self._ordinal = ordinal
        # A quarter each, at most, for what the roads need themselves; tensors on their way have the rest.
        part = options.device_extra_bytes // 4
        self.staged = _core.StagedTransport(
            source,
            device=ordinal,
            read_bytes=read_bytes,
            staging_bytes=options.staging_bytes,
            expected_bytes=expected_bytes,
            block_bytes=part,
            verify_device=options.verify_device == "on",
            trace=trace,
        )
        self.transport: _core.Transport = self.staged
        """What reads are submitted to."""
        self.extra_bytes = options.device_extra_bytes - self.staged.block_bytes
        self.direct_refusal = ""
        """Why GPUDirect Storage, or GPUDirect RDMA, is not used where it could have been."""
        if isinstance(source, _core.FileTransport) and options.file_io != "buffered" and options.gds == "auto":
            try:
                gds = _core.GdsTransport(
                    source,
                    self.staged,
                    device=ordinal,
                    read_bytes=read_bytes,
                    device_bytes=part,
                    verify_device=options.verify_device == "on",
                )
            except NotSupportedError as error:
                self.direct_refusal = str(error)
            else:
                self.transport = gds
                self.extra_bytes -= gds.block_bytes
        self._network: _core.RdmaDeviceTransport | None = None
        if isinstance(source, _core.RdmaTransport) and options.gpudirect == "auto":
            try:
                self._network = self.transport = _core.RdmaDeviceTransport(
                    source, self.staged, device=ordinal, verify_device=options.verify_device == "on"
                )
            except NotSupportedError as error:
                self.direct_refusal = str(error)
        self.queued_bytes = max(options.staging_bytes, 2 * read_bytes)
        self._not_here = ""
        self._verified_before = 0

    @property
    def path(self) -> str:
        """For `stats.path`: it is known only while files are read, which way they go."""
        return self.transport.path

    @property
    def fallback_reason(self) -> str:
        """Why a faster way was not taken; empty when none was given up."""
        is_direct = "file-direct" in self.path or self.path.startswith("resp-rdma")
        direct = self.direct_refusal if is_direct else ""
        return self.transport.fallback_reason or direct or self._not_here

    def newly_verified_bytes(self) -> int:
        """Bytes whose checksum the device has computed since the last call."""
        verified = self.staged.staging_counters()["verified_bytes"]
        if isinstance(self.transport, _core.GdsTransport | _core.RdmaDeviceTransport):
            verified += self.transport.verified_bytes
        newly, self._verified_before = verified - self._verified_before, verified
        return newly

    def note_host_way(self, stats: LoadStats) -> None:
        """A tensor was too large to be converted or rearranged on the device."""
        self._note(
            "tensors that are larger than device_extra_bytes leaves room for were converted in host memory", stats
        )

    def _note(self, reason: str, stats: LoadStats) -> None:
        if not self._not_here:
            self._not_here = reason
            _log.warning("%s", reason)
        stats.fallback_reason = stats.fallback_reason or reason

    def empty(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor for what is stored."""
        dtype, shape = torch_dtype(spec)
        return self._devices.empty(shape, dtype, self._ordinal)

    def destinations(self, tensors: Sequence[torch.Tensor]) -> list[_core.DeviceDestination]:
        """The memory of contiguous tensors of this device, for reads that are submitted from now on."""
        stream = self._devices.current_stream(self._ordinal)
        self.staged.follow(stream)
        if self._network is not None:
            self._network.follow(stream)
        return [_core.DeviceDestination(tensor.data_ptr(), tensor.nbytes, tensor) for tensor in tensors]

    def hand_out(self, tensors: Sequence[torch.Tensor]) -> None:
        """Let torch's current stream use what has arrived in these tensors."""
        self.staged.lead(self._devices.current_stream(self._ordinal))
        for tensor in tensors:
            if tensor.nbytes:
                self._devices.record_stream(tensor, self._ordinal, self.staged.stream)

    def empty_as(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of another type than the stored one."""
        return self._devices.empty(shape, dtype, self._ordinal)

    def converted(self, tensor: torch.Tensor, dtype: torch.dtype, stats: LoadStats) -> torch.Tensor:
        """The tensor in another floating-point type; by a kernel on torch's current stream, or by torch."""
        source, target = _FLOATS.get(str(tensor.dtype)), _FLOATS.get(str(dtype))
        if source is None or target is None or not tensor.nbytes:
            return tensor.to(dtype)
        made = self._devices.empty(tensor.shape, dtype, self._ordinal)
        stream = self._devices.current_stream(self._ordinal)
        if _core.convert_on_device(
            self._ordinal, tensor.data_ptr(), source, made.data_ptr(), target, tensor.numel(), stream
        ):
            return made
        self._note(f"torch converted on the GPU: {self.staged.no_kernels_reason}", stats)
        return tensor.to(dtype)


def copy_in_slices(target: torch.Tensor, source: torch.Tensor, slice_bytes: int) -> None:
    """Copy from the host to a device, where torch may need as much room again as a slice has, never more.

    For a target that is not contiguous torch makes a contiguous copy of its type on the device first.
    """
    wide = source.numel() * max(source.element_size(), target.element_size())
    if wide <= slice_bytes or source.numel() <= 1:
        target.copy_(source)
        return
    dim = next(dim for dim, size in enumerate(source.shape) if size > 1)
    step = max(1, source.shape[dim] * slice_bytes // wide)
    for start in range(0, source.shape[dim], step):
        count = min(step, source.shape[dim] - start)
        copy_in_slices(target.narrow(dim, start, count), source.narrow(dim, start, count), slice_bytes)


def open_road(
    source: _core.Transport,
    ordinal: int,
    options: Options,
    stats: LoadStats,
    *,
    read_bytes: int,
    expected_bytes: int,
) -> DeviceRoad | None:
    """The road to a GPU; None, with the reason logged and in `stats`, where this process has no CUDA driver."""
    try:
        return DeviceRoad(source, ordinal, options, read_bytes=read_bytes, expected_bytes=expected_bytes)
    except NotSupportedError as error:
        if options.verify_device == "on":
            raise
        stats.fallback_reason = f"loaded through host memory and torch: {error}"
        _log.warning("%s", stats.fallback_reason)
        return None

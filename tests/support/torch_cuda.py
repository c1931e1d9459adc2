"""torch's own way to a GPU over the fake driver, as far as benchmarks use it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.support.fake_gpu import FakeGpu


def _is_cuda(place: Any) -> bool:
    return isinstance(place, (str, torch.device)) and str(place).startswith("cuda")


class _OnTheFake(TorchFunctionMode):
    """Tensors that torch would make on a CUDA device, or move to one, are the fake's."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs.pop("pin_memory", None)
            if _is_cuda(kwargs.get("device")):
                shape = (args[0],) if isinstance(args[0], int) else args[0]
                return self._gpu.empty(shape, kwargs["dtype"], torch.device(kwargs["device"]).index or 0)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            moved = self._gpu.empty(args[0].shape, args[0].dtype, torch.device(args[1]).index or 0)
            return moved.copy_(args[0])
        return func(*args, **kwargs)


class _Event:
    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self._when = 0.0

    def record(self) -> None:
        self._when = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return max(1e-3, (end._when - self._when) * 1e3)


@contextmanager
def torch_cuda_on(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.cuda with the fake's devices, on this thread."""
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Fake GPU")
    with _OnTheFake(gpu):
        yield

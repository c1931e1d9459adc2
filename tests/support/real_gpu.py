"""A real GPU where the tests otherwise use the fake: the same questions, answered by torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rdmaload.devices import TorchAllocator


class RealGpu(TorchAllocator):
    """torch's allocator, with the parts of FakeGpu that make sense on hardware."""

    is_fake = False

    def __init__(self) -> None:
        self.recorded: list[tuple[int, int, int]] = []
        self.late_fills = False
        self.ordinals = (0, 1) if torch.cuda.device_count() > 1 else (0, 0)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, ordinal: int) -> torch.Tensor:
        made = super().empty(shape, dtype, ordinal)
        if self.late_fills and made.nbytes:
            with torch.cuda.device(ordinal):
                torch.cuda._sleep(500_000)  # clock ticks: the fill below comes late
                made.reshape(-1).view(torch.uint8).fill_(0xDE)
        return made

    def record_stream(self, tensor: torch.Tensor, ordinal: int, stream: int) -> None:
        self.recorded.append((tensor.data_ptr(), ordinal, stream))
        super().record_stream(tensor, ordinal, stream)

    def seen(self, tensor: torch.Tensor) -> torch.Tensor:
        """What work on torch's current stream sees from now on."""
        return tensor.cpu()

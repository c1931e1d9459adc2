"""Which tensors of a state dict SGLang saves, and looks for when it loads: a rule that both sides must share."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["engine_state"]

_log = logging.getLogger("rdmaload")


def engine_state(state: Mapping[str, object]) -> dict[str, object]:
    """The tensors of a state dict that SGLang saves and looks for: of those in the same memory the largest, or the one
    with the smallest name; empty tensors are left out. What is no plain tensor stays, and is refused later."""
    import torch

    kept: dict[str, object] = {}
    places: dict[tuple[torch.device, int], list[tuple[str, int, int]]] = {}
    spans: dict[str, tuple[tuple[torch.device, int], int, int]] = {}
    for name, tensor in state.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not hasattr(tensor, "to_local")
        if not plain or not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
            kept[name] = tensor
        elif tensor.numel() == 0:
            _log.warning("%s is empty: SGLang neither saves nor expects it, and it is left out", name)
        elif not tensor.is_contiguous():
            kept[name] = tensor
        else:
            begin = tensor.data_ptr()
            place = (tensor.device, tensor.untyped_storage().data_ptr())
            spans[name] = (place, begin, begin + tensor.nbytes)
            places.setdefault(place, []).append((name, begin, begin + tensor.nbytes))
            kept[name] = tensor
    for name, (place, begin, end) in spans.items():
        for other, first, last in places[place]:
            covered = first <= begin and end <= last
            if covered and ((first, last) != (begin, end) or other < name):
                del kept[name]
                break
    return kept

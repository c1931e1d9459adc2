"""Existing tensors that a load fills: a module's parameters and buffers, or a mapping's values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rdmaload.errors import DeviceError, LayoutMismatchError
from rdmaload.tensors import TensorSpec, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Targets"]

_SHOWN_NAMES = 5


class Targets(Mapping[str, "torch.Tensor"]):
    """The targets by name, checked against the stored tensors `specs` before anything is read."""

    def __init__(
        self, target: nn.Module | Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec], url: str
    ) -> None:
        from torch import nn

        named = target.state_dict(keep_vars=True) if isinstance(target, nn.Module) else target
        self._tensors: dict[str, torch.Tensor] = {name: tensor.detach() for name, tensor in named.items()}
        self._specs = specs
        self._url = url
        for name, tensor in self._tensors.items():
            if name in specs:
                self._check_shape(name, tensor)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _check_shape(self, name: str, tensor: torch.Tensor) -> None:
        _, shape = torch_dtype(self._specs[name])
        if tuple(tensor.shape) != shape:
            raise LayoutMismatchError(
                f"{self._url}: {name} has shape {list(shape)}, its target {list(tensor.shape)}", url=self._url
            )
        if tensor.device.type == "meta":
            raise DeviceError(
                f"{self._url}: the target of {name} is on the meta device: materialise it first "
                "(module.to_empty(device=...))",
                url=self._url,
            )

    def check_names(self, *, strict: bool, filtered: bool) -> None:
        """With `strict`, refuse names that only one side has; a filtered load leaves targets out on purpose."""
        if not strict:
            return
        unexpected = [name for name in self._specs if name not in self._tensors]
        missing = []
        if not filtered:
            loaded = [self._tensors[name] for name in self._specs if name in self._tensors]
            places = {(tensor.data_ptr(), tensor.shape) for tensor in loaded}
            missing = [
                name
                for name, tensor in self._tensors.items()
                if name not in self._specs and (tensor.data_ptr(), tensor.shape) not in places
            ]
        if missing or unexpected:
            raise LayoutMismatchError(
                f"{self._url} and the target differ: "
                + "; ".join(
                    f"{len(names)} {what} ({', '.join(names[:_SHOWN_NAMES])}{', ...' if len(names) > _SHOWN_NAMES else ''})"
                    for names, what in ((missing, "not stored"), (unexpected, "not in the target"))
                    if names
                )
                + "; strict=False loads what both have",
                url=self._url,
            )

    def direct(self, name: str, *, cast: bool) -> bool:
        """Whether the stored bytes can be received in place. Raises TypeError for a dtype that needs `cast`."""
        tensor = self._tensors[name]
        dtype, _ = torch_dtype(self._specs[name])
        if tensor.dtype != dtype and not cast:
            raise TypeError(
                f"{self._url}: {name} is stored as {dtype}, its target is {tensor.dtype}; cast=True converts"
            )
        return tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous()

    def is_same_memory(self, name: str, others: list[str]) -> bool:
        """Whether one of `others` is the same tensor in memory: tied in the target as it is in the store."""
        tensor = self._tensors[name]
        return any(
            self._tensors[other].data_ptr() == tensor.data_ptr() and self._tensors[other].stride() == tensor.stride()
            for other in others
        )

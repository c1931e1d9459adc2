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
        import torch
        from torch import nn

        named = target.state_dict(keep_vars=True) if isinstance(target, nn.Module) else target
        if not isinstance(named, Mapping):
            raise TypeError(f"the target is a {type(target).__name__}, neither a module nor a mapping of tensors")
        self._tensors: dict[str, torch.Tensor] = {}
        for name, tensor in named.items():
            if isinstance(tensor, torch.Tensor):
                self._tensors[name] = tensor.detach()
            elif name in specs:  # else a module's extra state, which is no concern of ours
                raise TypeError(f"the target of {name} is a {type(tensor).__name__}, not a tensor")
        self._specs = specs
        self._url = url
        self._claimed: set[int] = set()
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
            differences = [_listed(missing, "not stored"), _listed(unexpected, "not in the target")]
            raise LayoutMismatchError(
                f"{self._url} and the target differ: {'; '.join(filter(None, differences))}; strict=False loads what "
                "both have",
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

    def is_same_memory(self, name: str, other: str) -> bool:
        """Whether both targets are one tensor in memory: tied in the target as they are in the store."""
        one, two = self._tensors[name], self._tensors[other]
        return (one.data_ptr(), one.stride(), one.dtype) == (two.data_ptr(), two.stride(), two.dtype)

    def claim(self, name: str) -> bool:
        """Whether nothing else is received in this target's memory: two stored tensors at once would mix."""
        tensor = self._tensors[name]
        if tensor.numel() > 0 and tensor.data_ptr() in self._claimed:
            return False
        self._claimed.add(tensor.data_ptr())
        return True


def _listed(names: list[str], what: str) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > _SHOWN_NAMES else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN_NAMES])}{more})"

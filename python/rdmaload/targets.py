"""Existing tensors that a load fills: a module's parameters and buffers, or a mapping's values."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn

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
        self._claimed = _Intervals()
        for name, tensor in self._tensors.items():
            if name in specs:
                self._check(name, tensor)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        import torch

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
        if tensor.layout != torch.strided:
            self._refuse(name, f"is {tensor.layout}: load into a dense tensor")
        if tensor.is_conj() or tensor.is_neg():
            self._refuse(name, "is a conjugated or negated view: load into what it is a view of")
        if _overlaps_itself(tensor):
            self._refuse(name, "has elements that share memory, as expand() makes them: load into its clone()")

    def _refuse(self, name: str, why: str) -> NoReturn:
        raise LayoutMismatchError(f"{self._url}: the target of {name} {why}", url=self._url)

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
        return tensor.dtype == dtype and tensor.device.type in ("cpu", "cuda") and tensor.is_contiguous()

    def is_same_memory(self, name: str, other: str) -> bool:
        """Whether both targets are one tensor in memory: tied in the target as they are in the store."""
        one, two = self._tensors[name], self._tensors[other]
        return (one.data_ptr(), one.stride(), one.dtype) == (two.data_ptr(), two.stride(), two.dtype)

    def claim(self, name: str) -> bool:
        """Whether no target claimed before lies in this one's memory: two that are received at once would mix.

        Claim every target, in the order in which the last one wins, also those that are not received in place.
        """
        tensor = self._tensors[name]
        if tensor.numel() == 0:
            return True
        begin = tensor.data_ptr()
        return self._claimed.add(begin, begin + _span(tensor) * tensor.element_size())


class _Intervals:
    """A union of half-open intervals."""

    def __init__(self) -> None:
        # Sorted and disjoint: those that overlap are merged.
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, begin: int, end: int) -> bool:
        """Add an interval that is not empty; whether all of it is new."""
        first = bisect_right(self._ends, begin)
        last = bisect_left(self._begins, end)
        is_new = first == last
        if not is_new:
            begin = min(begin, self._begins[first])
            end = max(end, self._ends[last - 1])
        self._begins[first:last] = [begin]
        self._ends[first:last] = [end]
        return is_new


def _span(tensor: torch.Tensor) -> int:
    """From the first to the last element of a tensor that is not empty, in elements."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0:
        return False
    is_expanded = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return is_expanded or _span(tensor) < tensor.numel()


def _listed(names: list[str], what: str) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > _SHOWN_NAMES else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN_NAMES])}{more})"

"""A state dict seen as safetensors files, without writing or holding them.

Each file is a header and a list of tensors in the order of the safetensors writer; a range of it
is produced on demand. Contiguous host memory is copied straight from the tensor; strided and device
tensors go through copies of the few rows that the range covers, so that memory stays bounded
whatever the size of the tensor. Any thread may read; nobody may change the tensors meanwhile.
"""

from __future__ import annotations

import bisect
import ctypes
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rdmaload.errors import NotSupportedError
from rdmaload.sources import BytesSource, Source, SourceModel

if TYPE_CHECKING:
    import torch

__all__ = ["state_dict_model"]

# What the Hugging Face writers put into one file at most.
_FILE_BYTES = 5_000_000_000

# safetensors name and torch name, in the order in which the safetensors writer lays them out
# (widest alignment first), so that the files are the same bytes as its own.
_DTYPES = (
    ("U64", "uint64"),
    ("I64", "int64"),
    ("F64", "float64"),
    ("C64", "complex64"),
    ("F32", "float32"),
    ("U32", "uint32"),
    ("I32", "int32"),
    ("BF16", "bfloat16"),
    ("F16", "float16"),
    ("U16", "uint16"),
    ("I16", "int16"),
    ("F8_E5M2FNUZ", "float8_e5m2fnuz"),
    ("F8_E4M3FNUZ", "float8_e4m3fnuz"),
    ("F8_E8M0", "float8_e8m0fnu"),
    ("F8_E4M3", "float8_e4m3fn"),
    ("F8_E5M2", "float8_e5m2"),
    ("I8", "int8"),
    ("U8", "uint8"),
    ("F4", "float4_e2m1fn_x2"),
    ("BOOL", "bool"),
)


def state_dict_model(state: Mapping[str, object], *, rank: int | None, world_size: int | None) -> SourceModel:
    """Virtual safetensors files of at most 5 GB. Tensors that are the same memory are stored once;
    the other names are kept as tied."""
    tensors, tied = _unique(state)
    groups = _split(tensors)
    files: list[Source] = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups):
        if rank is not None:
            path = f"model-rank-{rank}-part-{number}.safetensors"
        elif len(groups) == 1:
            path = "model.safetensors"
        else:
            path = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        aliases = {alias: name for alias, name in tied.items() if name in names}
        files.append(_TensorFile(path, {name: tensors[name] for name in names}, aliases, rank))
        weight_map.update(dict.fromkeys(names, path))
    if rank is None and len(groups) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        text = json.dumps(
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
            indent=2,
        )
        files.append(BytesSource("model.safetensors.index.json", f"{text}\n".encode()))
    return SourceModel(
        files,
        kind="checkpoint" if rank is None else "sharded",
        world_size=world_size or 1,
    )


def _unique(state: Mapping[str, object]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, value in state.items():
        tensor = _checked(name, value)
        place = tensor.untyped_storage().data_ptr()
        key = (
            str(tensor.device),
            place,
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            tensor.is_conj(),
            tensor.is_neg(),
        )
        first = seen.setdefault(key, name) if place and tensor.numel() else name
        if first == name:
            tensors[name] = tensor
        else:
            tied[name] = first
    return tensors, tied


def _checked(name: object, value: object) -> torch.Tensor:
    """`value` as a plain dense tensor without its gradient, or an error that names it."""
    import torch

    def refuse(what: str) -> NotSupportedError:
        return NotSupportedError(f"{name!r} {what}")

    if not isinstance(name, str):
        raise refuse("is not a name: a state dict maps str to torch.Tensor")
    if name == "__metadata__":
        raise refuse("cannot be saved: safetensors reserves that name")
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise refuse("is not Unicode text")
    if not isinstance(value, torch.Tensor):
        raise refuse(f"is a {type(value).__name__}, not a tensor; leave it out of the state dict")
    tensor = value.detach()
    if hasattr(value, "to_local"):
        raise refuse("is a distributed tensor; save its to_local() or full_tensor()")
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        kind = type(value).__name__
        raise refuse(f"is a {kind}, which has no memory of its own; save the plain tensors behind it")
    if tensor.is_quantized:
        raise refuse("is a quantised tensor; save its int_repr(), scale and zero point")
    if tensor.is_nested or tensor.layout != torch.strided:
        raise refuse(f"is sparse or nested ({tensor.layout}); save its to_dense()")
    if tensor.device.type == "meta":
        raise refuse("is on the meta device and has no data; materialise the module first")
    if tensor.dtype not in _dtype_names():
        raise refuse(f"has dtype {tensor.dtype}, which safetensors cannot hold")
    if tensor.dim() == 0 and tensor.dtype == getattr(torch, "float4_e2m1fn_x2", None):
        raise refuse("is a scalar of packed 4-bit floats, which safetensors cannot hold")
    return tensor


def _dtype_names() -> dict[torch.dtype, tuple[int, str]]:
    """torch dtype -> (place in the writer's order, safetensors name), for those this torch has."""
    import torch

    return {
        getattr(torch, torch_name): (place, name)
        for place, (name, torch_name) in enumerate(_DTYPES)
        if hasattr(torch, torch_name)
    }


def _split(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names per file, in the order of the state dict; a larger tensor has a file of its own."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        if groups[-1] and held + tensor.nbytes > _FILE_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += tensor.nbytes
    return groups


class _TensorFile(Source):
    """One safetensors file over tensors that stay where they are."""

    def __init__(
        self,
        path: str,
        tensors: Mapping[str, torch.Tensor],
        tied: Mapping[str, str],
        rank: int | None,
    ) -> None:
        names = _dtype_names()
        order = sorted(tensors.items(), key=lambda item: (names[item[1].dtype][0], item[0].encode()))
        # "format" is what transformers asks for; tied names are written the way safetensors'
        # save_model does, for readers of the plain file.
        metadata = {"format": "pt"}
        metadata.update({alias: name for alias, name in tied.items() if alias != "format"})
        header: dict[str, object] = {"__metadata__": metadata}
        pieces: list[torch.Tensor] = []
        starts: list[int] = []
        offset = 0
        for name, tensor in order:
            dtype = names[tensor.dtype][1]
            shape = list(tensor.shape)
            if dtype == "F4":  # two values per byte: torch counts bytes, safetensors values
                shape[-1] *= 2
            size = tensor.nbytes
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            if size:
                pieces.append(tensor)
                starts.append(offset)
            offset += size
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        super().__init__(path, 8 + len(text) + offset, header=text, rank=rank, tied=tied)
        self._head = memoryview(len(text).to_bytes(8, "little") + text)
        self._tensors = pieces
        self._starts = [start + len(self._head) for start in starts]

    def read_into(self, offset: int, buffer: memoryview) -> int:
        end = min(offset + len(buffer), self.size)
        at = offset
        while at < end:
            if at < len(self._head):
                part = self._head[at:end]
                buffer[at - offset : at - offset + len(part)] = part
                at += len(part)
                continue
            which = bisect.bisect_right(self._starts, at) - 1
            tensor, start = self._tensors[which], self._starts[which]
            stop = min(end, start + tensor.nbytes)
            copy_bytes(tensor, at - start, buffer[at - offset : stop - offset])
            at = stop
        return max(0, end - offset)


def copy_bytes(tensor: torch.Tensor, start: int, buffer: memoryview) -> None:
    """Copy the bytes of `tensor` in row-major order, from byte `start`, into all of `buffer`."""
    width = tensor.element_size()
    first = start // width
    skip = start - first * width
    last = -(-(start + len(buffer)) // width)
    done = 0
    for piece in _pieces(tensor, first, last):
        # `piece` is alive until the copy is done: the view holds its address only.
        view = _memory(piece)[skip : skip + len(buffer) - done]
        skip = 0
        buffer[done : done + len(view)] = view
        done += len(view)


def _pieces(tensor: torch.Tensor, first: int, last: int) -> Iterator[torch.Tensor]:
    """Elements first..last in row-major order as contiguous host tensors. What is copied for it is
    at most about three times the range: a long row is divided into rows of its own."""
    plain = tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg()
    if tensor.is_contiguous():
        piece = tensor.reshape(-1)[first:last]
        yield piece if plain else _on_host(piece)
        return
    row = tensor.numel() // tensor.shape[0]
    top, bottom = first // row, -(-last // row)
    if row > last - first and tensor.dim() > 1:
        for number in range(top, bottom):
            begin = max(first - number * row, 0)
            yield from _pieces(tensor[number], begin, min(last - number * row, row))
        return
    piece = _on_host(tensor[top:bottom])
    yield piece.reshape(-1)[first - top * row : last - top * row]


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg().to("cpu").contiguous()


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous host tensor; the caller keeps the tensor alive."""
    raw = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(raw).cast("B")

"""Checkpoints of random bytes in the shapes of real models, and their comparison byte by byte.

Nothing here needs torch, so that a tensor of any safetensors dtype can be written and compared,
also of those that torch lacks. The same seed and the same names give the same bytes on every
machine.
"""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPE_BITS",
    "Checkpoint",
    "Mismatch",
    "TensorSpec",
    "all_dtypes",
    "compare",
    "llama_like",
    "make_checkpoint",
    "many_files",
    "many_tensors",
    "one_large_tensor",
    "read_safetensors",
    "weight_files",
    "write_safetensors",
]

# Every dtype of safetensors 0.8 and its width. The elements of the F4 and F6 types are packed.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

# Random bytes are made and written in blocks that stay in the second-level cache.
BLOCK_BYTES = 1 << 20


class Mismatch(AssertionError):
    """Loaded tensors differ from the files; the message names the first tensor that does."""


@dataclass(frozen=True)
class TensorSpec:
    """The safetensors dtype and the shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = math.prod(self.shape) * DTYPE_BITS[self.dtype]
        if bits % 8:
            raise ValueError(f"{self.dtype} {list(self.shape)} does not end on a byte")
        return bits // 8


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in a directory. `bytes` counts tensor bytes, `file_bytes` all files whole."""

    directory: Path
    tensors: Mapping[str, TensorSpec]

    @property
    def bytes(self) -> int:
        return sum(spec.bytes for spec in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.directory.iterdir())

    @property
    def weight_files(self) -> list[Path]:
        return weight_files(self.directory)


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files at the root of `directory`, sorted by name."""
    return sorted(Path(directory).glob("*.safetensors"))


def _blocks(name: str, spec: TensorSpec, seed: int) -> Iterator[memoryview]:
    """The bytes of one tensor, as a function of its name and the seed alone."""
    source = numpy.random.SFC64([seed, zlib.crc32(name.encode()), spec.bytes])
    for start in range(0, spec.bytes, BLOCK_BYTES):
        count = min(BLOCK_BYTES, spec.bytes - start)
        words = source.random_raw(-(-count // 8))  # faster than any method of Generator
        block = words.view(numpy.uint8)[:count]
        if spec.dtype == "BOOL":  # any byte but 0 and 1 is undefined behaviour for its readers
            block &= 1
        yield block.data


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, TensorSpec | tuple[str, Iterable[int]]],
    *,
    seed: int = 0,
    data: Mapping[str, bytes] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, TensorSpec]:
    """Write one file, its tensors in the given order, with random bytes or those of `data`."""
    specs = {
        name: spec if isinstance(spec, TensorSpec) else TensorSpec(spec[0], tuple(spec[1]))
        for name, spec in tensors.items()
    }
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.bytes],
        }
        offset += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=BLOCK_BYTES) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            given = None if data is None else data.get(name)
            if given is not None and len(given) != spec.bytes:
                raise ValueError(f"{name}: {len(given)} bytes given, {spec.bytes} needed")
            for block in _blocks(name, spec, seed) if given is None else (given,):
                file.write(block)
    return specs


def _read_header(
    file: io.RawIOBase | io.BufferedIOBase,
) -> tuple[dict[str, tuple[TensorSpec, int]], int]:
    """Name -> (spec, offset in the body) of every tensor, and where the body begins."""
    length = int.from_bytes(file.read(8) or b"", "little")
    entries = json.loads(file.read(length) or b"")
    entries.pop("__metadata__", None)
    return {
        name: (TensorSpec(entry["dtype"], tuple(entry["shape"])), entry["data_offsets"][0])
        for name, entry in entries.items()
    }, 8 + length


def read_safetensors(path: str | Path) -> dict[str, tuple[TensorSpec, memoryview]]:
    """Name -> (spec, bytes) of every tensor of one file, read by this module's own few lines."""
    with open(path, "rb") as file:
        header, body = _read_header(file)
        file.seek(body)
        data = memoryview(file.read())
    return {name: (spec, data[begin : begin + spec.bytes]) for name, (spec, begin) in header.items()}


def _split(tensors: Mapping[str, TensorSpec], files: int) -> list[dict[str, TensorSpec]]:
    """Consecutive tensors in `files` groups of about equal size, each of at least one tensor."""
    if not 1 <= files <= len(tensors):
        raise ValueError(f"{len(tensors)} tensors cannot fill {files} files")
    total = sum(spec.bytes for spec in tensors.values())
    groups: list[dict[str, TensorSpec]] = [{}]
    done = 0
    for position, (name, spec) in enumerate(tensors.items()):
        rest = len(tensors) - position
        full = done * files >= total * len(groups)
        if groups[-1] and len(groups) < files and (full or rest == files - len(groups)):
            groups.append({})
        groups[-1][name] = spec
        done += spec.bytes
    return groups


def make_checkpoint(
    directory: str | Path,
    tensors: Mapping[str, TensorSpec | tuple[str, Iterable[int]]],
    *,
    files: int = 1,
    seed: int = 0,
) -> Checkpoint:
    """Write `tensors` as model.safetensors, or as numbered files with an index beside them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    specs = {
        name: spec if isinstance(spec, TensorSpec) else TensorSpec(spec[0], tuple(spec[1]))
        for name, spec in tensors.items()
    }
    weight_map: dict[str, str] = {}
    for number, group in enumerate(_split(specs, files), 1):
        path = "model.safetensors" if files == 1 else f"model-{number:05}-of-{files:05}.safetensors"
        write_safetensors(directory / path, group, seed=seed, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(group, path))
    checkpoint = Checkpoint(directory, specs)
    if files > 1:
        index = {"metadata": {"total_size": checkpoint.bytes}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)
    return checkpoint


def llama_like(directory: str | Path, total_bytes: float = 1e9, files: int = 4, seed: int = 0) -> Checkpoint:
    """A bf16 checkpoint of about `total_bytes` with names, shapes and files of a small Llama.

    At 2.5e8 bytes and more the layers are those of Llama 3.2 1B (or of half its width) and only
    their number and the vocabulary follow `total_bytes`; below that the width shrinks too.
    """
    for width in (2048, 1024, 512, 256, 128, 64):
        vocabulary = 32000 * width // 2048
        tensors = _llama_tensors(width, vocabulary, 1)
        one = sum(spec.bytes for spec in tensors.values())
        outside = 2 * width * (vocabulary + 1)
        layers = round((total_bytes - outside) / (one - outside))
        if layers >= 4:
            break
    layers = max(1, layers)
    checkpoint = make_checkpoint(directory, _llama_tensors(width, vocabulary, layers), files=files, seed=seed)
    _write_llama_side_files(checkpoint.directory, width, vocabulary, layers)
    return checkpoint


def _llama_tensors(width: int, vocabulary: int, layers: int) -> dict[str, TensorSpec]:
    key_value = width // 4
    inner = width * 4
    tensors = {"model.embed_tokens.weight": TensorSpec("BF16", (vocabulary, width))}
    for number in range(layers):
        shapes = {
            "input_layernorm": (width,),
            "mlp.down_proj": (width, inner),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "post_attention_layernorm": (width,),
            "self_attn.k_proj": (key_value, width),
            "self_attn.o_proj": (width, width),
            "self_attn.q_proj": (width, width),
            "self_attn.v_proj": (key_value, width),
        }
        for name, shape in shapes.items():
            tensors[f"model.layers.{number}.{name}.weight"] = TensorSpec("BF16", shape)
    tensors["model.norm.weight"] = TensorSpec("BF16", (width,))
    return tensors


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_llama_side_files(directory: Path, width: int, vocabulary: int, layers: int) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": width * 4,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": width // 64,
        "num_hidden_layers": layers,
        "num_key_value_heads": max(1, width // 256),
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
    }
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = ["<s>", "</s>", "<unk>", *(f"token{number}" for number in range(3, vocabulary))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": word, "special": True} for number, word in enumerate(words[:3])],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(words)},
            "unk_token": "<unk>",
        },
    }
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.9},
    )
    _write_json(directory / "tokenizer.json", tokenizer)
    _write_json(
        directory / "tokenizer_config.json",
        {**special, "model_max_length": 8192, "tokenizer_class": "PreTrainedTokenizerFast"},
    )
    _write_json(directory / "special_tokens_map.json", special)


def all_dtypes(directory: str | Path, *, seed: int = 0) -> Checkpoint:
    """A tiny model: a matrix, an empty tensor and (in whole bytes) a scalar of every dtype."""
    tensors: dict[str, TensorSpec] = {}
    for dtype, bits in DTYPE_BITS.items():
        tensors[f"{dtype}.matrix"] = TensorSpec(dtype, (3, 8))
        tensors[f"{dtype}.empty"] = TensorSpec(dtype, (0, 4))
        if bits % 8 == 0:
            tensors[f"{dtype}.scalar"] = TensorSpec(dtype, ())
    return make_checkpoint(directory, tensors, seed=seed)


def many_tensors(directory: str | Path, count: int = 20_000, *, seed: int = 0) -> Checkpoint:
    """`count` tensors of a few bytes to a few hundred, most of them unaligned, in one file."""
    dtypes = ("U8", "BF16", "F32")
    tensors = {
        f"blocks.{number // 10}.{number % 10}.weight": TensorSpec(dtypes[number % 3], (1 + number % 67,))
        for number in range(count)
    }
    return make_checkpoint(directory, tensors, seed=seed)


def many_files(directory: str | Path, count: int = 1_000, *, seed: int = 0) -> Checkpoint:
    """`count` files of one small tensor each."""
    tensors = {f"layers.{number}.weight": TensorSpec("BF16", (1 + number % 13, 16)) for number in range(count)}
    return make_checkpoint(directory, tensors, files=count, seed=seed)


def one_large_tensor(directory: str | Path, tensor_bytes: int = 600 << 20, *, seed: int = 0) -> Checkpoint:
    """One tensor, above 512 MiB by default, which is the largest value that Redis takes."""
    tensors = {"large.weight": TensorSpec("BF16", (tensor_bytes // 2,))}
    return make_checkpoint(directory, tensors, seed=seed)


def compare(state: Mapping[str, torch.Tensor], directory: str | Path) -> int:
    """Compare every byte of `state` with the weight files; the number of bytes, else `Mismatch`.

    Compared as bytes, never as values, so that a NaN equals itself. A dtype that torch lacks may
    come in any dtype: only its bytes count.
    """
    import torch

    left = set(state)
    total = 0
    block = bytearray(BLOCK_BYTES)  # reused: reading whole files would spend its time on page faults
    for path in weight_files(directory):
        with open(path, "rb", buffering=0) as file:
            header, body = _read_header(file)
            for name, (spec, begin) in header.items():
                if name not in left:
                    raise Mismatch(f"{name} of {path.name} was not loaded")
                left.remove(name)
                loaded = state[name].detach().cpu().contiguous().reshape(-1)
                found = loaded.view(torch.uint8).numpy() if loaded.numel() else numpy.empty(0)
                if found.nbytes != spec.bytes:
                    raise Mismatch(f"{name}: {found.nbytes} bytes loaded, {spec.bytes} in {path.name}")
                file.seek(body + begin)
                for start in range(0, spec.bytes, BLOCK_BYTES):
                    count = min(BLOCK_BYTES, spec.bytes - start)
                    if file.readinto(memoryview(block)[:count]) != count:
                        raise Mismatch(f"{path.name} ends inside {name}")
                    expected = numpy.frombuffer(block, numpy.uint8, count)
                    if not numpy.array_equal(found[start : start + count], expected):
                        raise Mismatch(f"{name}: other bytes than {path.name} after byte {start}")
                total += spec.bytes
    if left:
        raise Mismatch(f"loaded, but in no file: {', '.join(sorted(left)[:5])}")
    return total

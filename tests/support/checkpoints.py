"""Checkpoints for tests, which benchmarks/checkpoints.py makes for benchmarks, too."""

from benchmarks.checkpoints import (
    DTYPE_BITS,
    Checkpoint,
    Mismatch,
    TensorSpec,
    all_dtypes,
    compare,
    llama_like,
    make_checkpoint,
    many_files,
    many_tensors,
    one_large_tensor,
    read_safetensors,
    weight_files,
    write_safetensors,
)

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

"""Makes two quantised checkpoints of a tiny Llama, in formats that vLLM runs on a CPU and repacks for its kernels.

python make_quantised.py FROM DIR      DIR/int8 (compressed-tensors, W8A8), DIR/gptq (4 bits, groups of 128)
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
        }
    },
}
GROUP = 128
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}


def int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A row of the weight is whole numbers times a scale."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    whole = (weight / scale).round().clamp(-127, 127).to(torch.int8)
    return {f"{name}.weight": whole, f"{name}.weight_scale": scale.to(torch.bfloat16)}


def gptq(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Eight inputs of 4 bits in one number, a scale for each group of inputs and each output, zero at 8."""
    outputs, inputs = weight.shape
    groups = weight.t().reshape(inputs // GROUP, GROUP, outputs)
    scales = groups.abs().amax(1) / 7
    nibbles = ((groups / scales[:, None]).round().clamp(-8, 7) + 8).to(torch.int32).reshape(inputs, outputs)
    packed = torch.zeros(inputs // 8, outputs, dtype=torch.int32)
    for place in range(8):
        packed |= nibbles[place::8] << (4 * place)
    return {
        f"{name}.qweight": packed,
        f"{name}.qzeros": torch.full((inputs // GROUP, outputs // 8), 0x77777777, dtype=torch.int32),  # stored less 1
        f"{name}.scales": scales.to(torch.bfloat16),
        f"{name}.g_idx": (torch.arange(inputs) // GROUP).to(torch.int32),
    }


def make(
    source: Path,
    target: Path,
    config: Mapping[str, object],
    quantise: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    text = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**text, "quantization_config": config}))
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            is_linear = name.endswith("_proj.weight")
            tensors |= quantise(name.removesuffix(".weight"), tensor.float()) if is_linear else {name: tensor}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]) / "int8", INT8, int8)
    make(Path(sys.argv[1]), Path(sys.argv[2]) / "gptq", GPTQ, gptq)

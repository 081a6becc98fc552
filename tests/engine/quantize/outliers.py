"""The outlier variant of a checkpoint: the same function, with a few input channels of every layer 20 times as large.

Small models have no outlier channels, large ones do (LLM.int8(), https://arxiv.org/abs/2208.07339). Norm weights of 1 %
of the channels are multiplied by 20 and the columns that they feed divided by 20.
"""

import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FACTOR, SHARE = 20.0, 0.01
_FED = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def write_outlier_variant(source: Path, target: Path, *, dtype: torch.dtype, seed: int = 0) -> Path:
    """Copies a Hugging Face directory of one safetensors file, changed as above. Returns `target`."""
    rng = random.Random(seed)
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, target)
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    num_layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    for layer in range(num_layers):
        for norm, fed in _FED.items():
            prefix = f"model.layers.{layer}."
            weight = tensors[f"{prefix}{norm}.weight"]
            chosen = rng.sample(range(len(weight)), max(1, round(SHARE * len(weight))))
            weight[chosen] *= FACTOR
            for name in fed:
                tensors[f"{prefix}{name}.weight"][:, chosen] /= FACTOR
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, target / "model.safetensors")
    return target

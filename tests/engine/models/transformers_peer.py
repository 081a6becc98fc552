"""Small random transformers models, saved as checkpoint directories, and their logits: the oracle of this folder."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from codesign.engine.models.tiny import tiny_config

CONFIGS = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
}


def peer(architecture: str, **changes: Any) -> Any:
    """A transformers model in fp32 with every number random, norms and biases too, and logits of spread about 1.5."""
    plain = tiny_config(architecture, **changes)
    plain.pop("architectures")
    plain.pop("model_type")
    config = CONFIGS[architecture](**plain)
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(".bias"):
                tensor.normal_(0, 0.5)
            else:
                tensor.normal_(0, 1.5 * tensor.shape[-1] ** -0.5)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@torch.no_grad()
def peer_logits(model: Any, token_ids: list[int]) -> Tensor:
    """[T, V] fp32."""
    return model(torch.tensor([token_ids])).logits[0]  # type: ignore[no-any-return]

"""A random two-layer model of each architecture: real, and built in milliseconds."""

from typing import Any

from codesign.engine.models.shape import ARCHITECTURES
from codesign.spec.model import ModelSpec


def tiny_config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """The config.json keys: 2 layers, hidden 64, 4 query heads on 2 KV heads of 16, vocabulary 128, context 512."""
    return {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **({"sliding_window": None} if architecture == "MistralForCausalLM" else {}),
        **changes,
    }


def tiny_spec(architecture: str = "LlamaForCausalLM", *, seed: int = 0, **changes: Any) -> ModelSpec:
    return ModelSpec(name=f"tiny-{architecture}", architecture=tiny_config(architecture, **changes), seed=seed)

"""ModelShape: everything that config.json says about a dense decoder, checked, under our names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from codesign.engine.models.config_values import ConfigValues
from codesign.engine.models.rope_scaling import RopeScaling, read_rope
from codesign.errors import Unsupported

# Architecture -> model_type, which older and hand-written files give instead.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Attributes:
    sliding_window: tokens that a query sees back including itself, or None; beyond it we would have to mask.
    max_positions: longest context the model is meant for, rope scaling included.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    rope: RopeScaling
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    ties_embeddings: bool = False
    sliding_window: int | None = None

    @property
    def num_parameters(self) -> int:
        """Numbers in the checkpoint, tied embeddings counted once."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = 2 * self.hidden_size * (q_size + kv_size) + 3 * self.hidden_size * self.intermediate_size
        layer += 2 * self.hidden_size  # the two norms
        layer += (q_size + 2 * kv_size) * self.has_qkv_bias + self.hidden_size * self.has_output_bias
        layer += (2 * self.intermediate_size + self.hidden_size) * self.has_mlp_bias
        layer += 2 * self.head_dim * self.has_qk_norm
        embeddings = self.vocab_size * self.hidden_size * (1 if self.ties_embeddings else 2)
        return embeddings + self.num_layers * layer + self.hidden_size


def read_shape(plain: Mapping[str, Any], *, file: object = None) -> ModelShape:
    """The shape that the keys of a config.json describe; absent keys take transformers' defaults where those are
    the same for everybody, else they are required.

    Raises:
        Unsupported: another architecture, activation or rope scaling.
        InputError: a missing, mistyped or impossible value; names the key.
    """
    config = ConfigValues(plain, file=file)
    architecture = _architecture(config)
    activation = config.text("hidden_act", "silu")
    if activation != "silu":
        raise Unsupported(f"{file or 'model'}: hidden_act {activation!r} is not supported (supported: silu)")

    hidden_size = config.integer("hidden_size", high=2**20)
    num_heads = config.integer("num_attention_heads", high=2**14)
    num_kv_heads = config.integer(
        "num_key_value_heads", num_heads if architecture == "LlamaForCausalLM" else None, high=2**14
    )
    if num_heads % num_kv_heads:
        raise config.error("num_key_value_heads", f"must divide num_attention_heads {num_heads}, got {num_kv_heads}")
    if not config.has("head_dim") and architecture != "Qwen3ForCausalLM" and hidden_size % num_heads:
        raise config.error("num_attention_heads", f"must divide hidden_size {hidden_size}, got {num_heads}")
    head_dim = config.integer("head_dim", 128 if architecture == "Qwen3ForCausalLM" else hidden_size // num_heads)
    if head_dim % 2:
        raise config.error("head_dim", f"must be even for RoPE, got {head_dim}")
    max_position_embeddings = config.integer("max_position_embeddings", high=2**30)
    rope = read_rope(config, max_position_embeddings)
    takes_attention_bias = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    attention_bias = takes_attention_bias and config.flag("attention_bias", False)
    return ModelShape(
        architecture=architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers", high=2**12),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6, low=0.0, high=1.0),
        max_positions=rope.max_positions(max_position_embeddings),
        rope=rope,
        has_qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
        has_output_bias=attention_bias,
        has_mlp_bias=architecture == "LlamaForCausalLM" and config.flag("mlp_bias", False),
        has_qk_norm=architecture == "Qwen3ForCausalLM",
        ties_embeddings=config.flag("tie_word_embeddings", False),
        sliding_window=_sliding_window(config, architecture),
    )


def _architecture(config: ConfigValues) -> str:
    names = config.strings("architectures")
    if not names:
        by_type = {model_type: name for name, model_type in ARCHITECTURES.items()}
        model_type = config.text("model_type")
        names = [by_type.get(model_type, model_type)]
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise Unsupported(
            f"{config.file or 'model'}: architecture {', '.join(names)} is not supported "
            f"(supported: {', '.join(ARCHITECTURES)})"
        )
    return names[0]


def _sliding_window(config: ConfigValues, architecture: str) -> int | None:
    """The window where any layer has one."""
    layer_types = config.strings("layer_types")
    if architecture == "LlamaForCausalLM":
        uses_window = False
    elif architecture == "MistralForCausalLM":
        # Left out, transformers takes 4096; null means none.
        uses_window = config.has("sliding_window") or not config.mentions("sliding_window")
    elif layer_types:
        uses_window = config.flag("use_sliding_window", False) and "sliding_attention" in layer_types
    else:
        first = config.integer("max_window_layers", 28, low=0)
        uses_window = config.flag("use_sliding_window", False) and first < config.integer("num_hidden_layers")
    if not uses_window:
        return None
    return config.integer("sliding_window", 4096, high=2**30)

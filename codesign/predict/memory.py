"""What a configuration needs in memory at the very least, from its shape alone.

    weights   linear layers at the format's bits, embeddings and head at the dtype's
    KV cache  2 x layers x KV heads x head_dim x rows kept x sequences, at the codec's bytes
    draft     both once more, its cache in full and native

A lower bound on purpose: workspaces, staging and the allocator's slack are left out, and what is not known counts as
nothing. So a configuration that this calls too large cannot run, and can be ruled out without building it; one that it
lets pass is built, and may still run out of memory. A cache that does not lie on the device counts as nothing too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from codesign.spec.engine_config import Choice, EngineConfig, KVConfig
from codesign.spec.kv_budget import kv_budget_tokens
from codesign.units import format_bytes

_DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Bits per weight of linear layers, without scales (mixed: the smallest). A format that is not listed counts as nothing.
_WEIGHT_BITS = {
    "int8": 8.0,
    "w8a8": 8.0,
    "fp8": 8.0,
    "int4": 4.0,
    "nf4": 4.0,
    "int3": 3.0,
    "int2": 2.0,
    "mixed": 2.0,
}
# Bytes per value of the cache, without scales. A codec that is not listed, and not in `_kv_value_bytes`, likewise.
_KV_VALUE_BYTES = {"int8": 1.0, "fp8": 1.0, "int4": 0.5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The sizes of a dense decoder that memory follows from.

    Attributes:
        linear_params: weights of the projections inside the layers, which weight formats act on.
        other_params: embeddings, and the head where it is not tied to them.
    """

    linear_params: int
    other_params: int
    num_layers: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From the keys of a Hugging Face config.json.

        Raises:
            KeyError, TypeError, ValueError, ZeroDivisionError: a size is missing or is no number.
        """
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        heads = int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or hidden // heads)
        attention = 2 * hidden * head_dim * (heads + kv_heads)
        mlp = 3 * hidden * int(config["intermediate_size"])
        tables = 1 if config.get("tie_word_embeddings") else 2
        return cls(
            linear_params=layers * (attention + mlp),
            other_params=tables * int(config["vocab_size"]) * hidden,
            num_layers=layers,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes needed at the very least."""

    weights_bytes: int
    kv_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes

    def misfit(self, available_bytes: int) -> str | None:
        """Why this cannot fit into `available_bytes`, or None when it may."""
        if self.total_bytes <= available_bytes:
            return None
        return (
            f"needs at least {format_bytes(self.total_bytes)} (weights {format_bytes(self.weights_bytes)}, "
            f"KV cache {format_bytes(self.kv_bytes)}), has {format_bytes(available_bytes)}"
        )


def estimate(size: ModelSize, config: EngineConfig, draft: ModelSize | None = None) -> MemoryEstimate:
    """The least that `config` needs with a model of this size.

    Args:
        draft: the model's own draft, of which a configuration that names another one makes no use.
    """
    needed = _estimate(size, config)
    if draft is None or config.speculate.name != "draft_model" or "draft" in config.speculate.knob_dict:
        return needed
    weights = Choice(str(config.speculate.knob_dict.get("draft_weights", "native")))
    beside = _estimate(draft, dataclasses.replace(config, weights=weights, kv=KVConfig()))
    kv_bytes = needed.kv_bytes + beside.kv_bytes
    if config.kv_memory_bytes is not None:
        kv_bytes = min(kv_bytes, config.kv_memory_bytes)
    return MemoryEstimate(weights_bytes=needed.weights_bytes + beside.weights_bytes, kv_bytes=kv_bytes)


def _estimate(size: ModelSize, config: EngineConfig) -> MemoryEstimate:
    dtype_bytes = _DTYPE_BYTES[config.dtype]
    row_bytes = 2 * size.num_kv_heads * size.head_dim * _kv_value_bytes(config.kv.codec, dtype_bytes, size.head_dim)
    if config.kv.place.name != "device":
        row_bytes = 0
    rows = kept_tokens(config.kv.policy, config.max_model_len) * config.max_batch_size
    kv_bytes = int(size.num_layers * rows * row_bytes)
    if config.kv_memory_bytes is not None:
        kv_bytes = min(kv_bytes, config.kv_memory_bytes)
    linear_bytes = size.linear_params * _weight_bits(config.weights, dtype_bytes) / 8
    return MemoryEstimate(weights_bytes=int(linear_bytes + size.other_params * dtype_bytes), kv_bytes=kv_bytes)


def kept_tokens(policy: Choice, max_model_len: int) -> int:
    """KV rows that a policy keeps per sequence, layer and KV head, on average over layers.

    `full` keeps all of them. Others say it in `kv_budget`: a fraction below 1, or a number of tokens; a policy without
    one counts as nothing.
    """
    if policy.name == "full":
        return max_model_len
    budget = policy.knob_dict.get("kv_budget")
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        return 0
    return kv_budget_tokens(budget, max_model_len)


def _weight_bits(weights: Choice, dtype_bytes: int) -> float:
    dense = 8.0 * dtype_bytes
    if weights.name == "native":
        return dense
    return _WEIGHT_BITS.get(weights.name, 0.0) + (dense if weights.knob_dict.get("shadow") is True else 0.0)


def _kv_value_bytes(codec: Choice, dtype_bytes: int, head_dim: int) -> float:
    if codec.name == "native":
        return dtype_bytes
    if codec.name == "low_rank":
        ranks = [codec.knob_dict.get("rank"), codec.knob_dict.get("value_rank")]
        return dtype_bytes * sum(_rank(rank, head_dim) for rank in ranks) / (2 * head_dim)
    return _KV_VALUE_BYTES.get(codec.name, 0.0)


def _rank(rank: object, head_dim: int) -> int:
    """A number of directions, or a fraction of head_dim rounded down; what is neither counts as nothing."""
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        return 0
    return rank if isinstance(rank, int) else int(rank * head_dim)

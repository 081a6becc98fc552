"""How fast each pair of a head's dimensions turns: inverse frequencies of RoPE and of its context extensions.

    angle(position, i) = position * inv_freq[i],   inv_freq[i] = theta ** (-2 i / D),   i = 0 .. D/2 - 1

The extensions bend `inv_freq` and (YaRN only) multiply cos and sin by `attention_scaling`. Everything is computed in
fp32 in the order that transformers uses: at position 10^4 one unit in the last place of a frequency is visible.
"""

import dataclasses
import math
from typing import Literal, get_args

import torch
from torch import Tensor

from codesign.engine.attention.rope import Rope
from codesign.engine.models.config_values import ConfigValues
from codesign.errors import Unsupported

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Attributes:
    kind: "linear" divides every frequency by `factor`; "llama3" (Llama 3.1) divides the slow ones and blends between;
        "yarn" (Peng et al., 2023, https://arxiv.org/abs/2309.00071) ramps between divided and untouched.
    original_max_position_embeddings: context of pretraining (llama3, yarn).
    low_freq_factor, high_freq_factor: llama3 only.
    beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim, truncate: yarn only.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def max_positions(self, max_position_embeddings: int) -> int:
        """The longest context that the model is meant for, from the config's `max_position_embeddings`.

        Files differ in whether that key is the context before or after a linear or YaRN extension; the longer reading
        counts.
        """
        if self.kind == "linear":
            return max(max_position_embeddings, int(max_position_embeddings * self.factor))
        if self.kind == "yarn":
            return max(max_position_embeddings, int(self.original_max_position_embeddings * self.factor))
        return max_position_embeddings


def read_rope(config: ConfigValues, max_position_embeddings: int) -> RopeScaling:
    """RoPE of a config.json: `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (before).

    Raises:
        Unsupported: another kind of scaling, or heads that rotate only in part.
        InputError: a missing or impossible value.
    """
    inner = config.inner("rope_parameters") or config.inner("rope_scaling")
    theta = config.number("rope_theta", 10000.0, low=1.0, high=1e15)
    values = inner or ConfigValues({}, file=config.file)
    theta = values.number("rope_theta", theta, low=1.0, high=1e15)
    kind = values.text("rope_type", values.text("type", "default"))
    if kind not in get_args(RopeKind):
        raise Unsupported(f"rope scaling {kind!r} is not supported (supported: {', '.join(get_args(RopeKind))})")
    for holder in (config, values):
        if holder.number("partial_rotary_factor", 1.0, low=0.0, high=1.0) != 1.0:
            raise Unsupported("partial_rotary_factor other than 1 is not supported: heads rotate as a whole")
    if kind == "default":
        return RopeScaling(theta=theta)
    original = max_position_embeddings
    for holder in (values, config):  # a value outside the rope object wins, as in transformers
        original = holder.integer("original_max_position_embeddings", original)
    if kind == "yarn" and not values.has("factor"):
        factor = max_position_embeddings / original
    else:
        factor = values.number("factor", low=1e-3, high=1e6)
    scaling = RopeScaling(theta=theta, kind=kind, factor=factor, original_max_position_embeddings=original)  # type: ignore[arg-type]
    if kind == "llama3":
        low = values.number("low_freq_factor", low=1e-3, high=1e6)
        high = values.number("high_freq_factor", low=1e-3, high=1e6)
        if high <= low:
            raise values.error("high_freq_factor", f"must be larger than low_freq_factor {low:g}, got {high:g}")
        return dataclasses.replace(scaling, low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        has_factor = values.has("attention_factor")
        return dataclasses.replace(
            scaling,
            beta_fast=values.number("beta_fast", 32.0, low=1e-6, high=1e9) or 32.0,
            beta_slow=values.number("beta_slow", 1.0, low=1e-6, high=1e9) or 1.0,
            attention_factor=values.number("attention_factor", low=0.0, high=1e3) if has_factor else None,
            mscale=values.number("mscale", 0.0, low=0.0, high=1e3),
            mscale_all_dim=values.number("mscale_all_dim", 0.0, low=0.0, high=1e3),
            truncate=values.flag("truncate", True),
        )
    return scaling


def rope_frequencies(rope: RopeScaling, head_dim: int) -> tuple[Tensor, float]:
    """([head_dim / 2] fp32 inverse frequencies, factor for cos and sin)."""
    period = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    inv_freq = 1.0 / period
    if rope.kind == "linear":
        return inv_freq / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, inv_freq), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, period), _yarn_attention_factor(rope)
    return inv_freq, 1.0


def _llama3(rope: RopeScaling, inv_freq: Tensor) -> Tensor:
    """Short wavelengths stay, long ones are divided by `factor`, those between are blended (Llama 3.1 release)."""
    context = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    smooth = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    is_long = wavelength > context / rope.low_freq_factor
    is_short = wavelength < context / rope.high_freq_factor
    return torch.where(is_long, inv_freq / rope.factor, torch.where(is_short, inv_freq, blended))


def _yarn(rope: RopeScaling, period: Tensor) -> Tensor:
    """NTK by parts (YaRN, eq. 23).

    Dimension i keeps its frequency where it turns more than `beta_fast` times over the original context, is divided by
    `factor` where it turns less than `beta_slow` times, with a linear ramp over i between.
    """
    head_dim = 2 * period.numel()

    def dimension(num_turns: float) -> float:
        turns_per_radian = rope.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return head_dim * math.log(turns_per_radian) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(period.numel(), dtype=torch.float32) - low) / width).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (rope.factor * period) * (1 - keep) + 1.0 / period * keep


def _yarn_attention_factor(rope: RopeScaling) -> float:
    """The temperature of YaRN's section 3.4 as a factor on cos and sin: 0.1 ln(factor) + 1 unless the file says."""

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def rope_of(scaling: RopeScaling, head_dim: int) -> Rope:
    """The rotary positions of a model."""
    inv_freq, attention_scaling = rope_frequencies(scaling, head_dim)
    return Rope(inv_freq=inv_freq, attention_scaling=attention_scaling)

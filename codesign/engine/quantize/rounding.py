"""Round to nearest: the quantisers that need no data, and the oracle of every packing.

    symmetric, per output row:        w' = q s                   q in -127..127
    asymmetric, per group of inputs:  w' = (q - 8) s + zero      q in 0..15, `zero` the float midpoint of ATen's kernels

Scales are rounded *up* to the 16-bit dtype they are stored in before anything is divided by them. So no weight is
clipped, and |w - w'| <= s / 2 holds for the stored scale, not just for the ideal one.
"""

import torch
from torch import Tensor


def quantize_rows(weight: Tensor, *, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit codes, one scale per output row.

    Args:
        weight: [out, in], any float dtype.
    Returns:
        codes [out, in] int8 in -127..127; scale [out] of `scale_dtype`, 0 for rows of zeros.
    Raises:
        ValueError: a weight that is not finite, or a scale that does not fit `scale_dtype`.
    """
    slices = [_quantize_rows(rows, scale_dtype) for rows in torch.split(weight, _slice_rows(weight))]
    codes, scale = (torch.cat(parts) for parts in zip(*slices, strict=True))
    return codes, scale


def _quantize_rows(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = _finite(weight)
    scale = _store_up(weight.abs().amax(dim=1) / 127, scale_dtype)
    codes = torch.round(weight / _divisor(scale)[:, None])
    return codes.to(torch.int8), scale


def quantize_groups(weight: Tensor, *, group_size: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric 4-bit codes, one scale and midpoint per output row and group of `group_size` inputs.

    s = (max - min) / 15 with 0 included in [min, max], so that the midpoint is at most 15 s and its own rounding stays
    inside the half step to spare at both ends. Departs from the usual integer zero point: the kernels take a float
    midpoint, and using it as such keeps the bound.

    Args:
        weight: [out, in], any float dtype; `in` a multiple of `group_size`.
    Returns:
        codes [out, in] uint8 in 0..15; scale and zero [out, in / group_size] of `scale_dtype`.
    Raises:
        ValueError: as `quantize_rows`.
    """
    slices = [_quantize_groups(rows, group_size, scale_dtype) for rows in torch.split(weight, _slice_rows(weight))]
    codes, scale, zero = (torch.cat(parts) for parts in zip(*slices, strict=True))
    return codes, scale, zero


def _quantize_groups(weight: Tensor, group_size: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    groups = _finite(weight).reshape(weight.shape[0], -1, group_size)
    low = groups.amin(dim=2).clamp(max=0)
    high = groups.amax(dim=2).clamp(min=0)
    scale = _store_up(high / 15 - low / 15, scale_dtype)  # two quotients: high - low can overflow fp32
    step = scale.float()
    middle = (low / 2 + high / 2) + step / 2
    zero = _representable(middle.to(scale_dtype), middle, "zero")
    codes = torch.round((groups - zero.float()[..., None]) / _divisor(scale)[..., None]).add_(8).clamp_(0, 15)
    return codes.to(torch.uint8).flatten(1), scale, zero


def dequantize_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """[out, in] fp32."""
    return codes.float() * scale.float()[:, None]


def dequantize_groups(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """[out, in] fp32."""
    groups = codes.reshape(*scale.shape, -1).float() - 8
    return (groups * scale.float()[..., None] + zero.float()[..., None]).flatten(1)


def _slice_rows(weight: Tensor) -> int:
    """Rows to work on at once: the fp32 copies of this many stay in the cache, which is 3 times as fast."""
    return max(1, 2**18 // max(1, weight.shape[1]))


def _finite(weight: Tensor) -> Tensor:
    weight = weight.float()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds values that are not finite")
    return weight


def _store_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest value of `dtype` that is not below `scale` (>= 0)."""
    stored = scale.to(dtype)
    if dtype != torch.float32:
        above = (stored.view(torch.int16) + 1).view(dtype)  # the next value up, for what is not negative
        stored = torch.where(stored.float() < scale, above, stored)
    return _representable(stored, scale, "scale")


def _representable(stored: Tensor, exact: Tensor, noun: str) -> Tensor:
    if not bool(torch.isfinite(stored).all()):
        largest, name = exact.abs().max().item(), str(stored.dtype).removeprefix("torch.")
        raise ValueError(f"a {noun} of {largest:.3g} does not fit {name}; use dtype bf16 or fp32")
    return stored


def _divisor(scale: Tensor) -> Tensor:
    """fp32, with 1 where the scale is 0: those weights are all 0."""
    wide = scale.float()
    return torch.where(wide > 0, wide, torch.ones_like(wide))

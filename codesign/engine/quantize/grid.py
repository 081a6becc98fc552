"""Grid: the values that a format can hold, group by group of inputs; fitted to weights, then rounded to.

    w' = (q - 2^(bits - 1)) scale + offset          q in 0 .. 2^bits - 1, scale and offset per output row and group

Symmetric grids have no offset. Asymmetric ones keep 0 on the grid: the offset is a whole number of steps (as in GPTQ's
and AWQ's checkpoints), so a weight that is 0 stays 0 but for the rounding of the stored offset. Scales are rounded *up*
to the 16-bit dtype they are stored in, and codes are chosen for the scale as stored.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fit:
    """A grid's parameters for one weight, as they are stored.

    Attributes:
        scale: [out, groups].
        offset: [out, groups], or None on a symmetric grid.
    """

    scale: Tensor
    offset: Tensor | None = None

    def of_group(self, group: int) -> "Fit":
        """[out, 1] of each."""
        own = slice(group, group + 1)
        return Fit(self.scale[:, own], None if self.offset is None else self.offset[:, own])

    def of_rows(self, rows: slice) -> "Fit":
        return Fit(self.scale[rows], None if self.offset is None else self.offset[rows])


@dataclass(frozen=True)
class Quantized:
    """One weight on a grid: codes [out, in] uint8 and the parameters that they mean something by.

    Attributes:
        note: what the method has to say about how it came to them, or "".
    """

    codes: Tensor
    fit: Fit
    note: str = ""


class Grid(ABC):
    @property
    @abstractmethod
    def inputs_per_group(self) -> int | None:
        """Inputs that share parameters; None means a whole row."""

    @abstractmethod
    def fit(self, weight: Tensor, shrink: Tensor | float = 1.0) -> Fit:
        """Parameters for a finite weight [out, in].

        Args:
            shrink: factor on the range that is covered, broadcast over [out, groups]; below 1 it clips.
        Raises:
            ValueError: a scale that does not fit its dtype.
        """

    @abstractmethod
    def encode(self, values: Tensor, fit: Fit) -> Tensor:
        """values [out, groups, n] fp32 -> the nearest codes, uint8."""

    @abstractmethod
    def decode(self, codes: Tensor, fit: Fit) -> Tensor:
        """codes [out, groups, n] -> fp32."""

    def num_groups(self, num_in: int) -> int:
        """Raises ValueError when groups do not come out even."""
        size = self.inputs_per_group or num_in
        if num_in % size:
            raise ValueError(f"the input size must be a multiple of group_size {size}, got {num_in}")
        return num_in // size

    def quantize(self, weight: Tensor, fit: Fit) -> Quantized:
        """Every weight to its nearest value."""
        groups = self.num_groups(weight.shape[1])
        start, parts = 0, []
        for rows in torch.split(weight, slice_rows(weight)):
            own = fit.of_rows(slice(start, start + rows.shape[0]))
            parts.append(self.encode(rows.float().view(rows.shape[0], groups, -1), own).flatten(1))
            start += rows.shape[0]
        return Quantized(torch.cat(parts), fit)

    def dequantize(self, quantized: Quantized) -> Tensor:
        """[out, in] fp32."""
        groups = self.num_groups(quantized.codes.shape[1])
        return self.decode(quantized.codes.view(quantized.codes.shape[0], groups, -1), quantized.fit).flatten(1)


@dataclass(frozen=True, kw_only=True)
class AffineGrid(Grid):
    """2^bits values at equal distances.

    Args:
        group_size: inputs per scale; None for one scale a row.
        scale_dtype: what scales and offsets are stored in.
        is_narrow: symmetric codes -(2^(b-1) - 1) .. 2^(b-1) - 1, as int8 kernels want; else all 2^b codes are used and
            the range is 2^b - 1 steps wide, so that both ends are half a step away from a value at most.
    """

    bits: int
    group_size: int | None
    is_symmetric: bool
    scale_dtype: torch.dtype
    is_narrow: bool = False

    @property
    def inputs_per_group(self) -> int | None:
        return self.group_size

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    def fit(self, weight: Tensor, shrink: Tensor | float = 1.0) -> Fit:
        groups = self.num_groups(weight.shape[1])
        extremes = [
            rows.view(rows.shape[0], groups, -1).aminmax(dim=2) for rows in torch.split(weight, slice_rows(weight))
        ]
        low, high = (torch.cat(side).float() * shrink for side in zip(*extremes, strict=True))
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.is_symmetric:
            steps = self.middle - (1 if self.is_narrow else 0.5)
            return Fit(store_up(torch.maximum(-low, high) / steps, self.scale_dtype))
        steps = 2**self.bits - 1
        scale = store_up(high / steps - low / steps, self.scale_dtype)  # two quotients: high - low can overflow fp32
        zero_point = torch.round(-low / divisor(scale)).clamp_(0, steps)
        offset = (self.middle - zero_point) * scale.float()
        return Fit(scale, representable(offset.to(self.scale_dtype), offset, "offset"))

    def encode(self, values: Tensor, fit: Fit) -> Tensor:
        centred = values if fit.offset is None else values - fit.offset.float()[..., None]
        codes = (centred / divisor(fit.scale)[..., None]).round_().add_(self.middle)
        return codes.clamp_(1 if self.is_narrow else 0, 2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, fit: Fit) -> Tensor:
        values = (codes.float() - self.middle) * fit.scale.float()[..., None]
        return values if fit.offset is None else values + fit.offset.float()[..., None]

    def zero_points(self, fit: Fit) -> Tensor | None:
        """[out, groups] uint8: the codes that mean 0, as integer checkpoints store them; None on a symmetric grid."""
        if fit.offset is None:
            return None
        steps = torch.round(fit.offset.float() / divisor(fit.scale))
        return (self.middle - steps).clamp_(0, 2**self.bits - 1).to(torch.uint8)


def row_grid(scale_dtype: torch.dtype) -> AffineGrid:
    """Symmetric 8-bit codes with one scale a row: what int8 and w8a8 hold."""
    return AffineGrid(bits=8, group_size=None, is_symmetric=True, is_narrow=True, scale_dtype=scale_dtype)


def signed(codes: Tensor) -> Tensor:
    """uint8 codes around 128 -> int8 around 0, or back."""
    return (codes ^ 128).view(torch.int8) if codes.dtype == torch.uint8 else codes.view(torch.uint8) ^ 128


def finite(weight: Tensor) -> Tensor:
    """The weight itself. Raises ValueError when it holds something that is not finite."""
    if not bool(torch.isfinite(weight.sum(dtype=torch.float32))) and not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds values that are not finite")
    return weight


def slice_rows(weight: Tensor) -> int:
    """Rows to work on at once: the fp32 copies of this many stay in the cache, which is 3 times as fast."""
    return max(1, 2**18 // max(1, weight.shape[1]))


def store_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest value of `dtype` that is not below `scale` (>= 0). Raises ValueError when there is none."""
    stored = scale.to(dtype)
    if dtype != torch.float32:
        above = (stored.view(torch.int16) + 1).view(dtype)  # the next value up, for what is not negative
        stored = torch.where(stored.float() < scale, above, stored)
    return representable(stored, scale, "scale")


def representable(stored: Tensor, exact: Tensor, noun: str) -> Tensor:
    """`stored`. Raises ValueError when it overflowed."""
    if not bool(torch.isfinite(stored).all()):
        largest, name = exact.abs().max().item(), str(stored.dtype).removeprefix("torch.")
        raise ValueError(f"a {noun} of {largest:.3g} does not fit {name}; use dtype bf16 or fp32")
    return stored


def divisor(scale: Tensor) -> Tensor:
    """fp32, with 1 where the scale is 0: those weights are all 0."""
    wide = scale.float()
    return torch.where(wide > 0, wide, torch.ones_like(wide))

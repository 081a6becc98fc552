"""Nf4Grid: sixteen levels at the quantiles of a normal distribution, one scale per 64 weights of a row.

QLoRA, Dettmers et al., 2023 (https://arxiv.org/abs/2305.14314): seven levels below an exact 0, eight above. The scales
are quantised to 8 bits themselves, in blocks of 256 around their mean ("double quantisation"), here equally spaced;
bitsandbytes spaces those second codes dynamically.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from codesign.engine.quantize.grid import Fit, Grid, divisor

BLOCK, _SCALE_BLOCK = 64, 256


_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@functools.cache
def levels() -> Tensor:
    """[16] fp32 in -1 .. 1, ascending: QLoRA's appendix E, to the last bit what other stacks hold."""
    return torch.tensor(_LEVELS)


@dataclass(frozen=True)
class ScaleCodes:
    """scale = mean + codes * step, [out, groups] flattened and cut into blocks of 256.

    Attributes:
        codes: [out, groups] int8.
        step: [blocks] fp32.
        mean: [] fp32.
    """

    codes: Tensor
    step: Tensor
    mean: Tensor

    @classmethod
    def of(cls, scale: Tensor) -> "ScaleCodes":
        mean = scale.mean()
        flat = torch.nn.functional.pad((scale - mean).flatten(), (0, -scale.numel() % _SCALE_BLOCK))
        blocks = flat.view(-1, _SCALE_BLOCK)
        step = blocks.abs().amax(1) / 127
        codes = torch.round(blocks / divisor(step)[:, None]).flatten()[: scale.numel()].view(scale.shape)
        return cls(codes.to(torch.int8), step, mean)

    def scale(self, start: int = 0, stop: int | None = None) -> Tensor:
        """[rows, groups] fp32 of rows start..stop."""
        codes, groups = self.codes[start:stop], self.codes.shape[1]
        block = torch.arange(start * groups, start * groups + codes.numel(), device=codes.device) // _SCALE_BLOCK
        # A scale near 0 may come out below it; its block's weights are then as good as 0.
        return (self.mean + codes.float() * self.step[block].view(codes.shape)).clamp_(min=0)


@dataclass(frozen=True)
class Nf4Fit(Fit):
    """Attributes:
    scale_codes: what `scale` was computed from.
    """

    scale_codes: ScaleCodes | None = None


class Nf4Grid(Grid):
    @property
    def inputs_per_group(self) -> int:
        return BLOCK

    def fit(self, weight: Tensor, shrink: Tensor | float = 1.0) -> Nf4Fit:
        groups = weight.view(weight.shape[0], self.num_groups(weight.shape[1]), BLOCK)
        scale_codes = ScaleCodes.of(groups.abs().amax(2).float() * shrink)
        return Nf4Fit(scale_codes.scale(), None, scale_codes)

    def encode(self, values: Tensor, fit: Fit) -> Tensor:
        table = levels().to(values.device)
        edges = (table[1:] + table[:-1]) / 2
        return torch.bucketize(values / divisor(fit.scale)[..., None], edges, out_int32=True).to(torch.uint8)

    def decode(self, codes: Tensor, fit: Fit) -> Tensor:
        return levels().to(codes.device)[codes.int()] * fit.scale[..., None]


@functools.cache
def levels_in(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[16], rounded to what a kernel multiplies."""
    return levels().to(device, dtype)


@functools.cache
def byte_levels(device: torch.device) -> Tensor:
    """[256, 2] fp32: the two levels of every byte."""
    table = levels().to(device)
    byte = torch.arange(256, device=device)
    return torch.stack([table[byte & 15], table[byte >> 4]], dim=1)

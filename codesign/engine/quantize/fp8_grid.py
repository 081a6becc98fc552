"""Fp8Grid: the values of float8 e4m3 times one scale per row: close together near 0, 32 scales apart near the largest.

4 exponent bits, 3 mantissa bits, no infinities; the largest value is 448 (Micikevicius et al., 2022, FP8 Formats for
Deep Learning, https://arxiv.org/abs/2209.05433). A cast to e4m3 does not saturate in torch: values are clamped first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from codesign.engine.quantize.grid import Fit, Grid, divisor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def to_e4m3(values: Tensor) -> Tensor:
    """fp32 -> the nearest e4m3 values, the largest for what is beyond it; NaN stays NaN."""
    return values.clamp(-LARGEST, LARGEST).to(E4M3)


@dataclass(frozen=True)
class Fp8Grid(Grid):
    """Codes are the bytes of the e4m3 values."""

    @property
    def inputs_per_group(self) -> None:
        return None

    def fit(self, weight: Tensor, shrink: Tensor | float = 1.0) -> Fit:
        low, high = weight.aminmax(dim=1, keepdim=True)
        return Fit(torch.maximum(-low.float(), high.float()) * shrink / LARGEST)

    def encode(self, values: Tensor, fit: Fit) -> Tensor:
        return to_e4m3(values / divisor(fit.scale)[..., None]).view(torch.uint8)

    def decode(self, codes: Tensor, fit: Fit) -> Tensor:
        return codes.view(E4M3).float() * fit.scale[..., None]

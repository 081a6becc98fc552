"""smoothquant: moves outliers of the activations into the weights before both are rounded to 8 bits.

    s = max|x|^alpha / max|w|^(1 - alpha) per input;   x / s folded into the norm before,   W diag(s)

Xiao et al., 2022 (https://arxiv.org/abs/2211.10438). For what a norm feeds: qkv, gate and up.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from codesign.engine.models.decoder import DecoderLayer
from codesign.engine.models.dense_layer import DenseLayer
from codesign.engine.quantize.calibration import Calibration
from codesign.engine.quantize.grid import Grid, Quantized
from codesign.engine.quantize.inputs import InputStats
from codesign.engine.quantize.method import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuant(Method):
    """Args:
    alpha: 0 leaves the activations' range alone and evens out the weights', 1 the reverse.
    """

    alpha: float = 0.5
    needs_inputs: ClassVar[bool] = True

    @torch.no_grad()
    def fold(self, dense: DenseLayer, layer: DecoderLayer, calibration: Calibration, grids: Mapping[str, Grid]) -> None:
        for name in ("qkv", "gate_up"):
            seen = calibration.inputs(layer, name, keeps_hessian=False).max_abs.clamp(min=1e-5)
            held = dense.weight[name].float().abs().amax(0).clamp(min=1e-5)
            dense.absorb(name, (seen**self.alpha / held ** (1 - self.alpha)).clamp(min=1e-5))

    def quantize(
        self, weight: Tensor, grid: Grid, inputs: InputStats | None, *, num_unclipped_rows: int = 0
    ) -> Quantized:
        return grid.quantize(weight, grid.fit(weight))

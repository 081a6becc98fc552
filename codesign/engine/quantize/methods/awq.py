"""awq: scales up the inputs that matter before rounding, then clips each group's range to the least output error.

    s = mean|x|^alpha,  normalised;  round W diag(s), fold 1/s into what comes before
    alpha in {0, 0.05, ..., 0.95}: the one with the least error of the half layer's output (attention, feed-forward)
    each group's range times {1, 0.95, ..., 0.55}: the one with the least error of the group's output; not for q and k

Lin et al., 2023 (https://arxiv.org/abs/2306.00978). The clipping error is exact for the calibration inputs: dwT H dw
with the group's block of the second moment.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from codesign.engine.models.decoder import DecoderLayer
from codesign.engine.models.dense_layer import DenseLayer
from codesign.engine.quantize.calibration import Calibration
from codesign.engine.quantize.formats.native import Native
from codesign.engine.quantize.grid import Grid, Quantized, slice_rows
from codesign.engine.quantize.inputs import InputStats
from codesign.engine.quantize.linear import Linear, Workspace
from codesign.engine.quantize.method import Method

_SHRINKS = tuple(1 - 0.05 * step for step in range(10))
_SEARCHED_SEQUENCES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Awq(Method):
    """Args:
    num_alphas: candidates alpha = i / num_alphas; 1 leaves the weights as they are.
    clips: whether ranges are searched.
    """

    num_alphas: int = 20
    clips: bool = True
    needs_inputs: ClassVar[bool] = True

    @torch.no_grad()
    def fold(self, dense: DenseLayer, layer: DecoderLayer, calibration: Calibration, grids: Mapping[str, Grid]) -> None:
        for name in ("qkv", "output", "gate_up", "down"):
            if not dense.can_absorb(name):
                continue
            scale = self._best_scale(name, dense, layer, calibration, grids[name])
            dense.absorb(name, scale)

    def _best_scale(
        self, name: str, dense: DenseLayer, layer: DecoderLayer, calibration: Calibration, grid: Grid
    ) -> Tensor:
        """[in]. The layer is left as it was."""
        original: Linear = getattr(layer, name)
        mean_abs = calibration.inputs(layer, name, keeps_hessian=False).mean_abs
        weight, bias = dense.weight[name].float(), dense.bias[name]
        half_layer = _half_layer(name, layer, calibration)
        wanted = half_layer()
        least, best = float("inf"), torch.ones_like(mean_abs)
        for step in range(self.num_alphas):
            scale = scales(mean_abs, step / self.num_alphas)
            scaled = weight * scale
            rounded = grid.dequantize(grid.quantize(scaled, grid.fit(scaled))) / scale
            setattr(layer, name, Native().wrap(rounded.to(wanted.dtype), bias, workspace=Workspace()))
            error = float((half_layer().float() - wanted.float()).square().mean())
            if error < least:
                least, best = error, scale
        setattr(layer, name, original)
        return best

    def quantize(
        self, weight: Tensor, grid: Grid, inputs: InputStats | None, *, num_unclipped_rows: int = 0
    ) -> Quantized:
        if inputs is None:
            raise ValueError("awq needs calibration inputs")
        shrink = torch.ones(weight.shape[0], grid.num_groups(weight.shape[1]), device=weight.device)
        if self.clips:
            shrink[num_unclipped_rows:] = best_shrinks(weight[num_unclipped_rows:], grid, inputs.hessian)
        return grid.quantize(weight, grid.fit(weight, shrink))


def scales(mean_abs: Tensor, alpha: float) -> Tensor:
    """[in] mean|x|^alpha over the root of its extremes' product; all ones at alpha = 0."""
    scale = mean_abs.pow(alpha).clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def best_shrinks(weight: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    """[out, groups]: for each the factor on its range with the least expected square error of its output."""
    num_groups = grid.num_groups(weight.shape[1])
    size = weight.shape[1] // num_groups
    blocks = torch.stack([hessian[at : at + size, at : at + size] for at in range(0, weight.shape[1], size)])
    parts = []
    for rows in torch.split(weight.float(), slice_rows(weight)):
        least = torch.full((rows.shape[0], num_groups), float("inf"), device=weight.device)
        best = torch.ones_like(least)
        for shrink in _SHRINKS:
            rounded = grid.dequantize(grid.quantize(rows, grid.fit(rows, shrink)))
            difference = (rows - rounded).view(rows.shape[0], num_groups, size)
            error = (torch.einsum("ogi,gij->ogj", difference, blocks) * difference).sum(-1)
            best = torch.where(error < least, shrink, best)
            least = torch.minimum(error, least)
        parts.append(best)
    return torch.cat(parts) if parts else weight.new_ones(0, num_groups)


@torch.no_grad()
def _half_layer(name: str, layer: DecoderLayer, calibration: Calibration) -> Callable[[], Tensor]:
    """What to compare: the half layer that the linear belongs to, on the first sequences."""
    hidden = calibration.hidden[:_SEARCHED_SEQUENCES].flatten(0, 1)
    normalised = layer.input_norm(hidden)
    if name in ("qkv", "output"):
        return lambda: layer.attend(normalised, 0, calibration.attention, calibration.batch)
    residual = hidden + layer.attend(normalised, 0, calibration.attention, calibration.batch)
    middle = layer.mlp_norm(residual)
    return lambda: layer.feed_forward(middle)

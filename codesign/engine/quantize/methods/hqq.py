"""hqq: no data; moves each group's offset so that the error, not counting its few large values, becomes small.

    minimise  sum |w - w'|^p,  p < 1,  over the offset, the scale fixed:
    repeat   r = shrink(w - w')      generalised soft threshold with weight beta, which grows
             offset = mean over the group of  (w - r) - (q - middle) scale

Half-Quadratic Quantization, Badri and Shaji, 2023 (https://mobiusml.github.io/hqq_blog/). The offset is any number
here, not a whole number of steps: such weights run on our kernels but not in checkpoints with integer zero points.
"""

import dataclasses

import torch
from torch import Tensor

from codesign.engine.quantize.grid import AffineGrid, Fit, Grid, Quantized, representable
from codesign.engine.quantize.inputs import InputStats
from codesign.engine.quantize.method import Method

_BETA, _GROWTH = 10.0, 1.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hqq(Method):
    """Args:
    norm: p of the error's norm, in (0, 1).
    num_steps: at most; a step that makes the mean error larger ends the loop.
    """

    norm: float = 0.7
    num_steps: int = 20

    def quantize(
        self, weight: Tensor, grid: Grid, inputs: InputStats | None, *, num_unclipped_rows: int = 0
    ) -> Quantized:
        if not isinstance(grid, AffineGrid) or grid.is_symmetric:
            raise ValueError("hqq moves the offset of a group and needs an asymmetric integer format")
        fit = grid.fit(weight)
        assert fit.offset is not None
        num_out, num_groups = fit.scale.shape
        values = weight.float().view(num_out, num_groups, -1)
        unit = values.abs().mean().clamp(min=1e-30)
        scale, offset, beta = fit.scale.float(), fit.offset, _BETA
        kept, kept_error = fit.offset, torch.full_like(scale, float("inf"))
        for _ in range(self.num_steps):
            codes = grid.encode(values, Fit(fit.scale, offset))
            residual = (values - grid.decode(codes, Fit(fit.scale, offset))) / unit
            size = residual.abs()
            error = size.pow(self.norm).mean(-1)
            is_better = error < kept_error
            if not bool(is_better.any()):
                break
            kept, kept_error = torch.where(is_better, offset, kept), torch.where(is_better, error, kept_error)
            shrunk = residual.sign() * (size - size.clamp(min=1e-8).pow(self.norm - 1) / beta).clamp(min=0) * unit
            wanted = (values - shrunk - (codes.float() - grid.middle) * scale[..., None]).mean(-1)
            offset = representable(wanted.to(grid.scale_dtype), wanted, "offset")
            beta *= _GROWTH
        return grid.quantize(weight, Fit(fit.scale, kept))

"""gptq: column by column, each rounding error pushed into the columns that are still to come.

    H = (2 / n) sum x xT,  damped;   H^-1 = UT U
    for each column i:   q_i = nearest(w_i);   e = (w_i - q_i) / U_ii;   w_j -= e U_ij  for all j > i

Frantar et al., 2022 (https://arxiv.org/abs/2210.17323), algorithm 1, with columns in order of falling H_ii and groups
fitted to the original weight ("static"), so that inference needs no index of groups. Columns are done in blocks; the
columns after a block get its errors in one product.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from codesign.engine.quantize.grid import Grid, Quantized
from codesign.engine.quantize.inputs import InputStats
from codesign.engine.quantize.method import Method

_BLOCK = 128
_MAX_TRIES = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gptq(Method):
    """Args:
    damping: share of the mean diagonal that is added to the diagonal; ten times as much after each failed
        factorisation.
    act_order: columns with the largest second moment first.
    feedback: False rounds without pushing errors on, which is rtn; for tests of the difference.
    """

    damping: float = 0.01
    act_order: bool = True
    feedback: bool = True
    needs_inputs: ClassVar[bool] = True

    def quantize(
        self, weight: Tensor, grid: Grid, inputs: InputStats | None, *, num_unclipped_rows: int = 0
    ) -> Quantized:
        """Raises ValueError also when no damping makes the second moment invertible (inputs that are not finite)."""
        if inputs is None:
            raise ValueError("gptq needs calibration inputs")
        num_in = weight.shape[1]
        size = num_in // grid.num_groups(num_in)
        fit = grid.fit(weight)
        hessian = inputs.hessian.to(weight.device)
        order = torch.arange(num_in, device=weight.device)
        if self.act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
            hessian = hessian[order][:, order]
        upper, damping = inverse_factor(hessian, self.damping)
        del hessian
        work = weight.float()[:, order].t().contiguous()  # [in, out]: a column of the weight is a row here
        codes = torch.empty(num_in, weight.shape[0], dtype=torch.uint8, device=weight.device)
        groups = (order // size).tolist()
        for start in range(0, num_in, _BLOCK):
            stop = min(start + _BLOCK, num_in)
            errors = torch.zeros(stop - start, work.shape[1], device=work.device)
            for i in range(start, stop):
                own = fit.of_group(groups[i])
                code = grid.encode(work[i, :, None, None], own)
                codes[i] = code.flatten()
                if self.feedback:
                    error = (work[i] - grid.decode(code, own).flatten()) / upper[i, i]
                    work[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
                    errors[i - start] = error
            if self.feedback and stop < num_in:
                work[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
        unordered = torch.empty_like(codes)
        unordered[order] = codes
        note = (
            "" if damping == self.damping else f"gptq: damping {damping:g}, with {self.damping:g} it cannot be solved"
        )
        return Quantized(unordered.t().contiguous(), fit, note)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular U with UT U = (H + damping mean(diag H) I)^-1, fp32, as exact as fp32 allows; the damping used.

    Inputs that are always 0 (H_ii = 0) get a diagonal of 1: they then neither give nor take errors.
    Memory: two matrices of H's size in fp64 beside it.

    Raises:
        ValueError: no damping helps, because the second moment is not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the calibration inputs of this layer are not finite")
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].double().mean() if bool((~dead).any()) else 1.0
    for attempt in range(_MAX_TRIES):
        own = damping * 10**attempt
        damped = hessian.double()
        damped.diagonal().add_(mean * own + dead.double())
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper = torch.linalg.cholesky(inverse, upper=True)
            if bool(torch.isfinite(upper).all()):
                return upper.float(), own
    raise ValueError("the second moment of this layer's calibration inputs cannot be factorised")

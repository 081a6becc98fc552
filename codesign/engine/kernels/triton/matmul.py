"""Few rows of x times packed weights through the Triton kernels beside this file, each at the config planned for M."""

import dataclasses

from torch import Tensor

from codesign.engine.kernels.triton.affine import affine
from codesign.engine.kernels.triton.configs import Plan
from codesign.engine.kernels.triton.nf4 import nf4
from codesign.engine.kernels.triton.w8a16 import w8a16


@dataclasses.dataclass(frozen=True)
class TritonMatmul:
    """Every tensor lies on one device and is contiguous; results are [M, out] in the dtype of x, M >= 1."""

    plan: Plan

    def int8(self, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return w8a16(x, codes, scale, config=self.plan.config(x.shape[0]))

    def affine(self, x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor | None, bits: int) -> Tensor:
        return affine(x, packed, scale, offset, bits=bits, config=self.plan.config(x.shape[0]))

    def nf4(self, x: Tensor, packed: Tensor, levels: Tensor, scale_codes: Tensor, step: Tensor, mean: Tensor) -> Tensor:
        return nf4(x, packed, levels, scale_codes, step, mean, config=self.plan.config(x.shape[0]))

"""ShadowedLinear: a packed weight for few rows of x and a dense copy of it for many: speed at every M, paid in bytes.

The dense copy holds the very values that the packed weight means, rounded to the activations' dtype as unpacking rounds
them, so that both ways compute the same function.
"""

import torch
from torch import Tensor

from codesign.engine.quantize.formats.native import Native
from codesign.engine.quantize.linear import Linear, Stored, Workspace
from codesign.engine.quantize.packed_linear import PackedLinear


class ShadowedLinear(Linear):
    """Raises ValueError where no kernel on the packed weight is faster than a dense product at any M."""

    def __init__(self, packed: PackedLinear, *, dtype: torch.dtype, workspace: Workspace) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.out_features, packed.in_features
        self.max_packed_rows = packed.few_rows.max_rows_beside_dense
        if self.max_packed_rows == 0:
            raise ValueError(
                f"shadow: a dense copy would run every product, because no kernel here is faster on the packed weight "
                f"({packed.kernel}); use shadow: false, or weights native"
            )
        self.packed, self.note = packed, packed.note
        self.dense = Native().pack(packed.dequantize(), packed.bias, dtype=dtype, workspace=workspace)
        few_rows = f"{packed.few_rows.name} (M<={self.max_packed_rows}{packed.few_rows.note})"
        self.kernel = f"{few_rows}, {self.dense.kernel} on a dense copy"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._for(x)(x)
        return y

    def wide(self, x: Tensor) -> Tensor:
        return self._for(x).wide(x)

    def _for(self, x: Tensor) -> Linear:
        return self.packed if x.shape[0] <= self.max_packed_rows else self.dense

    def stored(self) -> Stored | None:
        return self.packed.stored()

    def dequantize(self) -> Tensor:
        return self.packed.dequantize()

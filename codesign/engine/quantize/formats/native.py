"""native: the weight as it is, in the model's dtype."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from codesign.engine.quantize import blocked, half_packed, prepacked
from codesign.engine.quantize.few_rows import FewRows
from codesign.engine.quantize.format import WeightFormat
from codesign.engine.quantize.inputs import InputStats
from codesign.engine.quantize.linear import Linear, Workspace
from codesign.engine.quantize.packed_linear import PackedLinear
from codesign.engine.quantize.widened import compute_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Native(WeightFormat):
    """Dense weights; the neutral member. Two bytes a weight in bf16 and fp16, four in fp32."""

    def pack(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        workspace: Workspace,
        inputs: InputStats | None = None,
        num_unclipped_rows: int = 0,
    ) -> Linear:
        dense = weight.to(dtype)
        if blocked.holds(dense):
            return blocked.BlockedLinear(dense, None if bias is None else bias.to(dtype))
        if prepacked.holds(dense):
            return prepacked.PrepackedLinear(dense, None if bias is None else bias.to(dtype))
        if compute_dtype(dtype, dense.device) != dtype and half_packed.holds(dense):
            return half_packed.HalfPackedLinear(dense, None if bias is None else bias.to(dtype))
        return self.wrap(dense, bias, workspace=workspace)

    def wrap(self, weight: Tensor, bias: Tensor | None, *, workspace: Workspace) -> Linear:
        """A Linear around this very tensor, copied nowhere: for a head tied to its embedding table."""
        bias = None if bias is None else bias.to(weight.dtype)
        if compute_dtype(weight.dtype, weight.device) == weight.dtype:
            return _DenseLinear(weight, bias)
        return _WidenedLinear(weight, bias, workspace)


class _DenseLinear(Linear):
    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kernel = "aten::linear"
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def dequantize(self) -> Tensor:
        return self.weight.float()


class _WidenedLinear(PackedLinear):
    """On a CPU without products in the weight's dtype: matrix-vector products for few rows, fp32 slices for more."""

    weight: Tensor

    # Zen 3, [9728, 896], ms on one core: 2.2 / 4.2 / 8.2 at M = 1 / 2 / 4, widened 3.7 / 4.8 / 5.6
    _FEW_ROWS = FewRows("aten::linear", 2)

    def __init__(self, weight: Tensor, bias: Tensor | None, workspace: Workspace) -> None:
        super().__init__(
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            bias=bias,
            dtype=weight.dtype,
            device=weight.device,
            workspace=workspace,
            few_rows=self._FEW_ROWS,
        )
        self.register_buffer("weight", weight)

    def multiply_packed(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def unpack(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self.weight[start:stop])

    def dequantize(self) -> Tensor:
        return self.weight.float()

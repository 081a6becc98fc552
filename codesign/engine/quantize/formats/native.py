"""native: the weight as it is, in the model's dtype."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from codesign.engine.quantize.linear import Linear, WeightFormat, Workspace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Native(WeightFormat):
    """Dense weights; the neutral member."""

    def pack(self, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        return _NativeLinear(weight.to(dtype), None if bias is None else bias.to(dtype))


class _NativeLinear(Linear):
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

"""A bf16 weight in the blocks that our own kernel multiplies (`kernels/dense_matmul.c`).

Beside oneDNN's packed product (`prepacked.py`), for the four products of a layer of 896 channels, 4864 in its
feed-forward, on two Zen 4 cores: 1.23 times as fast at M = 1, 1.33 at 8, 1.37 at 16, 1.18 at 32, 1.07 at 64, even from
128 on. And a row's result is the same to the last bit whatever the rows beside it.
"""

import torch
from torch import Tensor

from codesign.engine.kernels import dense_matmul
from codesign.engine.kernels.compiled import Missing
from codesign.engine.quantize.linear import Linear


def holds(weight: Tensor) -> bool:
    """Whether the kernel is here and for such a weight. AMX has twice its arithmetic and is left to oneDNN."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.numel() > 0
        and not torch.cpu._is_amx_tile_supported()
        and not isinstance(dense_matmul.load(), Missing)
    )


class BlockedLinear(Linear):
    """[out, in] weights as [out / 32, in / 2, 32, 2], filled up with zeros."""

    blocks: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        found = dense_matmul.load()
        assert not isinstance(found, Missing), "holds(weight) comes first"
        self._kernel = found
        self.out_features, self.in_features = weight.shape
        self.kernel = "codesign::dense_matmul (bf16)"
        self.register_buffer("blocks", found.pack(weight))
        self.register_buffer("bias", None)
        if bias is not None:
            self.bias = torch.zeros(self.blocks.shape[0] * dense_matmul.OUTPUTS)
            self.bias[: self.out_features] = bias

    def forward(self, x: Tensor) -> Tensor:
        return self._kernel.multiply(x, self.blocks, self.bias, num_out=self.out_features)

    def wide(self, x: Tensor) -> Tensor:
        return self._kernel.multiply(x, self.blocks, self.bias, num_out=self.out_features, dtype=torch.float32)

    def dequantize(self) -> Tensor:
        return self._kernel.unpack(self.blocks, num_out=self.out_features, num_in=self.in_features).float()

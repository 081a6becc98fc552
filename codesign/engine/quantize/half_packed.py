"""A 16-bit weight that FBGEMM keeps packed as fp16 and multiplies in fp32: what a CPU without 16-bit products wants.

FBGEMM widens the weight in registers, so the product is bound by reading two bytes a weight at small M and by fp32
arithmetic at large M, with no dequantised copy anywhere. fp16 weights are held exactly. bf16 weights are exact wherever
|w| >= 2^-17 (eight significant bits end above fp16's last bit, 2^-24) and off by at most 2^-25 below; `holds` refuses
weights whose values lie so low, or so high, that this could be seen.
"""

import warnings

import torch
from torch import Tensor

from codesign.engine.quantize import cpu
from codesign.engine.quantize.linear import Linear

_MAX_RELATIVE_ERROR = 1e-5  # of the whole weight, in the Frobenius norm; rounding an activation to bf16 is 2e-3
_COLUMN_BLOCK, _PADDING_BYTES = 16, 1024  # FBGEMM packs [in, 16 outputs] panels and pads the allocation


def holds(weight: Tensor) -> bool:
    """Whether packing keeps the values of a 16-bit CPU weight and this build of torch has the kernel."""
    if weight.device.type != "cpu" or weight.numel() == 0 or not cpu.has_half_packed_kernel():
        return False
    if weight.dtype == torch.float16:
        return True
    squared_error = squared_norm = 0.0
    for rows in torch.split(weight, max(1, 2**18 // weight.shape[1])):  # slices that stay in the cache
        wide = rows.float()
        if not bool(wide.abs().amax() <= torch.finfo(torch.float16).max):  # NaN compares false
            return False
        squared_error += float((wide.half().float() - wide).square().sum())
        squared_norm += float(wide.square().sum())
    return squared_error <= _MAX_RELATIVE_ERROR**2 * squared_norm


class HalfPackedLinear(Linear):
    """[out, in] weights in FBGEMM's fp16 panels; activations of any float dtype are widened to fp32 for the product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kernel = "fbgemm::linear_dynamic_fp16 (fp32 accumulation)"
        wide_bias = None if bias is None else bias.float().contiguous()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "weight out of range" must not pass unseen
            self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float().contiguous(), wide_bias)
        columns = -(-self.out_features // _COLUMN_BLOCK) * _COLUMN_BLOCK
        bias_bytes = 0 if wide_bias is None else wide_bias.numel() * wide_bias.itemsize
        self.opaque_bytes = columns * self.in_features * 2 + _PADDING_BYTES + bias_bytes
        self._multiply = torch.ops.quantized.linear_dynamic_fp16.default

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x).to(x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        return self._multiply(x.float(), self._packed)  # type: ignore[no-any-return]

    def dequantize(self) -> Tensor:
        return torch.ops.quantized.linear_unpack_fp16(self._packed)[0].float()  # type: ignore[no-any-return]

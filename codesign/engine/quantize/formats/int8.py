"""int8: symmetric 8-bit weights, one scale per output row, 16-bit activations.

Half the bytes of 16-bit weights (8 + 16 / in bits a weight) at close to no loss; pays where reading weights is the
cost, that is at small batches.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from codesign.engine.quantize.few_rows import choose
from codesign.engine.quantize.format import GridFormat
from codesign.engine.quantize.grid import AffineGrid, Fit, Quantized, row_grid, signed
from codesign.engine.quantize.linear import Linear, Stored, Workspace
from codesign.engine.quantize.widened import compute_dtype, multiply_unpacked

_IN_MULTIPLE = 16  # ATen reads 16 inputs at a time without a tail loop, past the end of the row where there is one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(GridFormat):
    """Args:
    method: how codes are chosen.
    """

    method: str = "rtn"

    def grid(self, dtype: torch.dtype) -> AffineGrid:
        return row_grid(dtype)

    def check_size(self, num_out: int, num_in: int) -> None:
        if num_in % _IN_MULTIPLE:
            raise ValueError(f"int8 needs an input size that is a multiple of {_IN_MULTIPLE}, got {num_in}")

    def build(self, quantized: Quantized, bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        codes = signed(quantized.codes)
        return _Int8Linear(codes, quantized.fit.scale.flatten(), bias, dtype=dtype, workspace=workspace)

    def restore(self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        return _Int8Linear(tensors["codes"], tensors["scale"], tensors.get("bias"), dtype=dtype, workspace=workspace)


class _Int8Linear(Linear):
    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.to(dtype))
        self._workspace = workspace
        self._compute_dtype = compute_dtype(dtype, codes.device)
        few_rows = choose("int8", dtype=dtype, device=codes.device)
        self.kernel_max_rows, self._compiled = few_rows.max_rows, few_rows.compiled
        self.kernel = few_rows.describe(f"widen + aten::mm {str(self._compute_dtype).removeprefix('torch.')}")

    def forward(self, x: Tensor) -> Tensor:
        if 0 < x.shape[0] <= self.kernel_max_rows:
            if self._compiled is None:
                return self._aten(x)
            y = self._compiled.int8(x, self.codes).mul_(self.scale)
            return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)
        y = multiply_unpacked(
            x.to(self._compute_dtype),
            self._unpack,
            out_features=self.out_features,
            step=1,
            is_transposed=False,
            workspace=self._workspace,
        )
        if self._compute_dtype == torch.float32:
            y.mul_(self.scale)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)

    def _aten(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if x.data_ptr() % 32:  # ATen's kernel uses aligned loads and faults on a view that starts elsewhere
            x = x.clone()
        y: Tensor = torch.ops.aten._weight_int8pack_mm.default(x, self.codes, self.scale)
        return y if self.bias is None else y.add_(self.bias)

    def _unpack(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self.codes[start:stop])
        if self._compute_dtype != torch.float32:  # sums of unscaled codes overflow fp16; fp32 scales its few outputs
            out.mul_(self.scale[start:stop, None])

    def stored(self) -> Stored:
        return Stored(Quantized(signed(self.codes), Fit(self.scale[:, None])), row_grid(self.scale.dtype))

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scale.float()[:, None]

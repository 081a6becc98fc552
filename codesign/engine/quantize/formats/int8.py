"""int8: symmetric 8-bit weights, one scale per output row, 16-bit activations.

Half the bytes of 16-bit weights (8 + 16 / in bits a weight) at close to no loss; pays where reading weights is the
cost, that is at small batches.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from codesign.engine.kernels import dense_matmul
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.dense_matmul import DenseMatmul
from codesign.engine.kernels.triton import available
from codesign.engine.quantize.few_rows import choose_cpu, choose_triton
from codesign.engine.quantize.grid import AffineGrid, Fit, Quantized, row_grid, signed
from codesign.engine.quantize.linear import Linear, Stored, Workspace
from codesign.engine.quantize.packed_linear import PackedFormat, PackedLinear

# The kernel for few rows is faster than the dense one up to here: at M = 8, [9728, 896] 0.57 and 0.70 ms, [896, 4864]
# 0.44 and 0.38; at M = 12, 0.85 and 0.92, 0.63 and 0.48 (Zen 4, two threads).
_FEW_ROWS_BESIDE_DENSE = 8
_IN_MULTIPLE = 16  # ATen reads 16 inputs at a time without a tail loop, past the end of the row where there is one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(PackedFormat):
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


class _Int8Linear(PackedLinear):
    codes: Tensor
    scale: Tensor

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace
    ) -> None:
        (num_out, num_in), device = codes.shape, codes.device
        if available.is_target(device):
            few_rows = choose_triton("int8", dtype=dtype, device=device, out_features=num_out, in_features=num_in)
        else:
            few_rows = choose_cpu("int8", dtype=dtype, out_features=num_out)
        super().__init__(
            out_features=num_out,
            in_features=num_in,
            bias=bias,
            dtype=dtype,
            device=device,
            workspace=workspace,
            few_rows=few_rows,
            has_compiled_unpack=True,
        )
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale)
        found = dense_matmul.load()
        self._dense: DenseMatmul | None = None
        if few_rows.compiled is not None and dtype == torch.bfloat16 and not isinstance(found, Missing):
            self._dense, self.kernel_max_rows = found, _FEW_ROWS_BESIDE_DENSE
            few_rows = dataclasses.replace(few_rows, max_rows=_FEW_ROWS_BESIDE_DENSE)
            self.kernel = few_rows.describe("codesign::dense_int8 (bf16)")

    def multiply_packed(self, x: Tensor) -> Tensor:
        if self.few_rows.triton is not None:
            return self.few_rows.triton.int8(x, self.codes, self.scale)
        if self.few_rows.compiled is not None:
            return self.few_rows.compiled.int8(x, self.codes).mul_(self.scale)
        x = x.contiguous()
        if x.data_ptr() % 32:  # ATen's kernel uses aligned loads and faults on a view that starts elsewhere
            x = x.clone()
        y: Tensor = torch.ops.aten._weight_int8pack_mm.default(x, self.codes, self.scale)
        return y

    def _multiply_unpacked(self, x: Tensor) -> Tensor:
        if self._dense is None:
            return super()._multiply_unpacked(x)
        dtype = torch.bfloat16 if self.bias is None else torch.float32  # rounded once, after the bias
        return self._dense.multiply_int8(x, self.codes, self.scale.float(), dtype=dtype)

    def _multiply_widened(self, x: Tensor) -> Tensor:
        if self._dense is None:
            return super()._multiply_widened(x)
        return self._dense.multiply_int8(x, self.codes, self.scale.float(), dtype=torch.float32)

    def unpack(self, start: int, stop: int, out: Tensor) -> None:
        if self.compiled_unpack is not None:
            self.compiled_unpack.int8(self.codes[start:stop], self.scale[start:stop], out)
        else:
            torch.mul(self.codes[start:stop], self.scale[start:stop, None], out=out)

    def stored(self) -> Stored:
        return Stored(Quantized(signed(self.codes), Fit(self.scale[:, None])), row_grid(self.scale.dtype))

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scale.float()[:, None]

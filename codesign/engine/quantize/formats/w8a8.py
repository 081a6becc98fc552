"""w8a8: 8-bit weights, one scale per output row, times activations rounded to 8 bits, one scale per token.

The product runs on integers (oneDNN on CPUs with VNNI or AMX, tensor cores on CUDA), so it pays where arithmetic is the
cost: prefill and large batches. Activations are rounded at every M, so results do not depend on the batch.
`method: smoothquant` first moves outliers of the activations into the weights (Xiao et al., 2022,
https://arxiv.org/abs/2211.10438).
"""

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from codesign.engine.kernels import w8a8
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.w8a8 import W8A8Kernel
from codesign.engine.quantize.format import GridFormat
from codesign.engine.quantize.grid import AffineGrid, Fit, Quantized, row_grid, signed
from codesign.engine.quantize.linear import Linear, Stored, Workspace
from codesign.engine.quantize.widened import multiply_unpacked

_MULTIPLE = 8  # of inputs and outputs, for the integer tensor cores' tiles
_CUDA_MIN_ROWS = 17  # cuBLAS refuses 16 rows and fewer


@dataclasses.dataclass(frozen=True, kw_only=True)
class W8A8(GridFormat):
    """Args:
    method: how codes are chosen.
    """

    method: str = "rtn"

    def grid(self, dtype: torch.dtype) -> AffineGrid:
        return row_grid(torch.float32)

    def check_size(self, num_out: int, num_in: int) -> None:
        if num_in % _MULTIPLE or num_out % _MULTIPLE:
            raise ValueError(f"w8a8 needs sizes that are multiples of {_MULTIPLE}, got {num_out} x {num_in}")

    def build(self, quantized: Quantized, bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        codes = signed(quantized.codes)
        return _W8A8Linear(codes, quantized.fit.scale.flatten(), bias, dtype=dtype, workspace=workspace)

    def restore(self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        return _W8A8Linear(tensors["codes"], tensors["scale"], tensors.get("bias"), dtype=dtype, workspace=workspace)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, in] -> codes [M, in] int8 in -127 .. 127, scale [M, 1] fp32; a row of zeros has scale 1."""
    wide = x.float()
    scale = wide.abs().amax(dim=1, keepdim=True).div_(127)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    # Into memory of its own: for a row whose stride says 0, as strides of size 1 may, `_int_mm` silently does nothing
    # (pytorch/pytorch#195066).
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes.copy_((wide / scale).round_()), scale


@functools.cache
def has_exact_products(device: torch.device) -> bool:
    """Whether `_int_mm` adds without saturating: on AVX2 CPUs it does not (pytorch/pytorch#136746)."""
    extreme = torch.full((17, 64), 127, dtype=torch.int8, device=device)
    extreme[::2] = -127
    wanted = extreme.double() @ extreme.double().t()
    return bool(torch.equal(torch._int_mm(extreme, extreme.t()).double(), wanted))


class _W8A8Linear(Linear):
    codes: Tensor
    scale: Tensor
    bias: Tensor | None  # fp32: it is added to exact sums

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self._workspace = workspace
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.float())
        self._is_exact = has_exact_products(codes.device)
        self._compiled: W8A8Kernel | None = None
        self._max_rows = 0
        product = "aten::_int_mm" if self._is_exact else "widen + aten::mm float32; aten::_int_mm saturates here"
        if codes.device.type == "cpu" and w8a8.takes(dtype):
            found = w8a8.load()
            if isinstance(found, Missing):
                product += f"; ours: {found.reason}"
            else:
                self._compiled, self._max_rows = found, found.max_rows(self.in_features)
                product = f"codesign::w8a8 (M<={self._max_rows}), {product}" if self._max_rows else product
        self.kernel = f"{product} (activations rounded per token)"

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self.out_features)
        if self._compiled is not None:
            codes, token_scale = self._compiled.quantize(x)
            return self._compiled.scaled(self._sums(codes), token_scale, self.scale, self.bias, x.dtype)
        codes, token_scale = quantize_tokens(x)
        y = self._sums(codes).float().mul_(token_scale).mul_(self.scale)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)

    def _sums(self, codes: Tensor) -> Tensor:
        """[M, out] int32: products of the codes, not yet scaled."""
        num_rows = codes.shape[0]
        if self._compiled is not None and num_rows <= self._max_rows:
            return self._compiled.sums(codes, self.codes)
        if not self._is_exact:  # in fp32, exact too: |sum| < 2^24 for up to 1040 inputs, nearly so beyond
            return multiply_unpacked(
                codes.float(),
                self._widen,
                out_features=self.out_features,
                step=1,
                is_transposed=False,
                workspace=self._workspace,
            ).to(torch.int32)
        if codes.is_cuda and num_rows < _CUDA_MIN_ROWS:
            codes = torch.nn.functional.pad(codes, (0, 0, 0, _CUDA_MIN_ROWS - num_rows))
        return torch._int_mm(codes, self.codes.t())[:num_rows]

    def _widen(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self.codes[start:stop])

    def rounded(self, x: Tensor) -> Tensor:
        codes, scale = quantize_tokens(x)
        return codes.float() * scale

    def stored(self) -> Stored:
        return Stored(Quantized(signed(self.codes), Fit(self.scale[:, None])), row_grid(self.scale.dtype))

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scale[:, None]

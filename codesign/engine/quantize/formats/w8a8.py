"""w8a8: 8-bit weights, one scale per output row, times activations rounded to 8 bits, one scale per token.

The product runs on integers (our kernel on CPUs with AVX-512 VNNI, oneDNN on others, tensor cores on CUDA), so it pays
where arithmetic is the cost: prefill and large batches. Activations are rounded at every M, so results do not depend on
the batch.
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
from codesign.engine.kernels.w8a8 import BLOCK, W8A8Kernel, from_blocks, to_blocks
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
    extreme = torch.full((24, 64), 127, dtype=torch.int8, device=device)  # CUDA asks for over 16 rows, of eights
    extreme[::2] = -127
    wanted = extreme.double() @ extreme.double().t()
    return bool(torch.equal(torch._int_mm(extreme, extreme.t()).double(), wanted))


class _W8A8Linear(Linear):
    codes: Tensor  # [out, in] int8; in blocks (kernels/w8a8.py) where our kernel multiplies them
    scale: Tensor
    bias: Tensor | None  # fp32: it is added to exact sums

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace
    ) -> None:
        """Takes codes in either order and keeps them in that of the kernel that will run."""
        super().__init__()
        self.out_features = scale.shape[0]
        self.in_features = codes.numel() // self.out_features
        self._workspace = workspace
        found = w8a8.load() if codes.device.type == "cpu" and w8a8.takes(dtype) else None
        self._compiled = found if isinstance(found, W8A8Kernel) else None
        has_blocks = self._compiled is not None and self._compiled.has_products and self.out_features % BLOCK == 0
        if has_blocks != (codes.dim() == 4):
            codes = to_blocks(codes) if has_blocks else from_blocks(codes)
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.float())
        self._is_exact = has_exact_products(codes.device)
        product = "aten::_int_mm" if self._is_exact else "widen + aten::mm float32; aten::_int_mm saturates here"
        if has_blocks:
            product = "codesign::w8a8"
        elif isinstance(found, Missing):
            product += f"; ours: {found.reason}"
        self.kernel = f"{product} (activations rounded per token)"

    def forward(self, x: Tensor) -> Tensor:
        return self._scaled(x, x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        return self._scaled(x, torch.float32)

    def _scaled(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self.out_features, dtype=dtype)
        if self._compiled is not None:
            codes, token_scale, code_sums = self._compiled.quantize(x, is_padded=self._has_blocks)
            sums = self._compiled.sums(codes, code_sums, self.codes) if self._has_blocks else self._sums(codes)
            return self._compiled.scaled(sums, token_scale, self.scale, self.bias, dtype)
        codes, token_scale = quantize_tokens(x)
        y = self._sums(codes).float().mul_(token_scale).mul_(self.scale)
        return (y if self.bias is None else y.add_(self.bias)).to(dtype)

    @property
    def _has_blocks(self) -> bool:
        return self.codes.dim() == 4

    def _sums(self, codes: Tensor) -> Tensor:
        """[M, out] int32: products of the codes, not yet scaled."""
        num_rows = codes.shape[0]
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

    def _plain_codes(self) -> Tensor:
        return from_blocks(self.codes) if self._has_blocks else self.codes

    def stored(self) -> Stored:
        return Stored(Quantized(signed(self._plain_codes()), Fit(self.scale[:, None])), row_grid(self.scale.dtype))

    def dequantize(self) -> Tensor:
        return self._plain_codes().float() * self.scale[:, None]

"""fp8: e4m3 weights, one scale per output row, times activations rounded to e4m3, one scale per token.

The product runs on the fp8 tensor cores (`torch._scaled_mm` with row-wise scales), so it pays where arithmetic is the
cost: prefill and large batches; half the bytes of 16-bit weights pay in decoding. Devices without such cores refuse it.
`emulated: true` rounds just the same and multiplies in fp32: what fp8 costs in quality and bytes, and nothing about
speed, which is why no time is kept of such a trial (`spec/rules.py`).
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from codesign.engine.quantize.format import GridFormat
from codesign.engine.quantize.fp8_grid import E4M3, LARGEST, Fp8Grid, to_e4m3
from codesign.engine.quantize.grid import Quantized
from codesign.engine.quantize.linear import Linear, Workspace
from codesign.engine.quantize.widened import multiply_unpacked
from codesign.spec.rules import fp8_refusal

_MULTIPLE = 16  # of inputs and outputs, for the tensor cores' tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8(GridFormat):
    """Args:
    method: how codes are chosen.
    emulated: round to e4m3 and multiply in fp32, on devices that do not multiply e4m3.
    """

    method: str = "rtn"
    emulated: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.emulated, bool):
            raise ValueError(f"emulated must be true or false, got {self.emulated!r}")

    def check_device(self, device: torch.device, dtype: torch.dtype) -> None:
        is_cuda = device.type == "cuda"
        capability = ".".join(map(str, torch.cuda.get_device_capability(device))) if is_cuda else None
        reason = fp8_refusal(capability, is_emulated=self.emulated)
        if reason is not None:
            raise ValueError(reason)
        if not self.emulated and dtype != torch.bfloat16:
            raise ValueError("the product of fp8 comes in bf16; use dtype bf16")

    def grid(self, dtype: torch.dtype) -> Fp8Grid:
        return Fp8Grid()

    def check_size(self, num_out: int, num_in: int) -> None:
        if num_in % _MULTIPLE or num_out % _MULTIPLE:
            raise ValueError(f"fp8 needs sizes that are multiples of {_MULTIPLE}, got {num_out} x {num_in}")

    def build(self, quantized: Quantized, bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        return self._linear(quantized.codes.view(E4M3), quantized.fit.scale.flatten(), bias, dtype, workspace)

    def restore(self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        return self._linear(tensors["codes"], tensors["scale"], tensors.get("bias"), dtype, workspace)

    def _linear(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, workspace: Workspace
    ) -> Linear:
        self.check_device(codes.device, dtype)
        kind = _EmulatedFp8Linear if self.emulated else _Fp8Linear
        return kind(codes, scale, bias, dtype=dtype, workspace=workspace)


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, in] -> codes [M, in] e4m3, scale [M, 1] fp32; a row of zeros has scale 1, and one with NaN stays NaN."""
    wide = x.float()
    scale = wide.abs().amax(dim=1, keepdim=True).div_(LARGEST)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    # Into memory of its own: a single row may come with any stride, which the product would take at its word.
    codes = torch.empty(x.shape, dtype=E4M3, device=x.device)
    return codes.copy_(to_e4m3(wide / scale)), scale


class _Fp8Linear(Linear):
    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self._workspace = workspace
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.to(dtype))
        self.kernel = "aten::_scaled_mm e4m3, row-wise (activations rounded per token)"

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self.out_features)
        codes, token_scale = round_tokens(x)
        y = self._product(codes, token_scale)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)

    def _product(self, codes: Tensor, token_scale: Tensor) -> Tensor:
        """[M, out], scaled."""
        y: Tensor = torch._scaled_mm(
            codes, self.codes.t(), scale_a=token_scale, scale_b=self.scale[None], out_dtype=torch.bfloat16
        )
        return y

    def rounded(self, x: Tensor) -> Tensor:
        codes, scale = round_tokens(x)
        return codes.float() * scale

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scale[:, None]


class _EmulatedFp8Linear(_Fp8Linear):
    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace
    ) -> None:
        super().__init__(codes, scale, bias, dtype=dtype, workspace=workspace)
        self.kernel = "emulation of fp8: round to e4m3, widen + aten::mm float32"

    def _product(self, codes: Tensor, token_scale: Tensor) -> Tensor:
        sums = multiply_unpacked(
            codes.float(),
            self._widen,
            out_features=self.out_features,
            step=1,
            is_transposed=False,
            workspace=self._workspace,
        )
        return sums.mul_(token_scale).mul_(self.scale)

    def _widen(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self.codes[start:stop])

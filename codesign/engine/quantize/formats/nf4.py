"""nf4: sixteen levels at the quantiles of a normal distribution, one scale per 64 weights, 16-bit activations.

QLoRA, Dettmers et al., 2023 (https://arxiv.org/abs/2305.14314), with double quantisation: 4.127 bits a weight. On the
CPU no kernel multiplies nf4, so every product unpacks the weight once; on CUDA kernels/triton/nf4.py does.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from codesign.engine.quantize.few_rows import choose_triton
from codesign.engine.quantize.grid import Quantized
from codesign.engine.quantize.linear import Linear, Workspace
from codesign.engine.quantize.nf4_grid import BLOCK, Nf4Fit, Nf4Grid, ScaleCodes, byte_levels, levels, levels_in
from codesign.engine.quantize.packed_linear import PackedFormat, PackedLinear


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nf4(PackedFormat):
    """Args:
    method: how codes are chosen.
    """

    method: str = "rtn"

    def grid(self, dtype: torch.dtype) -> Nf4Grid:
        return Nf4Grid()

    def check_size(self, num_out: int, num_in: int) -> None:
        if num_in % BLOCK:
            raise ValueError(f"nf4 needs an input size that is a multiple of its block of {BLOCK}, got {num_in}")

    def build(self, quantized: Quantized, bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        assert isinstance(quantized.fit, Nf4Fit) and quantized.fit.scale_codes is not None
        pairs = quantized.codes.view(quantized.codes.shape[0], -1, 2)
        scales = quantized.fit.scale_codes
        return _Nf4Linear(pairs[..., 0] | pairs[..., 1] << 4, scales, bias, dtype=dtype, workspace=workspace)

    def restore(self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        scales = ScaleCodes(tensors["scale_codes"], tensors["scale_step"], tensors["scale_mean"])
        return _Nf4Linear(tensors["packed"], scales, tensors.get("bias"), dtype=dtype, workspace=workspace)


class _Nf4Linear(PackedLinear):
    packed: Tensor  # [out, in / 2] uint8, the even input's code in the low bits
    scale_codes: Tensor
    scale_step: Tensor
    scale_mean: Tensor

    def __init__(
        self, packed: Tensor, scales: ScaleCodes, bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace
    ) -> None:
        num_out, num_in = packed.shape[0], 2 * packed.shape[1]
        super().__init__(
            out_features=num_out,
            in_features=num_in,
            bias=bias,
            dtype=dtype,
            device=packed.device,
            workspace=workspace,
            few_rows=choose_triton(
                "nf4",
                dtype=dtype,
                device=packed.device,
                out_features=num_out,
                in_features=num_in,
                group_size=BLOCK,
            ),
            has_compiled_unpack=True,
        )
        self.register_buffer("packed", packed)
        self.register_buffer("scale_codes", scales.codes)
        self.register_buffer("scale_step", scales.step)
        self.register_buffer("scale_mean", scales.mean)

    def multiply_packed(self, x: Tensor) -> Tensor:
        assert self.few_rows.triton is not None  # there is no other kernel
        scales = (self.scale_codes, self.scale_step, self.scale_mean)
        return self.few_rows.triton.nf4(x, self.packed, levels_in(x.dtype, x.device), *scales)

    def unpack(self, start: int, stop: int, out: Tensor) -> None:
        scale = self._scales().scale(start, stop)
        if self.compiled_unpack is not None:
            self.compiled_unpack.levels(self.packed[start:stop], levels(), scale, out)
            return
        pairs = byte_levels(out.device).index_select(0, self.packed[start:stop].flatten().int())
        groups = pairs.view(stop - start, -1, BLOCK)
        torch.mul(groups, scale[..., None], out=out.view(groups.shape))

    def _scales(self) -> ScaleCodes:
        return ScaleCodes(self.scale_codes, self.scale_step, self.scale_mean)

    def dequantize(self) -> Tensor:
        pairs = byte_levels(self.packed.device)[self.packed.int()]
        return (pairs.view(self.out_features, -1, BLOCK) * self._scales().scale()[..., None]).flatten(1)

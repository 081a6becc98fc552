"""What int2, int3 and, on CUDA, int4 share: codes without gaps, unpacked slice by slice into the workspace.

    2, 4 bits: four or two codes a byte, lowest bits first;  8 bits: as they are
    3 bits: eight codes in three bytes: one byte of their highest bits, two of their lower two bits, four a byte

On the CPU no kernel multiplies these as they are, so every product unpacks the weight once: formats for memory and
quality there, whose speed is what is measured. On CUDA kernels/triton/affine.py does.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from codesign.engine.quantize.few_rows import choose_triton
from codesign.engine.quantize.format import check_group_size
from codesign.engine.quantize.grid import AffineGrid, Fit, Quantized
from codesign.engine.quantize.linear import Linear, Stored, Workspace
from codesign.engine.quantize.packed_linear import PackedFormat, PackedLinear

_IN_MULTIPLE = 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """codes [out, in] uint8 below 2^bits, `in` a multiple of 8 -> [out, in * bits / 8] uint8."""
    if bits == 8:
        return codes
    if bits == 4:
        return codes[:, ::2] | codes[:, 1::2] << 4
    low = _pack_pairs(codes & 3)
    return low if bits == 2 else torch.cat([low, _pack_single(codes >> 2)], dim=1)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """[n, in * bits / 8] -> codes [n, in] uint8; the inverse of `pack_bits`."""
    if bits == 8:
        return packed
    num_in = packed.shape[1] * 8 // bits
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)
    codes = packed.new_empty(packed.shape[0], num_in)
    pairs = codes.view(packed.shape[0], -1, 4)
    low = packed[:, : num_in // 4]
    for place in range(4):
        torch.bitwise_and(low >> (2 * place), 3, out=pairs[..., place])
    if bits == 3:
        eighths = codes.view(packed.shape[0], -1, 8)
        high = packed[:, num_in // 4 :]
        for place in range(8):
            eighths[..., place] |= ((high >> place) & 1) << 2
    return codes


def _pack_pairs(values: Tensor) -> Tensor:
    quads = values.view(values.shape[0], -1, 4)
    return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6


def _pack_single(values: Tensor) -> Tensor:
    eighths = values.view(values.shape[0], -1, 8)
    packed = eighths[..., 0].clone()
    for place in range(1, 8):
        packed |= eighths[..., place] << place
    return packed


class BitPackedLinear(PackedLinear):
    """packed [out, in * bits / 8] uint8; scale and, unless symmetric, offset [out, groups]."""

    packed: Tensor
    scale: Tensor
    offset: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        bias: Tensor | None,
        *,
        grid: AffineGrid,
        dtype: torch.dtype,
        workspace: Workspace,
    ) -> None:
        num_out, num_in = packed.shape[0], packed.shape[1] * 8 // grid.bits
        super().__init__(
            out_features=num_out,
            in_features=num_in,
            bias=bias,
            dtype=dtype,
            device=packed.device,
            workspace=workspace,
            few_rows=choose_triton(
                f"int{grid.bits}" if grid.bits < 8 else "int8 in groups",
                dtype=dtype,
                device=packed.device,
                out_features=num_out,
                in_features=num_in,
                group_size=num_in // scale.shape[1],
            ),
            has_compiled_unpack=True,
        )
        self._grid = grid
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    def multiply_packed(self, x: Tensor) -> Tensor:
        assert self.few_rows.triton is not None  # there is no other kernel
        return self.few_rows.triton.affine(x, self.packed, self.scale, self.offset, self._grid.bits)

    def unpack(self, start: int, stop: int, out: Tensor) -> None:
        rows = slice(start, stop)
        if self.compiled_unpack is not None:
            scale = self.scale[rows].float()
            middle = -self._grid.middle * scale
            if self.offset is not None:
                middle += self.offset[rows]
            self.compiled_unpack.bits(self.packed[rows], self._grid.bits, scale, middle, out)
            return
        codes = unpack_bits(self.packed[rows], self._grid.bits)
        groups = out.view(stop - start, self.scale.shape[1], -1)
        groups.copy_(codes.view(groups.shape)).sub_(self._grid.middle).mul_(self.scale[rows, :, None])
        if self.offset is not None:
            groups.add_(self.offset[rows, :, None])

    def stored(self) -> Stored:
        codes = unpack_bits(self.packed, self._grid.bits)
        return Stored(Quantized(codes, Fit(self.scale, self.offset)), self._grid)

    def dequantize(self) -> Tensor:
        return self._grid.dequantize(self.stored().quantized)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitPackedFormat(PackedFormat):
    """What int2 and int3 share.

    Args:
        method: how codes are chosen.
        group_size: inputs that share a scale and an offset, a multiple of 8.
        symmetric: no offset, 16 / group_size bits a weight less.
    """

    bits: ClassVar[int]
    method: str = "rtn"
    group_size: int = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_group_size(self.group_size, multiple_of=_IN_MULTIPLE)

    def grid(self, dtype: torch.dtype) -> AffineGrid:
        scale_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
        return AffineGrid(
            bits=self.bits, group_size=self.group_size, is_symmetric=self.symmetric, scale_dtype=scale_dtype
        )

    def build(self, quantized: Quantized, bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        packed, fit = pack_bits(quantized.codes, self.bits), quantized.fit
        return BitPackedLinear(
            packed, fit.scale, fit.offset, bias, grid=self.grid(dtype), dtype=dtype, workspace=workspace
        )

    def restore(self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        parts = (tensors["packed"], tensors["scale"], tensors.get("offset"), tensors.get("bias"))
        return BitPackedLinear(*parts, grid=self.grid(dtype), dtype=dtype, workspace=workspace)

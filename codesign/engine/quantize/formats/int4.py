"""int4: 4-bit weights in groups along the input, 16-bit activations.

A quarter of the bytes of 16-bit weights (4 + 32 / group_size bits a weight: a 16-bit scale and a 16-bit offset per
group, which the kernels of the CPU read for symmetric weights too); pays where reading weights is the cost.

On the CPU codes stand in the order of ATen's kernel (`int4_layout.py`), on CUDA two neighbouring inputs a byte
(`bit_packed.py`).
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from codesign.engine.kernels.triton import available
from codesign.engine.quantize import int4_layout
from codesign.engine.quantize.bit_packed import BitPackedLinear, pack_bits
from codesign.engine.quantize.few_rows import choose_cpu
from codesign.engine.quantize.grid import AffineGrid, Fit, Quantized
from codesign.engine.quantize.linear import Linear, Stored, Workspace
from codesign.engine.quantize.packed_linear import PackedFormat, PackedLinear


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4(PackedFormat):
    """Args:
    method: how codes are chosen.
    group_size: inputs that share a scale and an offset: 32, 64, 128 or 256.
    symmetric: no offset, so that 0 is exactly 0; for what only takes symmetric checkpoints.
    """

    method: str = "rtn"
    group_size: int = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.group_size not in int4_layout.GROUP_SIZES or isinstance(self.group_size, bool):
            raise ValueError(f"group_size must be one of {int4_layout.GROUP_SIZES}, got {self.group_size!r}")

    def grid(self, dtype: torch.dtype) -> AffineGrid:
        # 16-bit scales whatever the activations are: the codes are chosen for the scale as stored.
        scale_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
        return AffineGrid(bits=4, group_size=self.group_size, is_symmetric=self.symmetric, scale_dtype=scale_dtype)

    def check_size(self, num_out: int, num_in: int) -> None:
        if num_out % int4_layout.OUT_MULTIPLE:
            raise ValueError(
                f"int4 needs an output size that is a multiple of {int4_layout.OUT_MULTIPLE}, got {num_out}"
            )
        if num_in % self.group_size:
            fitting = [size for size in int4_layout.GROUP_SIZES if num_in % size == 0]
            hint = f"; this layer takes group_size {', '.join(map(str, fitting))}" if fitting else ""
            raise ValueError(
                f"int4 needs an input size that is a multiple of group_size {self.group_size}, got {num_in}{hint}"
            )

    def build(self, quantized: Quantized, bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        if available.is_target(quantized.codes.device):
            return self._bit_packed(
                pack_bits(quantized.codes, 4), quantized.fit.scale, quantized.fit.offset, bias, dtype, workspace
            )
        packed, is_readable = int4_layout.pack(quantized.codes.cpu())
        if not is_readable:
            raise ValueError("int4: this CPU packs weights in an order that is not known here; use int8 or native")
        scale, offset = quantized.fit.scale, quantized.fit.offset
        zero = torch.zeros_like(scale) if offset is None else offset
        return _Int4Linear(
            packed.to(scale.device),
            torch.stack([scale.t(), zero.t()], dim=-1).contiguous(),
            bias,
            group_size=self.group_size,
            dtype=dtype,
            workspace=workspace,
        )

    def restore(self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        if "scale_and_zero" not in tensors:
            parts = (tensors["packed"], tensors["scale"], tensors.get("offset"), tensors.get("bias"))
            return self._bit_packed(*parts, dtype, workspace)
        return _Int4Linear(
            tensors["packed"],
            tensors["scale_and_zero"],
            tensors.get("bias"),
            group_size=self.group_size,
            dtype=dtype,
            workspace=workspace,
        )

    def _bit_packed(
        self,
        packed: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        workspace: Workspace,
    ) -> Linear:
        grid = AffineGrid(bits=4, group_size=self.group_size, is_symmetric=offset is None, scale_dtype=scale.dtype)
        return BitPackedLinear(packed, scale, offset, bias, grid=grid, dtype=dtype, workspace=workspace)


class _Int4Linear(PackedLinear):
    packed: Tensor  # [out, in / 2] uint8, in the order of int4_layout
    scale_and_zero: Tensor  # [in / group_size, out, 2]

    def __init__(
        self,
        packed: Tensor,
        scale_and_zero: Tensor,
        bias: Tensor | None,
        *,
        group_size: int,
        dtype: torch.dtype,
        workspace: Workspace,
    ) -> None:
        super().__init__(
            out_features=packed.shape[0],
            in_features=2 * packed.shape[1],
            bias=bias,
            dtype=dtype,
            device=packed.device,
            workspace=workspace,
            few_rows=choose_cpu("int4", dtype=dtype, out_features=packed.shape[0]),
            has_compiled_unpack=packed.shape[0] % int4_layout.block_rows() == 0,
            unpack_step=int4_layout.block_rows(),
            is_transposed=True,
        )
        self.register_buffer("packed", packed)
        self.register_buffer("scale_and_zero", scale_and_zero)
        self._group_size = group_size

    def multiply_packed(self, x: Tensor) -> Tensor:
        if self.few_rows.compiled is not None:
            return self.few_rows.compiled.int4(x, self.packed, self.scale_and_zero, self._group_size)
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu.default(
            x.contiguous(), self.packed, self._group_size, self.scale_and_zero
        )
        return y

    def unpack(self, start: int, stop: int, out: Tensor) -> None:
        if self.compiled_unpack is not None:
            self.compiled_unpack.int4(self.packed, self.scale_and_zero, start, stop, out)
        else:
            self._unpack_plainly(start, stop, out)

    def _unpack_plainly(self, start: int, stop: int, out: Tensor) -> None:
        int4_layout.unpack(self.packed, start, stop, out)
        scale, zero = self.scale_and_zero[:, None, start:stop].to(out.dtype).unbind(-1)
        groups = out.view(-1, self._group_size, stop - start)
        torch.addcmul(zero, groups, scale, out=groups)

    def stored(self) -> Stored:
        codes = torch.empty(self.in_features, self.out_features, dtype=torch.int8, device=self.packed.device)
        int4_layout.unpack(self.packed, 0, self.out_features, codes)
        scale, offset = (part.t().contiguous() for part in self.scale_and_zero.unbind(-1))
        is_symmetric = not bool(offset.any())
        grid = AffineGrid(
            bits=4, group_size=self._group_size, is_symmetric=is_symmetric, scale_dtype=self.scale_and_zero.dtype
        )
        fit = Fit(scale, None if is_symmetric else offset)
        return Stored(Quantized((codes.t() + 8).to(torch.uint8).contiguous(), fit), grid)

    def dequantize(self) -> Tensor:
        wide = torch.empty(self.in_features, self.out_features, device=self.packed.device)
        self._unpack_plainly(0, self.out_features, wide)
        return wide.t()

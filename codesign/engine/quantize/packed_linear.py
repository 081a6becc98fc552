"""PackedLinear: what formats share whose weights are multiplied as they are for few rows of x, and unpacked for many.

M <= kernel_max_rows    a kernel that reads the packed weight       (which one, and up to where: few_rows.py)
M >  kernel_max_rows    slices of the weight, unpacked into the workspace, times x     (widened.py)
"""

import dataclasses
from abc import abstractmethod

import torch
from torch import Tensor

from codesign.engine.kernels import unpack as unpacking
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.unpack import Unpack
from codesign.engine.quantize.few_rows import NO_KERNEL, FewRows
from codesign.engine.quantize.format import GridFormat
from codesign.engine.quantize.linear import Linear, Workspace
from codesign.engine.quantize.widened import Unpack as UnpackSlice
from codesign.engine.quantize.widened import compute_dtype, multiply_unpacked


class PackedLinear(Linear):
    """Args:
    bias: [out_features], or None.
    dtype: of the activations.
    few_rows: the kernel for few rows.
    has_compiled_unpack: whether the compiled unpacking (kernels/unpack.c) knows the layout.
    unpack_step: slices start at multiples of this.
    is_transposed: whether `unpack` writes [in, rows].

    A subclass registers its buffers and gives `multiply_packed` and `unpack`.
    """

    bias: Tensor | None

    def __init__(
        self,
        *,
        out_features: int,
        in_features: int,
        bias: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        workspace: Workspace,
        few_rows: FewRows = NO_KERNEL,
        has_compiled_unpack: bool = False,
        unpack_step: int = 1,
        is_transposed: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.register_buffer("bias", None if bias is None else bias.to(dtype))
        self.compute_dtype = compute_dtype(dtype, device)
        self.few_rows, self.kernel_max_rows = few_rows, few_rows.max_rows
        self.compiled_unpack: Unpack | None = None
        dense = f"unpack + aten::mm {str(self.compute_dtype).removeprefix('torch.')}"
        if has_compiled_unpack and device.type == "cpu" and unpacking.takes(in_features, self.compute_dtype):
            found = unpacking.load()
            if isinstance(found, Missing):
                dense += f"; ours: {found.reason}"
            else:
                self.compiled_unpack, dense = found, f"codesign::{dense}"
        self.kernel = few_rows.describe(dense)
        self._workspace, self._unpack_step, self._is_transposed = workspace, unpack_step, is_transposed

    def forward(self, x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        if num_rows == 0:
            return x.new_empty(0, self.out_features)
        y = self.multiply_packed(x) if num_rows <= self.kernel_max_rows else self._multiply_unpacked(x)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        if num_rows == 0 or x.device.type != "cpu":
            return self(x)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped
        is_few = num_rows <= self.kernel_max_rows
        y = self.multiply_packed(x) if is_few else self._multiply_widened(x)
        return y if self.bias is None else y.add_(self.bias)

    def multiply_packed(self, x: Tensor) -> Tensor:
        """[M, out] of any float dtype, before the bias: by the kernel that `few_rows` names."""
        raise NotImplementedError  # never called where kernel_max_rows is 0

    @abstractmethod
    def unpack(self, start: int, stop: int, out: Tensor) -> None:
        """Writes rows start..stop of the weight into `out`, [stop - start, in] or transposed, of any float dtype."""

    def _multiply_unpacked(self, x: Tensor) -> Tensor:
        return self._multiply(x.to(self.compute_dtype), self.unpack)

    def _multiply_widened(self, x: Tensor) -> Tensor:
        """The same in fp32, with the same weights: those of `compute_dtype`."""

        def unpack(start: int, stop: int, out: Tensor) -> None:
            narrow = torch.empty_like(out, dtype=self.compute_dtype)
            self.unpack(start, stop, narrow)
            out.copy_(narrow)

        return self._multiply(x.float(), unpack)

    def _multiply(self, x: Tensor, unpack: UnpackSlice) -> Tensor:
        return multiply_unpacked(
            x,
            unpack,
            out_features=self.out_features,
            step=self._unpack_step,
            is_transposed=self._is_transposed,
            workspace=self._workspace,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedFormat(GridFormat):
    """A format of PackedLinear.

    Args:
        shadow: keep a dense copy of every weight beside the packed one, for products of many rows (`shadow.py`).
    """

    shadow: bool = False

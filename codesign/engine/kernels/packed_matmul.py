"""Few rows of x times packed int4 or int8 weights through the compiled C kernel beside this file."""

import ctypes
import dataclasses
import functools

import torch
from torch import Tensor

from codesign.engine.kernels import compiled
from codesign.engine.kernels.compiled import Missing

BLOCK_ROWS = 32  # outputs of int4 weights come in ATen's AVX2 blocks


@dataclasses.dataclass(frozen=True)
class PackedMatmul:
    """The loaded functions. Every tensor is on the CPU and contiguous; results and sums are fp32."""

    library: ctypes.CDLL

    def int4(self, x: Tensor, packed: Tensor, scale_and_zero: Tensor, group_size: int) -> Tensor:
        """[M, out] from x [M, in] of any float dtype, M >= 1.

        Args:
            packed: [out, in / 2] uint8 in ATen's AVX2 order, `out` a multiple of 32.
            scale_and_zero: [in / group_size, out, 2] bf16 or fp16.
        """
        x = x.float().contiguous()
        num_rows, num_in = x.shape
        y = x.new_empty(num_rows, packed.shape[0])
        group_sums = x.new_empty(num_rows, num_in // group_size)
        self.library.int4_matmul(
            _pointer(x),
            num_rows,
            _pointer(packed),
            _pointer(scale_and_zero),
            int(scale_and_zero.dtype == torch.float16),
            _pointer(group_sums),
            _pointer(y),
            num_in,
            packed.shape[0],
            group_size,
        )
        return y

    def int8(self, x: Tensor, codes: Tensor) -> Tensor:
        """[M, out], not yet scaled, from x [M, in] of any float dtype, M >= 1, and codes [out, in], in % 8 == 0."""
        x = x.float().contiguous()
        y = x.new_empty(x.shape[0], codes.shape[0])
        self.library.int8_matmul(_pointer(x), x.shape[0], _pointer(codes), _pointer(y), *reversed(codes.shape))
        return y


@functools.cache
def load() -> PackedMatmul | Missing:
    """The kernel, tried out against a plain product, or why there is none."""
    library = compiled.load("packed_matmul")
    if isinstance(library, Missing):
        return library
    found = PackedMatmul(library)
    x, codes = torch.arange(64.0).view(2, 32) / 64, torch.arange(64 * 32).view(64, 32) % 251 - 125
    expected = x.double() @ codes.double().t()
    if not torch.allclose(found.int8(x, codes.to(torch.int8)).double(), expected, rtol=1e-5, atol=1e-3):
        return Missing("the compiled kernel gives wrong products on this machine")
    return found


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())

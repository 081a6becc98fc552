"""Few rows of x times packed int4 or int8 weights through the compiled C kernels beside this file."""

import ctypes
import dataclasses
import functools

import torch
from torch import Tensor

from codesign.engine.kernels import compiled
from codesign.engine.kernels.compiled import Missing, pointer


@dataclasses.dataclass(frozen=True)
class PackedMatmul:
    """The loaded functions. Every tensor is on the CPU and contiguous; results and sums are fp32.

    Attributes:
        library: for x of any float dtype, widened to fp32.
        bf16_library: for x in bf16 on a CPU with instructions for its products, or None.
    """

    library: ctypes.CDLL
    bf16_library: ctypes.CDLL | None = None

    def int4(self, x: Tensor, packed: Tensor, scale_and_zero: Tensor, group_size: int) -> Tensor:
        """[M, out] from x [M, in] of any float dtype, M >= 1.

        Args:
            packed: [out, in / 2] uint8 in ATen's order (int4_layout.py), `out` a multiple of its block.
            scale_and_zero: [in / group_size, out, 2] bf16 or fp16.
        """
        num_rows, num_in = x.shape
        y = x.new_empty(num_rows, packed.shape[0], dtype=torch.float32)
        group_sums = x.new_empty(num_rows, num_in // group_size, dtype=torch.float32)
        out = (pointer(group_sums), pointer(y), num_in, packed.shape[0], group_size)
        if self.bf16_library is not None and x.dtype == scale_and_zero.dtype == torch.bfloat16:
            x = x.contiguous()
            self.bf16_library.int4_matmul(pointer(x), num_rows, pointer(packed), pointer(scale_and_zero), *out)
            return y
        x = x.float().contiguous()
        is_half = int(scale_and_zero.dtype == torch.float16)
        self.library.int4_matmul(pointer(x), num_rows, pointer(packed), pointer(scale_and_zero), is_half, *out)
        return y

    def int8(self, x: Tensor, codes: Tensor) -> Tensor:
        """[M, out], not yet scaled, from x [M, in] of any float dtype, M >= 1, and codes [out, in], in % 16 == 0."""
        y = x.new_empty(x.shape[0], codes.shape[0], dtype=torch.float32)
        library = self.library
        if self.bf16_library is not None and x.dtype == torch.bfloat16:
            library, x = self.bf16_library, x.contiguous()
        else:
            x = x.float().contiguous()
        library.int8_matmul(pointer(x), x.shape[0], pointer(codes), pointer(y), *reversed(codes.shape))
        return y


@functools.cache
def load() -> PackedMatmul | Missing:
    """The kernels, tried out against a plain product, or why there are none."""
    library = compiled.load("packed_matmul")
    if isinstance(library, Missing):
        return library
    found = PackedMatmul(library)
    if torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        bf16_library = compiled.load("bf16_matmul")
        if isinstance(bf16_library, Missing):
            return bf16_library
        found = PackedMatmul(library, bf16_library)
    x, codes = torch.arange(64.0).view(2, 32) / 64, torch.arange(64 * 32).view(64, 32) % 251 - 125
    expected = x.double() @ codes.double().t()
    for own in (x, x.bfloat16()):  # exact in bf16 too
        if not torch.allclose(found.int8(own, codes.to(torch.int8)).double(), expected, rtol=1e-5, atol=1e-3):
            return Missing("the compiled kernel gives wrong products on this machine")
    return found

"""bf16 activations times bf16 weights through the compiled C kernel beside this file."""

import ctypes
import dataclasses
import functools

import torch
from torch import Tensor

from codesign.engine.kernels import compiled
from codesign.engine.kernels.compiled import Missing, pointer

OUTPUTS = 32  # of a block of weights


@dataclasses.dataclass(frozen=True)
class DenseMatmul:
    """The loaded functions. Every tensor is on the CPU and contiguous, but for x.

    A row of a product depends on that row of x alone, to the last bit, and not on how many rows or threads there are.
    """

    library: ctypes.CDLL

    def pack(self, weight: Tensor) -> Tensor:
        """weight [out, in] bf16 -> [out / 32, pairs, 32] int32, two inputs of an output in each; zeros fill up blocks
        of outputs, and pairs to a multiple of 8."""
        num_out, num_in = weight.shape
        pairs = self.library.dense_pairs(num_in)
        blocks = torch.empty(-(-num_out // OUTPUTS), pairs, OUTPUTS, dtype=torch.int32)
        weight = weight.contiguous()
        self.library.dense_pack(pointer(weight), pointer(blocks), num_in, num_out)
        return blocks

    def unpack(self, blocks: Tensor, *, num_out: int, num_in: int) -> Tensor:
        """The inverse: [out, in] bf16."""
        weight = torch.empty(num_out, num_in, dtype=torch.bfloat16)
        self.library.dense_unpack(pointer(blocks), pointer(weight), num_in, num_out)
        return weight

    def multiply(
        self, x: Tensor, blocks: Tensor, bias: Tensor | None, *, num_out: int, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """[M, out] of `dtype`, bf16 or fp32, from x [M, in] bf16, `pack(weight)` and bias [blocks * 32] fp32."""
        x = x.contiguous()
        num_rows, num_in = x.shape
        y = torch.empty(num_rows, num_out, dtype=dtype)
        scratch = torch.empty(num_rows, blocks.shape[1], dtype=torch.int32)
        where = (pointer(y), None) if dtype == torch.bfloat16 else (None, pointer(y))
        own_bias = None if bias is None else pointer(bias)
        self.library.dense_matmul(
            pointer(x), pointer(blocks), own_bias, *where, pointer(scratch), num_rows, num_in, num_out
        )
        return y


@functools.cache
def load() -> DenseMatmul | Missing:
    """The kernel, or why there is none."""
    is_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (is_avx512 and torch.cpu._is_avx512_bf16_supported()):
        return Missing("no AVX-512 BF16 instructions")
    library = compiled.load("dense_matmul")
    return library if isinstance(library, Missing) else DenseMatmul(library)

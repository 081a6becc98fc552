"""bf16 activations times bf16 weights, or int8 ones, through the compiled C kernel beside this file."""

import ctypes
import dataclasses
import functools

import torch
from torch import Tensor

from codesign.engine.huge_pages import huge_zeros
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
        blocks = huge_zeros((-(-num_out // OUTPUTS), pairs, OUTPUTS), dtype=torch.int32)
        weight = weight.contiguous()
        self.library.dense_pack(pointer(weight), pointer(blocks), num_in, num_out)
        return blocks

    def unpack(self, blocks: Tensor, *, num_out: int, num_in: int) -> Tensor:
        """The inverse: [out, in] bf16."""
        weight = torch.empty(num_out, num_in, dtype=torch.bfloat16)
        self.library.dense_unpack(pointer(blocks), pointer(weight), num_in, num_out)
        return weight

    def multiply(self, x: Tensor, blocks: Tensor, bias: Tensor | None, *, num_out: int, dtype: torch.dtype) -> Tensor:
        """[M, out] of `dtype`, bf16 or fp32, from x [M, in] bf16, `pack(weight)` and bias [out] fp32.

        In bf16 it is rounded from the sum of two halves of the inputs, each of which is what fp32 would give for it.
        """
        x, num_rows = x.contiguous(), x.shape[0]
        y, scratch = _results(num_rows, num_out, dtype, pairs=blocks.shape[1])
        where = (y.data_ptr(), None) if dtype == torch.bfloat16 else (None, y.data_ptr())
        own_bias = None if bias is None else bias.data_ptr()
        weights = blocks.data_ptr(), own_bias
        self.library.dense_matmul(x.data_ptr(), *weights, *where, scratch.data_ptr(), num_rows, x.shape[1], num_out)
        return y

    def multiply_int8(self, x: Tensor, codes: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
        """[M, out] of `dtype`, bf16 or fp32, from x [M, in] bf16, codes [out, in] and scale [out] fp32; in a multiple
        of 16. A code is exact in bf16: sums are scaled, not weights."""
        x, (num_rows, num_in), num_out = x.contiguous(), x.shape, codes.shape[0]
        y, scratch = _results(num_rows, num_out, dtype, pairs=self.library.dense_pairs(num_in))
        where = (y.data_ptr(), None) if dtype == torch.bfloat16 else (None, y.data_ptr())
        weights = codes.data_ptr(), scale.data_ptr()
        if self.library.dense_int8(x.data_ptr(), *weights, *where, scratch.data_ptr(), num_rows, num_in, num_out):
            raise MemoryError(f"no memory to widen {num_in} inputs")
        return y


def _results(num_rows: int, num_out: int, dtype: torch.dtype, *, pairs: int) -> tuple[Tensor, Tensor]:
    """What a product fills: its results, and x as the kernel wants it."""
    return torch.empty(num_rows, num_out, dtype=dtype), torch.empty(num_rows, pairs, dtype=torch.int32)


@functools.cache
def load() -> DenseMatmul | Missing:
    """The kernel, or why there is none. AMX has many times its arithmetic and is left to oneDNN."""
    if torch.cpu._is_amx_tile_supported():
        return Missing("AMX is faster")
    is_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (is_avx512 and torch.cpu._is_avx512_bf16_supported()):
        return Missing("no AVX-512 BF16 instructions")
    library = compiled.load("dense_matmul")
    if isinstance(library, Missing):
        return library
    for name in ("dense_matmul", "dense_int8"):
        getattr(library, name).argtypes = (*[ctypes.c_void_p] * 6, *[ctypes.c_int] * 3)  # so that plain numbers will do
    return DenseMatmul(library)

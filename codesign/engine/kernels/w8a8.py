"""8-bit activations times 8-bit weights through the compiled C kernel beside this file."""

import ctypes
import dataclasses
import functools

import torch
from torch import Tensor

from codesign.engine.kernels import compiled
from codesign.engine.kernels.compiled import Missing, longs, pointer

BLOCK = 16  # outputs whose codes lie together, four inputs after four
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # as in w8a8.c
_SAME_PLACE = 4096  # bytes: rows of x so far apart would share their place in the L1 cache
_LINE = 64


@dataclasses.dataclass(frozen=True)
class W8A8Kernel:
    """The loaded functions. Every tensor is on the CPU and contiguous, but for codes of x, whose rows may be padded."""

    library: ctypes.CDLL

    @property
    def has_products(self) -> bool:
        """Whether `sums` is there: this CPU has instructions for products of bytes (AVX-512 VNNI)."""
        return hasattr(self.library, "block_sums")

    def quantize(self, x: Tensor, *, is_padded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """x [M, in], bf16 or fp32, not NaN -> codes [M, in] int8, scale [M, 1] fp32, sum of each row's codes [M] int32.

        Args:
            is_padded: rows of codes may lie further apart, for `sums`.
        """
        x = x.contiguous()
        num_rows, num_in = x.shape
        stride = num_in + _LINE if is_padded and num_in % _SAME_PLACE == 0 else num_in
        codes = torch.empty(num_rows, stride, dtype=torch.int8)
        scale, sums = torch.empty(num_rows, 1), torch.empty(num_rows, dtype=torch.int32)
        where = (pointer(codes), *longs([stride]), pointer(scale), pointer(sums))
        self.library.quantize_rows(pointer(x), _DTYPES[x.dtype], *where, *longs(x.shape))
        return codes[:, :num_in], scale, sums

    def sums(self, codes: Tensor, code_sums: Tensor, blocks: Tensor) -> Tensor:
        """[M, out] int32: exact products of codes [M, in] int8, whose rows sum to code_sums [M], and `to_blocks(W)`."""
        num_rows, num_in = codes.shape
        num_out = blocks.shape[0] * BLOCK
        sums = torch.empty(num_rows, num_out, dtype=torch.int32)
        x = (pointer(codes), *longs([codes.stride(0)]), pointer(code_sums))
        self.library.block_sums(*x, pointer(blocks), pointer(sums), *longs([num_rows, num_in, num_out]))
        return sums

    def scaled(
        self, sums: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """[M, out] of `dtype`: sums [M, out] int32 times scale [M, 1] and weight_scale [out], plus bias [out] fp32."""
        y = torch.empty(sums.shape, dtype=dtype)
        parts = (pointer(sums), pointer(scale), pointer(weight_scale), None if bias is None else pointer(bias))
        self.library.scale_sums(*parts, pointer(y), _DTYPES[dtype], *longs(sums.shape))
        return y


def to_blocks(codes: Tensor) -> Tensor:
    """codes [out, in] int8 -> [out / 16, in / 4, 16, 4] uint8 of code + 128; `out` a multiple of 16, `in` of 4."""
    num_out, num_in = codes.shape
    shifted = codes.view(torch.uint8) ^ 128
    return shifted.view(num_out // BLOCK, BLOCK, num_in // 4, 4).permute(0, 2, 1, 3).contiguous()


def from_blocks(blocks: Tensor) -> Tensor:
    """The inverse: [out, in] int8."""
    return (blocks.permute(0, 2, 1, 3).flatten(2, 3).flatten(0, 1) ^ 128).view(torch.int8)


def takes(dtype: torch.dtype) -> bool:
    """Whether activations of this dtype can be rounded here."""
    return dtype in _DTYPES


@functools.cache
def load() -> W8A8Kernel | Missing:
    """The kernel, or why there is none."""
    library = compiled.load("w8a8")
    return library if isinstance(library, Missing) else W8A8Kernel(library)

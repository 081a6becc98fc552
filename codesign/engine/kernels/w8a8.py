"""8-bit activations times 8-bit weights through the compiled C kernel beside this file."""

import ctypes
import dataclasses
import functools

import torch
from torch import Tensor

from codesign.engine.kernels import compiled
from codesign.engine.kernels.compiled import Missing, longs, pointer

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # as in w8a8.c


@dataclasses.dataclass(frozen=True)
class W8A8Kernel:
    """The loaded functions. Every tensor is on the CPU and contiguous."""

    library: ctypes.CDLL

    def max_rows(self, num_in: int) -> int:
        """Largest M for `sums`; 0 where this CPU has no instructions for it.

        AMD Zen 4, one core, ms against `_int_mm`: [9728, 896] 0.44 / 0.76 at M = 1, 1.15 / 1.75 at 16, 2.27 / 2.41 at
        32; [896, 4864] 0.19 / 0.22, 0.57 / 0.58 at 8, 0.91 / 0.79 at 16. Eight rows of x should fit the L1 cache.
        """
        if not hasattr(self.library, "few_row_sums"):
            return 0
        return 16 if 8 * num_in <= 32 * 2**10 else 8

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, in], bf16 or fp32, not NaN -> codes [M, in] int8, scale [M, 1] fp32."""
        x = x.contiguous()
        codes, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0], 1)
        self.library.quantize_rows(pointer(x), _DTYPES[x.dtype], pointer(codes), pointer(scale), *longs(x.shape))
        return codes, scale

    def sums(self, codes: Tensor, weight_codes: Tensor) -> Tensor:
        """[M, out] int32 from codes [M, in] and [out, in] int8, M <= max_rows(in)."""
        num_rows, num_in = codes.shape
        sums = torch.empty(num_rows, weight_codes.shape[0], dtype=torch.int32)
        sizes = longs((num_rows, num_in, weight_codes.shape[0]))
        self.library.few_row_sums(pointer(codes), pointer(weight_codes), pointer(sums), *sizes)
        return sums

    def scaled(
        self, sums: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """[M, out] of `dtype`: sums [M, out] int32 times scale [M, 1] and weight_scale [out], plus bias [out] fp32."""
        y = torch.empty(sums.shape, dtype=dtype)
        parts = (pointer(sums), pointer(scale), pointer(weight_scale), None if bias is None else pointer(bias))
        self.library.scale_sums(*parts, pointer(y), _DTYPES[dtype], *longs(sums.shape))
        return y


def takes(dtype: torch.dtype) -> bool:
    """Whether activations of this dtype can be rounded here."""
    return dtype in _DTYPES


@functools.cache
def load() -> W8A8Kernel | Missing:
    """The kernel, or why there is none."""
    library = compiled.load("w8a8")
    return library if isinstance(library, Missing) else W8A8Kernel(library)

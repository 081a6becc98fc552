"""Slices of packed weights as dense ones, through the compiled C kernel beside this file."""

import ctypes
import dataclasses
import functools

import torch
from torch import Tensor

from codesign.engine.kernels import compiled
from codesign.engine.kernels.compiled import Missing, longs, pointer

_MAX_IN = 32768  # as in unpack.c


@dataclasses.dataclass(frozen=True)
class Unpack:
    """The loaded functions. Every tensor is on the CPU and contiguous; `out` is bf16 or fp32."""

    library: ctypes.CDLL

    def int8(self, codes: Tensor, scale: Tensor, out: Tensor) -> None:
        """codes [n, in] int8 times scale [n] into out [n, in]."""
        scale = scale.float()
        self._call("unpack_int8", codes, scale, out, _is_bf16(out), *longs(codes.shape))

    def int4(self, packed: Tensor, scale_and_zero: Tensor, start: int, stop: int, out: Tensor) -> None:
        """Outputs start..stop, whole blocks, into out [in, stop - start].

        Args:
            packed: [out_features, in / 2] uint8 in ATen's order (int4_layout.py).
            scale_and_zero: [groups, out_features, 2] bf16 or fp16.
        """
        num_groups, num_out, _ = scale_and_zero.shape
        num_in = out.shape[0]
        self._call(
            "unpack_int4",
            packed[start:stop],
            scale_and_zero[:, start:],
            int(scale_and_zero.dtype == torch.float16),
            out,
            _is_bf16(out),
            64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32,
            *longs((stop - start, num_in, num_out, num_in // num_groups)),
        )

    def bits(self, packed: Tensor, bits: int, scale: Tensor, middle: Tensor, out: Tensor) -> None:
        """Codes of 2, 3, 4 or 8 bits: code scale + middle into out [n, in].

        Args:
            packed: [n, in * bits / 8] as bit_packed.py lays them out.
            scale, middle: [n, groups] fp32.
        """
        num_rows, num_in = out.shape
        sizes = longs((num_rows, num_in, num_in // scale.shape[1]))
        self._call("unpack_bits", packed, bits, scale, middle, out, _is_bf16(out), *sizes)

    def levels(self, packed: Tensor, levels: Tensor, scale: Tensor, out: Tensor) -> None:
        """levels[code] scale into out [n, in]; packed [n, in / 2], levels [16] fp32, scale [n, in / 64] fp32."""
        self._call("unpack_levels", packed, levels, scale, out, _is_bf16(out), *longs(out.shape))

    def _call(self, name: str, *arguments: Tensor | int | ctypes.c_long) -> None:
        getattr(self.library, name)(*(pointer(a) if isinstance(a, Tensor) else a for a in arguments))


def takes(num_in: int, dtype: torch.dtype) -> bool:
    """Whether rows of so many inputs can be unpacked into `dtype`."""
    return num_in <= _MAX_IN and dtype in (torch.bfloat16, torch.float32)


@functools.cache
def load() -> Unpack | Missing:
    """The kernel, or why there is none."""
    library = compiled.load("unpack")
    return library if isinstance(library, Missing) else Unpack(library)


def _is_bf16(out: Tensor) -> int:
    return int(out.dtype == torch.bfloat16)

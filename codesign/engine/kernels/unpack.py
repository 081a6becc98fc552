"""Slices of packed weights as dense ones, through the compiled C kernel beside this file."""

import ctypes
import dataclasses
import functools

import torch
from torch import Tensor

from codesign.engine.kernels import compiled
from codesign.engine.kernels.compiled import Missing, pointer

_MAX_GROUP = 8192  # as in unpack.c


@dataclasses.dataclass(frozen=True)
class Unpack:
    """The loaded functions. Every tensor is on the CPU and contiguous; `out` is bf16 or fp32."""

    library: ctypes.CDLL

    def int8(self, codes: Tensor, scale: Tensor, out: Tensor) -> None:
        """codes [n, in] int8 times scale [n] into out [n, in]."""
        scale = scale.float()
        self._call("unpack_int8", codes, scale, out, _is_bf16(out), *_longs(codes.shape))

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
            *_longs((stop - start, num_in, num_out, num_in // num_groups)),
        )

    def bits(self, packed: Tensor, bits: int, scale: Tensor, middle: Tensor, out: Tensor) -> None:
        """Codes of 2, 3, 4 or 8 bits: code scale + middle into out [n, in].

        Args:
            packed: [n, in * bits / 8] as bit_packed.py lays them out.
            scale, middle: [n, groups] fp32.
        """
        self._groups("unpack_bits", packed, bits, scale, middle, out=out)

    def levels(self, packed: Tensor, levels: Tensor, scale: Tensor, out: Tensor) -> None:
        """levels[code] scale into out [n, in]; packed [n, in / 2], levels [16] fp32, scale [n, groups] fp32."""
        self._groups("unpack_levels", packed, levels, scale, out=out)

    def _groups(self, name: str, *inputs: Tensor | int, out: Tensor) -> None:
        scale = inputs[2]
        assert isinstance(scale, Tensor)
        num_in = out.shape[1]
        self._call(name, *inputs, out, _is_bf16(out), *_longs((*out.shape, num_in // scale.shape[1])))

    def _call(self, name: str, *arguments: Tensor | int | ctypes.c_long) -> None:
        getattr(self.library, name)(*(pointer(a) if isinstance(a, Tensor) else a for a in arguments))


def takes(group_size: int, dtype: torch.dtype) -> bool:
    """Whether groups of this many inputs can be unpacked into `dtype`."""
    return group_size <= _MAX_GROUP and dtype in (torch.bfloat16, torch.float32)


@functools.cache
def load() -> Unpack | Missing:
    """The kernel, or why there is none."""
    library = compiled.load("unpack")
    return library if isinstance(library, Missing) else Unpack(library)


def _is_bf16(out: Tensor) -> int:
    return int(out.dtype == torch.bfloat16)


def _longs(sizes: tuple[int, ...] | torch.Size) -> tuple[ctypes.c_long, ...]:
    return tuple(map(ctypes.c_long, sizes))

"""The small operations of a layer in one pass each, through the compiled C kernels beside this file.

Bit for bit what `plain.py` gives with torch 2.13 on AVX2 and AVX-512 for the sizes that models have (fused.c says which
those are).
"""

import ctypes
import functools

import torch
from torch import Tensor

from codesign.engine.kernels import compiled
from codesign.engine.kernels.compiled import Missing

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # as in fused.c
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
# Told once, so that a call takes plain numbers: making ctypes objects of them costs as much as a small kernel.
_ARGUMENTS = {
    "norm": (*[_POINTER] * 5, _INT, _LONG, _LONG, _FLOAT, _FLOAT),
    "norm_heads": (_POINTER, _LONG, _POINTER, _LONG, *[_POINTER] * 3, _INT, *[_LONG] * 4, _FLOAT, _FLOAT),
    "silu_mul": (_POINTER, _POINTER, _INT, _LONG, _LONG),
    "rotate": (_POINTER, _LONG, _POINTER, _LONG, *[_POINTER] * 3, _INT, *[_LONG] * 4),
    "rotate_into": (*[_POINTER, _LONG] * 3, *[_POINTER] * 6, _INT, *[_LONG] * 4),
}


class Fused:
    """Every tensor is on the CPU and of one dtype, bf16 or fp32, but for cosines and sines, which are fp32."""

    kernel = "codesign::fused"

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._norm, self._norm_heads = library.norm, library.norm_heads
        self._silu_mul, self._rotate, self._rotate_into = library.silu_mul, library.rotate, library.rotate_into
        self._dtype = _DTYPES[dtype]

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, size = x.contiguous(), x.shape[-1]
        y = torch.empty_like(x)
        ends = (weight.data_ptr(), None, y.data_ptr())
        self._norm(x.data_ptr(), None, *ends, self._dtype, x.numel() // size, size, 1.0 / size, eps)
        return y

    def add_norm(self, x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, change = x.contiguous(), change.contiguous()
        total, y = torch.empty_like(x), torch.empty_like(x)
        rows, size = x.shape
        ends = (weight.data_ptr(), total.data_ptr(), y.data_ptr())
        self._norm(x.data_ptr(), change.data_ptr(), *ends, self._dtype, rows, size, 1.0 / size, eps)
        return total, y

    def norm_heads(self, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        q, k = _whole_heads(q), _whole_heads(k)
        tokens, num_q, size = q.shape
        num_k = k.shape[1]
        y = q.new_empty(tokens, num_q + num_k, size)
        heads = (q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0))
        weights = (q_weight.data_ptr(), k_weight.data_ptr())
        self._norm_heads(*heads, *weights, y.data_ptr(), self._dtype, tokens, num_q, num_k, size, 1.0 / size, eps)
        return _split(y, num_q, num_k)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        y = gate_up.new_empty(rows, size)
        self._silu_mul(gate_up.data_ptr(), y.data_ptr(), self._dtype, rows, size)
        return y

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, signed_sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k, cos, signed_sin = _whole_heads(q), _whole_heads(k), cos.contiguous(), signed_sin.contiguous()
        tokens, num_q, size = q.shape
        num_k = k.shape[1]
        y = q.new_empty(tokens, num_q + num_k, size)
        heads = (q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0))
        tables = (cos.data_ptr(), signed_sin.data_ptr())
        self._rotate(*heads, *tables, y.data_ptr(), self._dtype, tokens, num_q, num_k, size)
        return _split(y, num_q, num_k)

    def rotate_into(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        signed_sin: Tensor,
        *,
        key: Tensor,
        value: Tensor,
        rows: Tensor,
    ) -> Tensor:
        q, k, v, cos, signed_sin = *map(_whole_heads, (q, k, v)), cos.contiguous(), signed_sin.contiguous()
        tokens, num_q, size = q.shape
        y = q.new_empty(tokens, num_q, size)
        heads = (q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0))
        tables = (cos.data_ptr(), signed_sin.data_ptr())
        cache = (key.data_ptr(), value.data_ptr(), rows.data_ptr())
        self._rotate_into(*heads, *tables, y.data_ptr(), *cache, self._dtype, tokens, num_q, k.shape[1], size)
        return y

    def rotate_rows(self, k: Tensor, cos: Tensor, signed_sin: Tensor, *, key: Tensor, rows: Tensor) -> None:
        k, cos, signed_sin = _whole_heads(k), cos.contiguous(), signed_sin.contiguous()
        tokens, num_k, size = k.shape
        heads, tables = (None, 0, k.data_ptr(), k.stride(0), None, 0), (cos.data_ptr(), signed_sin.data_ptr())
        cache = (key.data_ptr(), None, rows.data_ptr())
        self._rotate_into(*heads, *tables, None, *cache, self._dtype, tokens, 0, num_k, size)


@functools.cache
def load(dtype: torch.dtype) -> Fused | Missing:
    """The kernels for activations of `dtype`, or why there are none."""
    if dtype not in _DTYPES:
        return Missing(f"written for bf16 and fp32, activations are {str(dtype).removeprefix('torch.')}")
    library = compiled.load("fused")
    return library if isinstance(library, Missing) else Fused(library, dtype)


def _whole_heads(x: Tensor) -> Tensor:
    """[N, H, D] with the values of a token's heads one after the other; tokens may lie apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _split(heads: Tensor, num_q: int, num_k: int) -> tuple[Tensor, Tensor]:
    q, k = heads.split_with_sizes((num_q, num_k), 1)  # in one microsecond, where two slices or `split` take three
    return q, k

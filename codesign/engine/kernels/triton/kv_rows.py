"""Blocks of KV rows as products take them: loaded as they are stored, codes turned into numbers in registers.

    native   the row itself
    int8     row = code * scale
    fp8      row = 256 * x * scale, x the fp16 of the same bits moved into place: e4m3 as uint8, no fp8 arithmetic

The scale of a row stays outside, where it multiplies its scores and weights instead of its values. Whole numbers up to
127 and three bits of mantissa are exact in bf16, fp16 and fp32.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(
    ptr, stride, rows, seen, dtype: tl.constexpr, CODEC: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[BLOCK_R, BLOCK_D] in `dtype` without their scales; zeros where not `seen` and beyond HEAD_DIM."""
    d = tl.arange(0, BLOCK_D)
    mask = seen[:, None]
    if BLOCK_D != HEAD_DIM:
        mask = mask & (d < HEAD_DIM)[None, :]
    stored = tl.load(ptr + rows[:, None] * stride + d[None, :], mask=mask, other=0)
    if CODEC == "fp8":
        bits = ((stored & 127).to(tl.uint16) << 7) | ((stored & 128).to(tl.uint16) << 8)
        return bits.to(tl.float16, bitcast=True).to(dtype)
    return stored.to(dtype)


@triton.jit
def load_scales(ptr, stride, rows, seen, CODEC: tl.constexpr):
    """[BLOCK_R] fp32: what codes are worth; zeros where not `seen`."""
    scale = tl.load(ptr + rows * stride, mask=seen, other=0.0).to(tl.float32)
    return scale * 256.0 if CODEC == "fp8" else scale

"""Blocks of KV rows as products take them: loaded as they are stored, codes turned into numbers in registers.

    native   the row itself
    int8     row = code * scale
    fp8      row = 256 * x * scale, x the fp16 of the same bits moved into place: e4m3 as uint8, no fp8 arithmetic

The scale of a row stays outside, where it multiplies its scores and weights instead of its values. Codes are loaded two
channels a word and become two blocks, of even and of odd channels: words of 16 bits are what tensor cores are fed with,
single bytes would be gathered one by one. Both kinds of code are exact in fp16, which takes two or three instructions
for two of them; in PTX, because the compiler does not see that one instruction can do two.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, stride, rows, seen, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_R, BLOCK_D]; zeros where not `seen` and beyond HEAD_DIM."""
    d = tl.arange(0, BLOCK_D)
    mask = seen[:, None]
    if BLOCK_D != HEAD_DIM:
        mask = mask & (d < HEAD_DIM)[None, :]
    return tl.load(ptr + rows[:, None] * stride + d[None, :], mask=mask, other=0)


@triton.jit
def channel_pairs(
    ptr,
    stride,
    rows,
    seen,
    CODEC: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_ASM: tl.constexpr,
):
    """Even and odd channels of rows of codes, [BLOCK_R, BLOCK_D / 2] fp16 each, without their scales.

    Zeros where not `seen` and beyond HEAD_DIM. Strides and HEAD_DIM are even.
    """
    w = tl.arange(0, BLOCK_D // 2)
    mask = seen[:, None]
    if BLOCK_D != HEAD_DIM:
        mask = mask & (2 * w < HEAD_DIM)[None, :]
    words = tl.load(ptr.to(tl.pointer_type(tl.int16)) + rows[:, None] * (stride // 2) + w[None, :], mask=mask, other=0)
    return numbers(words, CODEC, HAS_ASM)


@triton.jit
def numbers(words, CODEC: tl.constexpr, HAS_ASM: tl.constexpr):
    """int16 words of two codes -> what the low and the high byte mean, fp16."""
    if CODEC == "int8":  # 0x6400 | u is 1024 + u in fp16, u = code + 128
        if HAS_ASM:
            low, high = tl.inline_asm_elementwise(
                """{
                .reg .b32 shifted, bias;
                mov.b32 bias, 0x64806480;
                shr.b32 shifted, $2, 8;
                lop3.b32 $0, $2, 0x00FF00FF, bias, 0x6A;
                lop3.b32 $1, shifted, 0x00FF00FF, bias, 0x6A;
                sub.f16x2 $0, $0, bias;
                sub.f16x2 $1, $1, bias;
                }""",
                "=r,=r,r",
                [words],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            low = ((words & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
            high = (((words >> 8) & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    elif HAS_ASM:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 sign, rest;
            shl.b32 sign, $2, 8;
            and.b32 sign, sign, 0x80008000;
            shl.b32 rest, $2, 7;
            lop3.b32 $0, rest, 0x3F803F80, sign, 0xEA;
            and.b32 sign, $2, 0x80008000;
            shr.b32 rest, $2, 1;
            lop3.b32 $1, rest, 0x3F803F80, sign, 0xEA;
            }""",
            "=r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        low = (((words & 0x7F) << 7) | ((words & 0x80) << 8)).to(tl.float16, bitcast=True)
        high = (((words >> 1) & 0x3F80) | (words & -0x8000)).to(tl.float16, bitcast=True)
    return low, high


@triton.jit
def load_scales(ptr, stride, rows, seen, CODEC: tl.constexpr):
    """[BLOCK_R] fp32: what codes are worth; zeros where not `seen`."""
    scale = tl.load(ptr + rows * stride, mask=seen, other=0.0).to(tl.float32)
    return scale * 256.0 if CODEC == "fp8" else scale


@triton.jit
def power_of_two_below(x):
    """[M, D] -> [M] fp32: the largest power of two that is not above the largest size of a row; 2 ** -100 at least."""
    largest = tl.max(tl.abs(x.to(tl.float32)), axis=1)
    return tl.maximum((largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True), 7.9e-31)

"""NF4: x times levels that 4-bit codes look up, one scale per 64 inputs, itself quantised (`quantize/nf4_grid.py`).

    y[m, n] = sum over blocks b of  scale[n, b] * (sum over k in b of x[m, k] * levels[code[n, k]])
    scale[n, b] = max(0, mean + scale_code[n, b] * step[(n * blocks + b) / 256])

The levels are rounded to x's dtype for the tensor cores, exact for fp32; everything else is fp32.
"""

import triton
import triton.language as tl
from torch import Tensor

from codesign.engine.kernels.triton.configs import Config
from codesign.engine.kernels.triton.launch import launch
from codesign.engine.kernels.triton.tile import load_rows, store, tile
from codesign.engine.kernels.triton.unpack import load_codes

GROUP = 64
SCALES_PER_STEP = 256


@triton.jit(do_not_specialize=["num_rows"])
def nf4_kernel(
    x_ptr,
    packed_ptr,
    levels_ptr,
    scale_codes_ptr,
    step_ptr,
    mean_ptr,
    y_ptr,
    num_rows,
    num_out,
    num_in,
    GROUP: tl.constexpr,
    SCALES_PER_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    tl.static_assert(GROUP % BLOCK_K == 0)
    m0, n0, rows, outs, first, stop = tile(num_rows, num_out, num_in, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K)
    n = tl.arange(0, BLOCK_N)
    num_groups = num_in // GROUP
    x_ptr += m0 * num_in
    packed_ptr += n0 * (num_in // 2)
    mean = tl.load(mean_ptr)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(first, stop):
        x = load_rows(x_ptr, rows, block * BLOCK_K + tl.arange(0, BLOCK_K), num_in, False, BLOCK_M)
        codes = load_codes(packed_ptr, outs, block, num_in, 4, BLOCK_N, BLOCK_K)
        products = tl.dot(x, tl.trans(tl.load(levels_ptr + codes)), input_precision="ieee")
        group = (n0.to(tl.int32) + n) * num_groups + block * BLOCK_K // GROUP
        scale_code = tl.load(scale_codes_ptr + group, mask=n < outs, other=0).to(tl.float32)
        step = tl.load(step_ptr + group // SCALES_PER_STEP, mask=n < outs, other=0.0)
        sums += products * tl.maximum(mean + scale_code * step, 0.0)[None, :]
    store(y_ptr, sums, m0, n0, rows, outs, num_rows, num_out, BLOCK_M, BLOCK_N)


def nf4(
    x: Tensor,
    packed: Tensor,
    levels: Tensor,
    scale_codes: Tensor,
    step: Tensor,
    mean: Tensor,
    *,
    config: Config,
) -> Tensor:
    """[M, out] in the dtype of x, from x [M, in], M >= 1.

    Args:
        packed: [out, in / 2] uint8, the even input's code in the low bits.
        levels: [16], what the codes mean.
        scale_codes, step, mean: `nf4_grid.ScaleCodes`.
    """
    weight = (packed, levels.to(x.dtype), scale_codes, step, mean)
    return launch(nf4_kernel, x, weight, packed.shape[0], config, GROUP=GROUP, SCALES_PER_STEP=SCALES_PER_STEP)

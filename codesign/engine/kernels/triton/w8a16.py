"""W8A16: x times int8 codes with one scale a row; codes become x's dtype in registers, which holds them exactly.

    y[m, n] = scale[n] * sum over k of x[m, k] * codes[n, k]          products and sums in fp32, scaled once at the end

Unscaled sums overflow fp32 only where |x| passes 1e34 or so.
"""

import triton
import triton.language as tl
from torch import Tensor

from codesign.engine.kernels.triton.configs import Config
from codesign.engine.kernels.triton.launch import launch
from codesign.engine.kernels.triton.tile import load_rows, store, tile


@triton.jit(do_not_specialize=["num_rows"])
def w8a16_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    y_ptr,
    num_rows,
    num_out,
    num_in,
    IS_RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    m0, n0, rows, outs, first, stop = tile(num_rows, num_out, num_in, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K)
    n = tl.arange(0, BLOCK_N)
    x_ptr += m0 * num_in
    codes_ptr += n0 * num_in
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(first, stop):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, rows, k, num_in, IS_RAGGED, BLOCK_M)
        mask = n[:, None] < outs
        if IS_RAGGED:
            mask = mask & (k[None, :] < num_in)
        codes = tl.load(codes_ptr + n[:, None] * num_in + k[None, :], mask=mask, other=0)
        sums = tl.dot(x, tl.trans(codes.to(x.dtype)), sums, input_precision="ieee")
    sums *= tl.load(scale_ptr + n0 + n, mask=n < outs, other=0.0).to(tl.float32)[None, :]
    store(y_ptr, sums, m0, n0, rows, outs, num_rows, num_out, BLOCK_M, BLOCK_N)


def w8a16(x: Tensor, codes: Tensor, scale: Tensor, *, config: Config) -> Tensor:
    """[M, out] in the dtype of x, from x [M, in], M >= 1.

    Args:
        codes: [out, in] int8.
        scale: [out], any float dtype.
    """
    is_ragged = codes.shape[1] % config.block_k != 0
    return launch(w8a16_kernel, x, (codes, scale), codes.shape[0], config, IS_RAGGED=is_ragged)

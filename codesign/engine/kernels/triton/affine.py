"""W4A16, W3A16 and W2A16: x times codes in groups along the input with a scale and, unless symmetric, an offset.

    y[m, n] = sum over groups g of  scale[n, g] * (sum over k in g of x[m, k] * (code[n, k] - middle))
                                  + offset[n, g] * (sum over k in g of x[m, k])

A block of inputs lies in one group. The tensor cores multiply x by whole numbers, which its dtype holds exactly; scales
touch the sums in fp32 and not every weight, so nothing is rounded that the float64 product of the format would not be.
"""

import triton
import triton.language as tl
from torch import Tensor

from codesign.engine.kernels.triton.configs import Config
from codesign.engine.kernels.triton.launch import launch
from codesign.engine.kernels.triton.tile import load_rows, store, tile
from codesign.engine.kernels.triton.unpack import load_codes


@triton.jit(do_not_specialize=["num_rows"])
def affine_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    offset_ptr,
    y_ptr,
    num_rows,
    num_out,
    num_in,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
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
    packed_ptr += n0 * (num_in // 8 * BITS)
    scale_ptr += n0 * num_groups
    offset_ptr += n0 * num_groups
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(first, stop):
        x = load_rows(x_ptr, rows, block * BLOCK_K + tl.arange(0, BLOCK_K), num_in, False, BLOCK_M)
        codes = load_codes(packed_ptr, outs, block, num_in, BITS, BLOCK_N, BLOCK_K)
        whole = (codes.to(tl.int8) - (1 << (BITS - 1))).to(x.dtype)
        products = tl.dot(x, tl.trans(whole), input_precision="ieee")
        group = n * num_groups + block * BLOCK_K // GROUP
        sums += products * tl.load(scale_ptr + group, mask=n < outs, other=0.0).to(tl.float32)[None, :]
        if HAS_OFFSET:
            offset = tl.load(offset_ptr + group, mask=n < outs, other=0.0).to(tl.float32)
            sums += tl.sum(x.to(tl.float32), axis=1)[:, None] * offset[None, :]
    store(y_ptr, sums, m0, n0, rows, outs, num_rows, num_out, BLOCK_M, BLOCK_N)


def affine(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    *,
    bits: int,
    config: Config,
) -> Tensor:
    """[M, out] in the dtype of x, from x [M, in], M >= 1.

    Args:
        packed: [out, in * bits / 8] uint8, as `bit_packed.pack_bits` packs 2, 3 or 4 bits.
        scale: [out, groups]; groups of a power of two inputs, 16 at least, that `config.block_k` divides.
        offset: the same, or None.
    """
    group = x.shape[1] // scale.shape[1]
    weight = (packed, scale, scale if offset is None else offset)
    constants = {"BITS": bits, "GROUP": group, "HAS_OFFSET": offset is not None}
    return launch(affine_kernel, x, weight, packed.shape[0], config, **constants)

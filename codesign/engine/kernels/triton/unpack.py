"""Codes of 2, 3 and 4 bits in the order of `quantize/bit_packed.py`, unpacked in registers.

Neighbouring inputs share a byte there, lowest bits first, so a thread that loads bytes along the inputs holds the codes
of neighbouring inputs already: putting them in order moves nothing between threads.
"""

import triton
import triton.language as tl


@triton.jit
def load_codes(packed_ptr, outs, block, num_in, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes [BLOCK_N, BLOCK_K] uint8 of one whole block of inputs, from row packed_ptr on; 0 beyond `outs` outputs."""
    n = tl.arange(0, BLOCK_N)[:, None]
    mask = n < outs
    row_ptr = packed_ptr + n * (num_in // 8 * BITS)
    if BITS == 4:
        k = block * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
        pairs = tl.load(row_ptr + k[None, :], mask=mask, other=0)
        return tl.interleave(pairs & 15, pairs >> 4)
    k = block * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4)
    quads = tl.load(row_ptr + k[None, :], mask=mask, other=0)
    codes = tl.interleave(
        tl.interleave(quads & 3, (quads >> 4) & 3),
        tl.interleave((quads >> 2) & 3, quads >> 6),
    )
    if BITS == 3:
        k = num_in // 4 + block * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
        eights = tl.load(row_ptr + k[None, :], mask=mask, other=0)
        even = tl.interleave(
            tl.interleave(eights & 1, (eights >> 4) & 1), tl.interleave((eights >> 2) & 1, (eights >> 6) & 1)
        )
        odd = tl.interleave(
            tl.interleave((eights >> 1) & 1, (eights >> 5) & 1), tl.interleave((eights >> 3) & 1, eights >> 7)
        )
        codes = codes | (tl.interleave(even, odd) << 2)
    return codes

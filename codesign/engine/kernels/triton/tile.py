"""What every weight kernel here does alike: find its tile, load activations, store sums. Imported on the device only.

y [M, N] is cut into BLOCK_M x BLOCK_N tiles, and the K inputs of a tile into SPLIT_K runs of whole blocks; one
program adds one run of one tile in fp32. With SPLIT_K = 1 that is y; otherwise `add_splits` adds the runs, in the same
order every time, which atomic additions would not.
"""

import triton
import triton.language as tl


@triton.jit
def tile(
    num_rows,
    num_out,
    num_in,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Where this program works.

    Returns its first row and output (64 bits: everything else is counted from there in 32), how many rows and outputs
    there are from them on, its first block of inputs and the one after its last.
    """
    n0 = tl.program_id(0).to(tl.int64) * BLOCK_N
    m0 = tl.program_id(1).to(tl.int64) * BLOCK_M
    num_blocks = tl.cdiv(num_in, BLOCK_K)
    per_split = tl.cdiv(num_blocks, SPLIT_K)
    first = tl.program_id(2) * per_split
    stop = tl.minimum(first + per_split, num_blocks)
    return m0, n0, (num_rows - m0).to(tl.int32), (num_out - n0).to(tl.int32), first, stop


@triton.jit
def load_rows(x_ptr, rows, k, num_in, IS_RAGGED: tl.constexpr, BLOCK_M: tl.constexpr):
    """x [BLOCK_M, BLOCK_K] from x_ptr on, with zeros beyond `rows` and, if K is no whole number of blocks, beyond K."""
    m = tl.arange(0, BLOCK_M)[:, None]
    mask = m < rows
    if IS_RAGGED:
        mask = mask & (k[None, :] < num_in)
    return tl.load(x_ptr + m * num_in + k[None, :], mask=mask, other=0.0)


@triton.jit
def store(
    y_ptr,
    sums,
    m0,
    n0,
    rows,
    outs,
    num_rows,
    num_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Writes the sums of this program into its run of y [SPLIT_K, M, N], in y's dtype."""
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    own_ptr = y_ptr + (tl.program_id(2).to(tl.int64) * num_rows + m0) * num_out + n0
    tl.store(own_ptr + m * num_out + n, sums.to(y_ptr.dtype.element_ty), mask=(m < rows) & (n < outs))


@triton.jit(do_not_specialize=["num_rows"])
def add_splits(sums_ptr, y_ptr, num_rows, num_out, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    """y [M, N] = sums [SPLIT_K, M, N] fp32 over the splits; one program per BLOCK outputs of a row."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLIT_K):
        total += tl.load(sums_ptr + (split * num_rows + row) * num_out + n, mask=n < num_out, other=0.0)
    tl.store(y_ptr + row * num_out + n, total.to(y_ptr.dtype.element_ty), mask=n < num_out)

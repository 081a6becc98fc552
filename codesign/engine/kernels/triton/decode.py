"""Output tokens over the rows of many sequences, split over the context: flash-decoding, online softmax in fp32.

One program takes one run of rows of one KV head and all the queries that look at it, so that K and V are read once
for the whole query group. What it finds (largest score, sum, weighted values) is put together by `combine.py`, in the
same order every time, which atomic additions would not.

    scores   s = scale * log2(e) * q.k + mask * log2(e)        weights 2 ** (s - largest)

Rows lie one after the other, or in blocks [num_blocks, H_kv, TABLE_ROWS] that a table of each sequence lists.

Flash-decoding (Dao et al., 2023), https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
"""

import triton
import triton.language as tl

from codesign.engine.kernels.triton.kv_rows import load_rows, load_scales


@triton.jit(do_not_specialize=["num_queries", "num_tokens", "num_rows", "rows_per_split", "first_split", "num_splits"])
def decode_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    counts_ptr,
    table_ptr,
    slots_ptr,
    mask_ptr,
    sums_ptr,
    largest_ptr,
    total_ptr,
    scores_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_m,
    key_stride_b,
    key_stride_h,
    key_stride_r,
    value_stride_b,
    value_stride_h,
    value_stride_r,
    table_stride_b,
    table_stride_h,
    mask_stride_b,
    mask_stride_h,
    mask_stride_m,
    mask_stride_r,
    num_queries,
    num_tokens,
    num_rows,
    rows_per_split,
    first_split,
    num_splits,
    scale,
    CODEC: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid: (splits, KV heads x blocks of queries, sequences). Scales lie as their rows do, one for HEAD_DIM codes.

    TABLE_ROWS 0: no table. Otherwise a multiple of BLOCK_R, and its blocks take the place of sequences: `*_stride_b` is
    theirs, of keys and values alike. HAS_SLOTS: the rows of a sequence lie where `slots_ptr` says instead of at its own
    number; queries and what is found do not.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    num_heads = tl.num_programs(1) // num_blocks
    split, head, batch = tl.program_id(0), (tl.program_id(1) // num_blocks).to(tl.int64), tl.program_id(2).to(tl.int64)
    m = (tl.program_id(1) % num_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    is_query = m < num_queries
    visible = tl.full([BLOCK_M], num_rows, tl.int32)
    count = num_rows
    if HAS_COUNTS:  # the last token of a sequence sees all its rows, the one before it one less, ...
        count = tl.load(counts_ptr + batch)
        visible = count - (num_tokens - 1 - m % num_tokens)
    first = split * rows_per_split
    stop = tl.minimum(first + rows_per_split, count)

    query_ptr += batch * query_stride_b + head * query_stride_h
    is_there = is_query[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(query_ptr + m[:, None] * query_stride_m + d[None, :], mask=is_there, other=0.0)
    key_ptr += head * key_stride_h
    value_ptr += head * value_stride_h
    if CODEC != "native":
        key_scale_ptr += head * (key_stride_h // HEAD_DIM)
        value_scale_ptr += head * (value_stride_h // HEAD_DIM)
    if TABLE_ROWS:
        table_ptr += batch * table_stride_b + head * table_stride_h
    else:
        slot = batch
        if HAS_SLOTS:
            slot = tl.load(slots_ptr + batch).to(tl.int64)
        key_ptr += slot * key_stride_b
        value_ptr += slot * value_stride_b
        if CODEC != "native":
            key_scale_ptr += slot * (key_stride_b // HEAD_DIM)
            value_scale_ptr += slot * (value_stride_b // HEAD_DIM)
    if HAS_MASK:
        mask_ptr += batch * mask_stride_b + head * mask_stride_h
    plane = (batch * num_heads + head) * num_queries

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(first, stop, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        seen = r < stop
        rows = r
        if TABLE_ROWS:  # rows that are read at once lie in one block
            block = tl.load(table_ptr + start // TABLE_ROWS).to(tl.int64)
            rows = block * (key_stride_b // key_stride_r) + r % TABLE_ROWS
        k = load_rows(key_ptr, key_stride_r, rows, seen, q.dtype, CODEC, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        if CODEC != "native":
            s *= load_scales(key_scale_ptr, key_stride_r // HEAD_DIM, rows, seen, CODEC)[None, :]
        if HAS_MASK:
            mask = mask_ptr + m[:, None] * mask_stride_m + r[None, :] * mask_stride_r
            s += tl.load(mask, mask=is_query[:, None] & seen[None, :], other=0.0).to(tl.float32) * LOG2E
        s = tl.where(seen[None, :] & (r[None, :] < visible[:, None]), s, float("-inf"))
        if HAS_SCORES:
            here = scores_ptr + (plane + m[:, None]) * num_rows + r[None, :]
            tl.store(here, s, mask=is_query[:, None] & seen[None, :])

        larger = tl.maximum(largest, tl.max(s, axis=1))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # no row seen so far: weights of 0, not of NaN
        shrink = tl.exp2(largest - base)
        weight = tl.exp2(s - base[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        v = load_rows(value_ptr, value_stride_r, rows, seen, q.dtype, CODEC, HEAD_DIM, BLOCK_D)
        if CODEC == "native":
            sums = tl.dot(weight.to(q.dtype), v, sums * shrink[:, None], input_precision="ieee")
        else:  # scales beside the largest of the block, so that their products with weights stay normal in fp16
            worth = load_scales(value_scale_ptr, value_stride_r // HEAD_DIM, rows, seen, CODEC)
            unit = tl.maximum(tl.max(worth, axis=0), 1e-30)
            mixed = tl.dot((weight * (worth / unit)[None, :]).to(q.dtype), v, input_precision="ieee")
            sums = sums * shrink[:, None] + mixed * unit
        largest = larger

    found = (plane * num_splits) + (first_split + split) * num_queries + m  # [B, H_kv, splits, M]
    tl.store(largest_ptr + found, largest, mask=is_query)
    tl.store(total_ptr + found, total, mask=is_query)
    tl.store(sums_ptr + found[:, None] * HEAD_DIM + d[None, :], sums, mask=is_there)

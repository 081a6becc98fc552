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

from codesign.engine.kernels.triton.kv_rows import channel_pairs, load_rows, load_scales, power_of_two_below


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
    HAS_ASM: tl.constexpr,
):
    """Grid: (splits, KV heads x blocks of queries, sequences). Scales lie as their rows do, one for HEAD_DIM codes.

    TABLE_ROWS 0: no table. Otherwise a power of two, and its blocks take the place of sequences: `key_stride_b` is
    theirs, and the strides of keys are those of values too. HAS_ASM: codes become numbers by PTX, as fast as can be.
    HAS_SLOTS: the rows of a sequence lie where `slots_ptr` says, instead of at its own number as queries do.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    num_heads = tl.num_programs(1) // num_blocks
    split, head, batch = tl.program_id(0), (tl.program_id(1) // num_blocks).to(tl.int64), tl.program_id(2).to(tl.int64)
    m = (tl.program_id(1) % num_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    IS_CODED: tl.constexpr = CODEC != "native"
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
    query_ptr += m[:, None] * query_stride_m
    if IS_CODED:  # a word of two codes: channels 2 w and 2 w + 1 apart from each other, in all that follows
        w = tl.arange(0, BLOCK_D // 2)
        is_there = is_query[:, None] & (2 * w < HEAD_DIM)[None, :]
        q_low = tl.load(query_ptr + 2 * w[None, :], mask=is_there, other=0.0)
        q_high = tl.load(query_ptr + 2 * w[None, :] + 1, mask=is_there, other=0.0)
        q_unit = tl.full([BLOCK_M], 1.0, tl.float32)
        if q_low.dtype != tl.float32:  # products in fp16, in which codes are made: queries beside 1, by a power of two
            q_unit = tl.maximum(power_of_two_below(q_low), power_of_two_below(q_high))
            q_low = (q_low.to(tl.float32) / q_unit[:, None]).to(tl.float16)
            q_high = (q_high.to(tl.float32) / q_unit[:, None]).to(tl.float16)
        sums_low = tl.zeros([BLOCK_M, BLOCK_D // 2], tl.float32)
        sums_high = tl.zeros([BLOCK_M, BLOCK_D // 2], tl.float32)
    else:
        is_there = is_query[:, None] & (d < HEAD_DIM)[None, :]
        q = tl.load(query_ptr + d[None, :], mask=is_there, other=0.0)
        sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key_ptr += head * key_stride_h
    value_ptr += head * value_stride_h
    if IS_CODED:
        key_scale_ptr += head * (key_stride_h // HEAD_DIM)
        value_scale_ptr += head * (value_stride_h // HEAD_DIM)
    if TABLE_ROWS:
        value_stride_r = key_stride_r
        table_ptr += batch * table_stride_b + head * table_stride_h
    else:
        slot = batch
        if HAS_SLOTS:
            slot = tl.load(slots_ptr + batch).to(tl.int64)
        key_ptr += slot * key_stride_b
        value_ptr += slot * value_stride_b
        if IS_CODED:
            key_scale_ptr += slot * (key_stride_b // HEAD_DIM)
            value_scale_ptr += slot * (value_stride_b // HEAD_DIM)
    if HAS_MASK:
        mask_ptr += batch * mask_stride_b + head * mask_stride_h
    plane = (batch * num_heads + head) * num_queries

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if TABLE_ROWS:  # blocks are known one turn ahead, so that rows are fetched as early as without a table
        ahead = first + tl.arange(0, BLOCK_R)
        block = tl.load(table_ptr + ahead.to(tl.uint32) // TABLE_ROWS, mask=ahead < stop, other=0)
    for start in range(first, stop, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        seen = r < stop
        rows = r
        if TABLE_ROWS:
            rows = block.to(tl.int64) * (key_stride_b // key_stride_r) + r.to(tl.uint32) % TABLE_ROWS
            ahead = r + BLOCK_R
            block = tl.load(table_ptr + ahead.to(tl.uint32) // TABLE_ROWS, mask=ahead < stop, other=0)
        if IS_CODED:
            k_low, k_high = channel_pairs(key_ptr, key_stride_r, rows, seen, CODEC, HEAD_DIM, BLOCK_D, HAS_ASM)
            s = tl.dot(q_low, tl.trans(k_low.to(q_low.dtype)), input_precision="ieee")
            s = tl.dot(q_high, tl.trans(k_high.to(q_low.dtype)), s, input_precision="ieee")
            s *= (scale * LOG2E * q_unit)[:, None]
            s *= load_scales(key_scale_ptr, key_stride_r // HEAD_DIM, rows, seen, CODEC)[None, :]
        else:
            k = load_rows(key_ptr, key_stride_r, rows, seen, HEAD_DIM, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
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
        if IS_CODED:  # scales beside the largest of the block, so that their products with weights stay normal in fp16
            v_low, v_high = channel_pairs(value_ptr, value_stride_r, rows, seen, CODEC, HEAD_DIM, BLOCK_D, HAS_ASM)
            worth = load_scales(value_scale_ptr, value_stride_r // HEAD_DIM, rows, seen, CODEC)
            unit = tl.maximum(tl.max(worth, axis=0), 1e-30)
            weight = (weight * (worth / unit)[None, :]).to(q_low.dtype)
            mixed_low = tl.dot(weight, v_low.to(weight.dtype), input_precision="ieee")
            mixed_high = tl.dot(weight, v_high.to(weight.dtype), input_precision="ieee")
            sums_low = sums_low * shrink[:, None] + mixed_low * unit
            sums_high = sums_high * shrink[:, None] + mixed_high * unit
        else:
            v = load_rows(value_ptr, value_stride_r, rows, seen, HEAD_DIM, BLOCK_D)
            sums = tl.dot(weight.to(q.dtype), v, sums * shrink[:, None], input_precision="ieee")
        largest = larger

    found = (plane * num_splits) + (first_split + split) * num_queries + m  # [B, H_kv, splits, M]
    tl.store(largest_ptr + found, largest, mask=is_query)
    tl.store(total_ptr + found, total, mask=is_query)
    sums_ptr += found[:, None] * HEAD_DIM
    if IS_CODED:
        tl.store(sums_ptr + 2 * w[None, :], sums_low, mask=is_there)
        tl.store(sums_ptr + 2 * w[None, :] + 1, sums_high, mask=is_there)
    else:
        tl.store(sums_ptr + d[None, :], sums, mask=is_there)

"""What the splits of an attention found, put together in the order of the splits; and weights from their scores."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_queries", "num_splits"])
def combine_kernel(
    sums_ptr,
    largest_ptr,
    total_ptr,
    out_ptr,
    lse_ptr,
    num_queries,
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """out [B, H_kv, M, D] and lse [B, H_kv, M] fp32, base 2; both 0 where no row was seen. Grid: (M, B x H_kv)."""
    query, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = plane * num_splits * num_queries + query
    split, d = tl.arange(0, MAX_SPLITS), tl.arange(0, BLOCK_D)
    own = first + split * num_queries
    largest = tl.load(largest_ptr + own, mask=split < num_splits, other=float("-inf"))
    total = tl.load(total_ptr + own, mask=split < num_splits, other=0.0)
    peak = tl.max(largest, axis=0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    whole = tl.sum(tl.exp2(largest - base) * total, axis=0)
    mixed = tl.zeros([BLOCK_D], tl.float32)
    for index in range(num_splits):
        there = first + index * num_queries
        share = tl.exp2(tl.load(largest_ptr + there) - base)
        mixed += share * tl.load(sums_ptr + there * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
    whole = tl.where(whole == 0.0, 1.0, whole)
    out = mixed / whole
    to = plane * num_queries + query
    tl.store(out_ptr + to * HEAD_DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(lse_ptr + to, base + tl.log2(whole))


@triton.jit(do_not_specialize=["num_queries", "num_tokens", "num_rows"])
def columns_kernel(
    scores_ptr,
    lse_ptr,
    counts_ptr,
    out_ptr,
    num_queries,
    num_tokens,
    num_rows,
    HAS_COUNTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out [B, H_kv, Q, R]: softmax weights from scores [B, H_kv, G * Q, R], mean over the query group.

    Grid: (blocks of rows, H_kv x Q, B).
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    token, batch = tl.program_id(1) % num_tokens, tl.program_id(2).to(tl.int64)
    plane = batch * (tl.num_programs(1) // num_tokens) + tl.program_id(1) // num_tokens
    count = num_rows
    if HAS_COUNTS:  # nobody wrote scores of rows that are not there
        count = tl.load(counts_ptr + batch)
    total = tl.zeros([BLOCK_R], tl.float32)
    for query in range(token, num_queries, num_tokens):
        lse = tl.load(lse_ptr + plane * num_queries + query)
        s = tl.load(scores_ptr + (plane * num_queries + query) * num_rows + r, mask=r < count, other=float("-inf"))
        total += tl.exp2(s - lse)
    mean = total * num_tokens / num_queries
    tl.store(out_ptr + (plane * num_tokens + token) * num_rows + r, mean, mask=r < num_rows)

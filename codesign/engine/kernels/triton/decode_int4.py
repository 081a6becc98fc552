"""The same as `decode.py` for tokens in int4 groups (`kv/codecs/int4.py`), two codes a byte, put right in registers.

    key    low[g, d] + step[g, d] * code        over each channel of a group of tokens
    value  low[t, c] + step[t, c] * code        over each group of channels of a token

Channel d lies in the low half of byte d, channel d + D / 2 in its high half: the halves of a head are two products.
Steps of keys go to the few queries instead of the many rows. Codes count from their middle, 8, so that less cancels.
"""

import triton
import triton.language as tl


@triton.jit
def load_values(ptr, step_ptr, low_ptr, r, seen, SHIFT: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr):
    """One half of the channels, [BLOCK_R, GROUPS * CHANNELS] fp32; steps and lows from their pointers on."""
    c, j = tl.arange(0, GROUPS), tl.arange(0, CHANNELS)
    width: tl.constexpr = GROUPS * CHANNELS
    at = r[:, None, None] * width + c[None, :, None] * CHANNELS + j[None, None, :]
    code = (tl.load(ptr + at, mask=seen[:, None, None], other=0) >> SHIFT) & 15
    of_group = r[:, None] * (2 * GROUPS) + c[None, :]
    step = tl.load(step_ptr + of_group, mask=seen[:, None], other=0.0).to(tl.float32)
    low = tl.load(low_ptr + of_group, mask=seen[:, None], other=0.0).to(tl.float32)
    return tl.reshape(low[:, :, None] + step[:, :, None] * code.to(tl.float32), (r.shape[0], width))


@triton.jit
def weighted_queries(q, step, low):
    """q * step in the dtype of q, and for each query what its product with the middles of the group is."""
    wide = q.to(tl.float32)
    return (wide * step[None, :]).to(q.dtype), tl.sum(wide * (low + 8.0 * step)[None, :], axis=1)


@triton.jit(do_not_specialize=["num_queries", "rows_per_split", "first_split", "num_splits"])
def decode_int4_kernel(
    query_ptr,
    key_code_ptr,
    key_step_ptr,
    key_low_ptr,
    value_code_ptr,
    value_step_ptr,
    value_low_ptr,
    counts_ptr,
    sums_ptr,
    largest_ptr,
    total_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_m,
    num_queries,
    capacity,
    rows_per_split,
    first_split,
    num_splits,
    scale,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid: (splits, KV heads x blocks of queries, sequences). Every query sees the first `counts` tokens of its own.

    What is encoded is contiguous, [B, H_kv, capacity, ...].
    """
    tl.static_assert(GROUP % BLOCK_R == 0)
    LOG2E: tl.constexpr = 1.4426950408889634
    HALF: tl.constexpr = HEAD_DIM // 2
    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    num_heads = tl.num_programs(1) // num_blocks
    split, head, batch = tl.program_id(0), (tl.program_id(1) // num_blocks).to(tl.int64), tl.program_id(2).to(tl.int64)
    m = (tl.program_id(1) % num_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, HALF)
    is_query = m < num_queries
    first = split * rows_per_split
    stop = tl.minimum(first + rows_per_split, tl.load(counts_ptr + batch))

    query_ptr += batch * query_stride_b + head * query_stride_h
    here = query_ptr + m[:, None] * query_stride_m + d[None, :]
    q_low = tl.load(here, mask=is_query[:, None], other=0.0)
    q_high = tl.load(here + HALF, mask=is_query[:, None], other=0.0)
    plane = batch * num_heads + head
    key_code_ptr += plane * capacity * HALF
    key_step_ptr += plane * (capacity // GROUP) * HEAD_DIM
    key_low_ptr += plane * (capacity // GROUP) * HEAD_DIM
    value_code_ptr += plane * capacity * HALF
    value_step_ptr += plane * capacity * (HEAD_DIM // CHANNELS)
    value_low_ptr += plane * capacity * (HEAD_DIM // CHANNELS)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums_low = tl.zeros([BLOCK_M, HALF], tl.float32)
    sums_high = tl.zeros([BLOCK_M, HALF], tl.float32)
    for start in range(first, stop, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        seen = r < stop
        code = tl.load(key_code_ptr + r[:, None] * HALF + d[None, :], mask=seen[:, None], other=0)
        of_group = start // GROUP * HEAD_DIM + d
        q, middle_low = weighted_queries(
            q_low, tl.load(key_step_ptr + of_group).to(tl.float32), tl.load(key_low_ptr + of_group).to(tl.float32)
        )
        s = tl.dot(q, tl.trans(((code & 15).to(tl.int8) - 8).to(q.dtype)), input_precision="ieee")
        q, middle_high = weighted_queries(
            q_high,
            tl.load(key_step_ptr + HALF + of_group).to(tl.float32),
            tl.load(key_low_ptr + HALF + of_group).to(tl.float32),
        )
        s = tl.dot(q, tl.trans(((code >> 4).to(tl.int8) - 8).to(q.dtype)), s, input_precision="ieee")
        s = (s + (middle_low + middle_high)[:, None]) * (scale * LOG2E)
        s = tl.where(seen[None, :], s, float("-inf"))

        larger = tl.maximum(largest, tl.max(s, axis=1))  # finite: a block that is begun has rows
        shrink = tl.exp2(largest - larger)
        weight = tl.exp2(s - larger[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        weight = weight.to(q.dtype)
        groups: tl.constexpr = HALF // CHANNELS
        v = load_values(value_code_ptr, value_step_ptr, value_low_ptr, r, seen, 0, groups, CHANNELS).to(q.dtype)
        sums_low = tl.dot(weight, v, sums_low * shrink[:, None], input_precision="ieee")
        v = load_values(
            value_code_ptr, value_step_ptr + groups, value_low_ptr + groups, r, seen, 4, groups, CHANNELS
        ).to(q.dtype)
        sums_high = tl.dot(weight, v, sums_high * shrink[:, None], input_precision="ieee")
        largest = larger

    found = (plane * num_splits + first_split + split) * num_queries + m  # [B, H_kv, splits, M]
    tl.store(largest_ptr + found, largest, mask=is_query)
    tl.store(total_ptr + found, total, mask=is_query)
    to = sums_ptr + found[:, None] * HEAD_DIM + d[None, :]
    tl.store(to, sums_low, mask=is_query[:, None])
    tl.store(to + HALF, sums_high, mask=is_query[:, None])

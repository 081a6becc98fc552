"""How much attention each row of a prompt received, in O(n) memory: log-sum-exp first, then every weight once more.

    lse[m]  = log of the sum over r of exp(s[m, r])
    sums[r] = mean over the query group of the sum over m of exp(s[m, r] - lse[m])

Fused attention shows neither weights nor, through SDPA, its log-sum-exp; two passes of q kᵀ cost what one attention
does. A program of the second pass owns its rows and adds queries in order: the same sums every time. The plain form is
`attention/weights.py`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from codesign.engine.kernels.triton.kv_rows import load_rows
from codesign.engine.kernels.triton.splits import power_of_two


@triton.jit
def scores(
    query_ptr,
    key_ptr,
    mask_ptr,
    query_stride_m,
    key_stride_r,
    mask_stride_m,
    mask_stride_r,
    m,
    r,
    num_queries,
    num_rows,
    scale,
    IS_CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_M, BLOCK_R] base 2, of one query head; -inf where a query does not see a row or neither is there."""
    LOG2E: tl.constexpr = 1.4426950408889634
    is_query, is_row = m < num_queries, r < num_rows
    q = load_rows(query_ptr, query_stride_m, m, is_query, HEAD_DIM, BLOCK_D)
    k = load_rows(key_ptr, key_stride_r, r, is_row, HEAD_DIM, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
    is_seen = is_query[:, None] & is_row[None, :]
    if HAS_MASK:
        mask = tl.load(mask_ptr + m[:, None] * mask_stride_m + r[None, :] * mask_stride_r, mask=is_seen, other=0.0)
        s += mask.to(tl.float32) * LOG2E
    if IS_CAUSAL:
        is_seen = is_seen & (r[None, :] <= m[:, None])
    return tl.where(is_seen, s, float("-inf"))


@triton.jit(do_not_specialize=["num_queries", "num_rows"])
def lse_kernel(
    query_ptr,
    key_ptr,
    mask_ptr,
    lse_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_m,
    key_stride_b,
    key_stride_h,
    key_stride_r,
    mask_stride_b,
    mask_stride_h,
    mask_stride_m,
    mask_stride_r,
    num_queries,
    num_rows,
    num_groups,
    scale,
    IS_CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """lse [B, H, M] fp32, base 2; 0 for a query that sees nothing. Grid: (blocks of queries, H, B)."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_ptr += batch * query_stride_b + head * query_stride_h
    key_ptr += batch * key_stride_b + head // num_groups * key_stride_h
    mask_ptr += batch * mask_stride_b + head * mask_stride_h
    stop = num_rows
    if IS_CAUSAL:
        stop = tl.minimum(num_rows, (tl.program_id(0) + 1) * BLOCK_M)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, stop, BLOCK_R):
        s = scores(
            query_ptr,
            key_ptr,
            mask_ptr,
            query_stride_m,
            key_stride_r,
            mask_stride_m,
            mask_stride_r,
            m,
            start + tl.arange(0, BLOCK_R),
            num_queries,
            num_rows,
            scale,
            IS_CAUSAL,
            HAS_MASK,
            HEAD_DIM,
            BLOCK_D,
        )
        larger = tl.maximum(largest, tl.max(s, axis=1))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(s - base[:, None]), axis=1)
        largest = larger
    lse = tl.where(largest == float("-inf"), 0.0, largest + tl.log2(tl.where(total == 0.0, 1.0, total)))
    plane = batch * tl.num_programs(1) + head
    tl.store(lse_ptr + plane * num_queries + m, lse, mask=m < num_queries)


@triton.jit(do_not_specialize=["num_queries", "num_rows"])
def sums_kernel(
    query_ptr,
    key_ptr,
    mask_ptr,
    lse_ptr,
    out_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_m,
    key_stride_b,
    key_stride_h,
    key_stride_r,
    mask_stride_b,
    mask_stride_h,
    mask_stride_m,
    mask_stride_r,
    num_queries,
    num_rows,
    num_groups,
    scale,
    log2_decay,
    IS_CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out [B, H_kv, R] fp32. Grid: (blocks of rows, H_kv, B)."""
    kv_head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    key_ptr += batch * key_stride_b + kv_head * key_stride_h
    first = 0
    if IS_CAUSAL:  # the first block of queries that sees any of these rows
        first = tl.program_id(0) * BLOCK_R // BLOCK_M * BLOCK_M
    total = tl.zeros([BLOCK_R], tl.float32)
    for group in range(num_groups):
        head = kv_head * num_groups + group
        own_query_ptr = query_ptr + batch * query_stride_b + head * query_stride_h
        own_mask_ptr = mask_ptr + batch * mask_stride_b + head * mask_stride_h
        own_lse_ptr = lse_ptr + (batch * tl.num_programs(1) * num_groups + head) * num_queries
        for start in range(first, num_queries, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            s = scores(
                own_query_ptr,
                key_ptr,
                own_mask_ptr,
                query_stride_m,
                key_stride_r,
                mask_stride_m,
                mask_stride_r,
                m,
                r,
                num_queries,
                num_rows,
                scale,
                IS_CAUSAL,
                HAS_MASK,
                HEAD_DIM,
                BLOCK_D,
            )
            lse = tl.load(own_lse_ptr + m, mask=m < num_queries, other=0.0)
            age = (num_queries - 1 - m).to(tl.float32)
            total += tl.sum(tl.exp2(s + (log2_decay * age - lse)[:, None]), axis=0)
    plane = batch * tl.num_programs(1) + kv_head
    tl.store(out_ptr + plane * num_rows + r, total / num_groups, mask=r < num_rows)


def column_sums(
    query: Tensor, key: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float, decay: float = 1.0
) -> Tensor:
    """[B, H_kv, R] fp32: weight each row received, summed over query rows, averaged over the query group.

    Query i of M counts decay ** (M - 1 - i); decay is above 0.

    Args:
        query: [B, H, M, D]; H is a multiple of H_kv.
        key: [B, H_kv, R, D].
        mask: additive, broadcasts to [B, H, M, R]; never together with `is_causal` (M == R, query i sees rows up to i).
    Raises:
        ValueError: values of a row that do not lie side by side.
    """
    num_batch, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_rows = key.shape[1:3]
    for part in (query, key):
        if part.stride(3) != 1:
            raise ValueError(f"the values of a row must lie side by side, strides are {part.stride()}")
    lse = query.new_empty(num_batch, num_heads, num_queries, dtype=torch.float32)
    out = query.new_empty(num_batch, num_kv_heads, num_rows, dtype=torch.float32)
    strides = (*query.stride()[:3], *key.stride()[:3])
    strides += (0, 0, 0, 0) if mask is None else mask.expand(num_batch, num_heads, num_queries, num_rows).stride()
    sizes = (num_queries, num_rows, num_heads // num_kv_heads, scale)
    block_m, block_r, options = blocks(query.dtype, head_dim)
    constants = {
        "IS_CAUSAL": is_causal,
        "HAS_MASK": mask is not None,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, power_of_two(head_dim)),
        "BLOCK_M": block_m,
        "BLOCK_R": block_r,
    }
    own_mask = query if mask is None else mask
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]  # see launch.py
        lse_kernel[triton.cdiv(num_queries, block_m), num_heads, num_batch](
            query, key, own_mask, lse, *strides, *sizes, **constants, **options
        )
        sums_kernel[triton.cdiv(num_rows, block_r), num_kv_heads, num_batch](
            query, key, own_mask, lse, out, *strides, *sizes, math.log2(decay), **constants, **options
        )
    return out


def blocks(dtype: torch.dtype, head_dim: int) -> tuple[int, int, dict[str, int]]:
    """Queries and rows of a program, and how it is launched. A rule, not measured: it spills no registers."""
    small = dtype == torch.float32 or head_dim > 128
    return (32, 32, {"num_warps": 4, "num_stages": 2}) if small else (64, 64, {"num_warps": 4, "num_stages": 3})

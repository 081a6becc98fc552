"""Output tokens attend to stored rows through the kernels of `decode.py` and `combine.py`: nothing is copied."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from codesign.engine.kernels.triton.combine import columns_kernel, combine_kernel
from codesign.engine.kernels.triton.decode import decode_kernel
from codesign.engine.kernels.triton.splits import (
    MAX_SPLITS,
    DecodeConfig,
    decode_config,
    num_processors,
    power_of_two,
)

_COLUMN_ROWS = 256  # a program of `columns_kernel`


def attend(
    query: Tensor,
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    *,
    codec: str = "native",
    counts: Tensor | None = None,
    num_tokens: int = 1,
    mask: Tensor | None = None,
    scale: float,
    want_columns: bool = False,
    config: DecodeConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q kᵀ · scale + mask) v, [B, H_kv, M, D] in the dtype of the query; queries that see no row get 0.

    Args:
        query: [B, H_kv, M, D], M = query group x num_tokens, tokens last.
        key, value: what is stored, views [B, H_kv, R, X]: "native" rows; or "int8" codes or "fp8" ones as uint8, then
            scales [B, H_kv, R, 1] that lie as the codes do.
        counts: [B] int32, rows of each sequence: its last token sees them all, the one before it one less, and so on.
            None: every query sees R rows. Beyond a count nothing is read.
        mask: additive, broadcasts to [B, H_kv, M, R].
        want_columns: also [B, H_kv, num_tokens, R] fp32, the weight each row received, averaged over the query group.
    Raises:
        ValueError: strides that the kernel cannot follow.
    """
    num_batch, num_heads, num_queries, head_dim = query.shape
    num_rows = key[0].shape[2]
    if config is None:
        config = decode_config(
            num_planes=num_batch * num_heads,
            num_queries=num_queries,
            num_rows=num_rows,
            head_dim=head_dim,
            dtype=query.dtype,
            num_processors=num_processors(query.device),
        )
    for part in (query, key[0], value[0]):
        if part.stride(3) != 1:
            raise ValueError(f"the values of a row must lie side by side, strides are {part.stride()}")
    for part in (key, value) if codec != "native" else ():
        code, of_row = part
        if any(code.stride(i) != head_dim * of_row.stride(i) for i in range(3) if code.shape[i] > 1):
            raise ValueError(f"scales must lie as their codes do: {of_row.stride()} beside {code.stride()}")
    mask = query if mask is None else mask.expand(num_batch, num_heads, num_queries, num_rows)
    has_mask = mask is not query
    planes = (num_batch, num_heads)
    found = query.new_empty(*planes, config.num_splits, num_queries, head_dim + 2, dtype=torch.float32)
    size = num_batch * num_heads * config.num_splits * num_queries
    sums, largest, total = found.view(-1).split((size * head_dim, size, size))
    scores = largest if not want_columns else query.new_empty(*planes, num_queries, num_rows, dtype=torch.float32)
    out = query.new_empty(query.shape)
    lse = query.new_empty(*planes, num_queries, dtype=torch.float32)
    columns = query.new_empty(*planes, num_tokens, num_rows, dtype=torch.float32) if want_columns else None
    block_d = max(16, power_of_two(head_dim))
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]  # see launch.py
        decode_kernel[config.num_splits, num_heads * triton.cdiv(num_queries, config.block_m), num_batch](
            query,
            key[0],
            value[0],
            key[-1],
            value[-1],
            query if counts is None else counts,
            mask,
            sums,
            largest,
            total,
            scores,
            *query.stride()[:3],
            *key[0].stride()[:3],
            *value[0].stride()[:3],
            *(mask.stride() if has_mask else (0, 0, 0, 0)),
            num_queries,
            num_tokens,
            num_rows,
            config.rows_per_split,
            0,
            config.num_splits,
            scale,
            CODEC=codec,
            HAS_COUNTS=counts is not None,
            HAS_MASK=has_mask,
            HAS_SCORES=want_columns,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK_M=config.block_m,
            BLOCK_R=config.block_r,
            **config.options(),
        )
        combine_kernel[num_queries, num_batch * num_heads](
            sums,
            largest,
            total,
            out,
            lse,
            num_queries,
            config.num_splits,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            MAX_SPLITS=MAX_SPLITS,
        )
        if columns is not None:
            columns_kernel[triton.cdiv(num_rows, _COLUMN_ROWS), num_heads * num_tokens, num_batch](
                scores,
                lse,
                query if counts is None else counts,
                columns,
                num_queries,
                num_tokens,
                num_rows,
                HAS_COUNTS=counts is not None,
                BLOCK_R=_COLUMN_ROWS,
            )
    return out, columns

"""Output tokens attend to stored rows through `decode.py`, `decode_int4.py` and `combine.py`: nothing is copied."""

import dataclasses
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from codesign.engine.kernels.triton.available import is_interpreted
from codesign.engine.kernels.triton.combine import columns_kernel, combine_kernel
from codesign.engine.kernels.triton.decode import decode_kernel
from codesign.engine.kernels.triton.decode_int4 import decode_int4_kernel
from codesign.engine.kernels.triton.splits import MAX_SPLITS, DecodeConfig, config_for, int4_is_read, power_of_two

_COLUMN_ROWS = 256  # a program of `columns_kernel`


def attend(
    query: Tensor,
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    *,
    codec: str = "native",
    counts: Tensor | None = None,
    table: Tensor | None = None,
    slots: Tensor | None = None,
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
        table: [B, H_kv, n] int32, side by side: rows lie in blocks, key and value are parts [num_blocks, H_kv, 32, X],
            and row r of a sequence's KV head h is row r % 32 of h in block table[b, h, r // 32]; R = 32 n. Any power of
            two will do for 32.
        slots: [B] int32, any order: the rows of each sequence are those of `key[slots[b]]`, of views [S, H_kv, R, X].
        mask: additive, broadcasts to [B, H_kv, M, R].
        want_columns: also [B, H_kv, num_tokens, R] fp32, the weight each row received, averaged over the query group.
        config: instead of the rule's.
    Raises:
        ValueError: strides that the kernel cannot follow.
    """
    num_batch, num_heads, num_queries, _ = query.shape
    num_rows = key[0].shape[2] * (1 if table is None else table.shape[2])
    config = config or config_for(query, num_rows)
    scores: Tensor | None = None
    if want_columns:
        scores = query.new_empty(num_batch, num_heads, num_queries, num_rows, dtype=torch.float32)
    found = _Found.room(query, config.num_splits)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]  # see launch.py
        _decode(query, key, value, codec, counts, table, slots, num_tokens, mask, scale, scores, config, found, 0)
        out, lse = found.combine(query)
        if scores is None:
            return out, None
        columns = scores.new_empty(num_batch, num_heads, num_tokens, num_rows)
        columns_kernel[triton.cdiv(num_rows, _COLUMN_ROWS), num_heads * num_tokens, num_batch](
            scores,
            lse,
            lse if counts is None else counts,
            columns,
            num_queries,
            num_tokens,
            num_rows,
            HAS_COUNTS=counts is not None,
            BLOCK_R=_COLUMN_ROWS,
        )
    return out, columns


def attend_int4(
    query: Tensor,
    encoded: Sequence[Tensor],
    num_encoded: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    *,
    group_size: int,
    most_encoded: int,
    num_tokens: int = 1,
    scale: float,
) -> Tensor:
    """The same for tokens in int4 groups, then native rows; one softmax over both.

    Args:
        encoded: contiguous codes [B, H_kv, T, D / 2], steps and lows [B, H_kv, T / group_size, D] of the keys; codes,
            steps and lows [B, H_kv, T, D / channels] of the values.
        num_encoded: [B] int32 tokens of each sequence that lie in groups, whole ones; none is above `most_encoded`.
        key, value: [B, H_kv, R, D] views of the rows after them.
        counts: [B] int32, of those rows, as in `attend`.
    Raises:
        ValueError: sizes for which `int4_is_read` is False, or strides that the kernel cannot follow.
    """
    num_batch, num_heads, num_queries, head_dim = query.shape
    channels = head_dim // encoded[-1].shape[3]
    if not int4_is_read(head_dim=head_dim, group_size=group_size, channels=channels):
        raise ValueError(f"int4 groups of {group_size} tokens and {channels} of {head_dim} channels are not read here")
    if not all(part.is_contiguous() for part in encoded) or query.stride(3) != 1:
        raise ValueError("int4 groups must be contiguous, and so must each query")
    over_rows, over_groups = config_for(query, key.shape[2]), config_for(query, most_encoded, most_at_once=group_size)
    found = _Found.room(query, over_rows.num_splits + over_groups.num_splits)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]  # see launch.py
        decode_int4_kernel[
            over_groups.num_splits, num_heads * triton.cdiv(num_queries, over_groups.block_m), num_batch
        ](
            query,
            *encoded,
            num_encoded,
            found.sums,
            found.largest,
            found.total,
            *query.stride()[:3],
            num_queries,
            encoded[0].shape[2],
            over_groups.rows_per_split,
            0,
            found.num_splits,
            scale,
            GROUP=group_size,
            CHANNELS=channels,
            HEAD_DIM=head_dim,
            BLOCK_M=over_groups.block_m,
            BLOCK_R=over_groups.block_r,
            **over_groups.options(),
        )
        _decode(
            query, (key,), (value,), "native", counts, None, None, num_tokens, None, scale, None, over_rows, found,
            over_groups.num_splits,
        )  # fmt: skip
        return found.combine(query)[0]


@dataclasses.dataclass(frozen=True)
class _Found:
    """What the splits find, fp32, contiguous [B, H_kv, splits, M]: `sums` of weighted values with D more."""

    sums: Tensor
    largest: Tensor
    total: Tensor
    num_splits: int

    @classmethod
    def room(cls, query: Tensor, num_splits: int) -> "_Found":
        num_batch, num_heads, num_queries, head_dim = query.shape
        shape = (num_batch, num_heads, num_splits, num_queries)
        largest, total = (query.new_empty(shape, dtype=torch.float32) for _ in range(2))
        return cls(query.new_empty(*shape, head_dim, dtype=torch.float32), largest, total, num_splits)

    def combine(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Output as large as the query, and lse [B, H_kv, M]."""
        num_batch, num_heads, num_queries, head_dim = query.shape
        out, lse = query.new_empty(query.shape), self.total.new_empty(query.shape[:3])
        combine_kernel[num_queries, num_batch * num_heads](
            self.sums,
            self.largest,
            self.total,
            out,
            lse,
            num_queries,
            self.num_splits,
            HEAD_DIM=head_dim,
            BLOCK_D=max(16, power_of_two(head_dim)),
            MAX_SPLITS=2 * MAX_SPLITS,
        )
        return out, lse


def _decode(
    query: Tensor,
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    codec: str,
    counts: Tensor | None,
    table: Tensor | None,
    slots: Tensor | None,
    num_tokens: int,
    mask: Tensor | None,
    scale: float,
    scores: Tensor | None,
    config: DecodeConfig,
    found: _Found,
    first_split: int,
) -> None:
    """Rows that are encoded one by one, into the splits from `first_split` on."""
    num_batch, num_heads, num_queries, head_dim = query.shape
    block_rows = key[0].shape[2]
    num_rows = block_rows * (1 if table is None else table.shape[2])
    for rows in (query, key[0], value[0]):
        if rows.stride(3) != 1:
            raise ValueError(f"the values of a row must lie side by side, strides are {rows.stride()}")
    for code, *scales in (key, value):
        for own in scales:
            if any(code.stride(dim) != head_dim * own.stride(dim) for dim in range(3) if code.shape[dim] > 1):
                raise ValueError(f"scales must lie as their codes do: {own.stride()} beside {code.stride()}")
            if head_dim % 2 or code.data_ptr() % 2:
                raise ValueError("codes are read two at a time, so that they must begin at an even address and be even")
    absent = query  # a tensor that the kernel does not touch
    table_strides: tuple[int, ...] = (0, 0)
    if table is not None:
        table_strides = table.stride()[:2]
        is_side_by_side = table.shape[2] < 2 or table.stride(2) == 1
        if not is_side_by_side or not key[0].is_contiguous() or not value[0].is_contiguous():
            raise ValueError("blocks must be contiguous, and so must each table")
        if block_rows != power_of_two(block_rows) or key[0].shape != value[0].shape:
            raise ValueError(f"blocks of {block_rows} rows, keys {key[0].shape[1:]}, values {value[0].shape[1:]}")
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        mask_strides = mask.expand(num_batch, num_heads, num_queries, num_rows).stride()
    decode_kernel[config.num_splits, num_heads * triton.cdiv(num_queries, config.block_m), num_batch](
        query,
        key[0],
        value[0],
        key[-1],
        value[-1],
        absent if counts is None else counts,
        absent if table is None else table,
        absent if slots is None else slots,
        absent if mask is None else mask,
        found.sums,
        found.largest,
        found.total,
        absent if scores is None else scores,
        *query.stride()[:3],
        *key[0].stride()[:3],
        *value[0].stride()[:3],
        *table_strides,
        *mask_strides,
        num_queries,
        num_tokens,
        num_rows,
        config.rows_per_split,
        first_split,
        found.num_splits,
        scale,
        CODEC=codec,
        HAS_COUNTS=counts is not None,
        TABLE_ROWS=0 if table is None else block_rows,
        HAS_SLOTS=slots is not None,
        HAS_MASK=mask is not None,
        HAS_SCORES=scores is not None,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16 if codec == "native" else 32, power_of_two(head_dim)),
        BLOCK_M=config.block_m,
        BLOCK_R=config.block_r,
        HAS_ASM=not is_interpreted(),
        **config.options(),
    )

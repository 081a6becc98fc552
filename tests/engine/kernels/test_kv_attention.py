"""The attention kernel over rows in blocks, and over values that are not finite, beside a softmax in float64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from codesign.engine.kernels import kv_attention
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.kv_attention import BLOCK, KVAttention, Queries
from codesign.registry import KV_CODECS

FOUND = kv_attention.load()
pytestmark = pytest.mark.skipif(isinstance(FOUND, Missing), reason=str(FOUND))
NUM_KV_HEADS = 2
# Of values about 1: sums are fp32, what comes out is rounded to the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def kernel() -> KVAttention:
    assert isinstance(FOUND, KVAttention)
    return FOUND


def queries_of(
    lengths: Sequence[int], *, num_tokens: int, num_groups: int, head_dim: int, dtype: torch.dtype, columns: bool
) -> tuple[Tensor, Queries]:
    """Queries that see lengths[b] rows before theirs, and what the kernel takes."""
    shape = (len(lengths), NUM_KV_HEADS, num_groups * num_tokens, head_dim)
    query = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    num_rows = max(lengths) + num_tokens
    return query, Queries(
        query, lengths, num_tokens=num_tokens, num_rows=num_rows, scale=head_dim**-0.5, want_weights=columns
    )


def expected(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], *, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """out [B, H_kv, M, D] and weights [B, H_kv, M, R] from rows [B, H_kv, R, D], all float64."""
    num_rows = max(lengths) + num_tokens
    key, value = key[:, :, :num_rows].double(), value[:, :, :num_rows].double()
    score = query.double() @ key.mT * query.shape[3] ** -0.5
    token = torch.arange(num_tokens).repeat(query.shape[2] // num_tokens)[:, None]
    for batch, length in enumerate(lengths):
        score[batch].masked_fill_(torch.arange(num_rows) > length + token, float("-inf"))
    weight = score.softmax(dim=-1)
    return weight @ value, weight


def in_blocks(rows: Tensor, *, is_shared: bool) -> tuple[Tensor, Tensor]:
    """Rows [B, H_kv, R, X] as shuffled blocks [num_blocks, H_kv, 32, X] and the table that finds them again.

    Shared: one table for all heads of a sequence, stride 0. Otherwise each head has blocks of its own, in which the
    other heads' rows are not numbers.
    """
    num_slots, num_heads, num_rows, size = rows.shape
    num_blocks = -(-num_rows // BLOCK)
    padded = rows.new_zeros(num_slots, num_heads, num_blocks * BLOCK, size)
    padded[:, :, :num_rows] = rows
    parts = padded.view(num_slots, num_heads, num_blocks, BLOCK, size)
    own_heads = 1 if is_shared else num_heads
    ids = torch.randperm(num_slots * own_heads * num_blocks, generator=torch.Generator().manual_seed(2))
    table = ids.to(torch.int32).view(num_slots, own_heads, num_blocks)
    stored = torch.full((len(ids), num_heads, BLOCK, size), 113 if not rows.is_floating_point() else float("nan"))
    stored = stored.to(rows.dtype)
    for head in range(num_heads):
        stored[table[:, head % own_heads].long().view(-1), head] = parts[:, head].reshape(-1, BLOCK, size)
    return stored, table.expand(-1, num_heads, -1)


@pytest.mark.parametrize("is_shared", [True, False], ids=["table per sequence", "table per head"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("head_dim", "num_groups", "num_tokens"), [(64, 1, 1), (128, 4, 3), (64, 8, 2), (96, 7, 1)])
@pytest.mark.parametrize("lengths", [[0, 30, 31, 32], [63, 64, 5], [400, 1]], ids=str)
def test_rows_in_blocks_give_what_a_softmax_over_them_gives(
    lengths: list[int], head_dim: int, num_groups: int, num_tokens: int, dtype: torch.dtype, is_shared: bool
) -> None:
    query, queries = queries_of(
        lengths, num_tokens=num_tokens, num_groups=num_groups, head_dim=head_dim, dtype=dtype, columns=True
    )
    shape = (2, len(lengths), NUM_KV_HEADS, max(lengths) + num_tokens, head_dim)
    key, value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored_key, table = in_blocks(key, is_shared=is_shared)
    stored_value, _ = in_blocks(value, is_shared=is_shared)
    kernel().paged(queries, table, stored_key, stored_value)
    out, weight = expected(query, key, value, lengths, num_tokens=num_tokens)

    torch.testing.assert_close(queries.out.double(), out, rtol=0, atol=TOLERANCE[dtype])
    assert queries.weights is not None
    torch.testing.assert_close(queries.weights.double(), weight, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("codec", ["int8", "fp8"])
@pytest.mark.parametrize("is_shared", [True, False])
def test_encoded_rows_in_blocks_give_what_they_give_one_after_the_other(codec: str, is_shared: bool) -> None:
    lengths, shape = [0, 31, 32, 100], (4, NUM_KV_HEADS, 102, 64)
    rows = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    key, value = (KV_CODECS.create(codec).encode(part) for part in rows)
    outs = []
    for is_paged in (True, False):
        _, queries = queries_of(lengths, num_tokens=2, num_groups=3, head_dim=64, dtype=torch.bfloat16, columns=False)
        if is_paged:
            blocks = [[in_blocks(part, is_shared=is_shared) for part in parts] for parts in (key, value)]
            stored = [[part for part, _ in parts] for parts in blocks]
            kernel().paged_rows(codec, queries, blocks[0][0][1], *stored)
        else:
            kernel().rows(codec, queries, key, value)
        outs.append(queries.out)

    assert torch.equal(*outs)


def test_two_sequences_may_share_blocks() -> None:
    lengths = [70, 40]
    query, queries = queries_of(lengths, num_tokens=1, num_groups=2, head_dim=64, dtype=torch.float32, columns=False)
    key, value = torch.randn(2, 4, NUM_KV_HEADS, BLOCK, 64, generator=torch.Generator().manual_seed(0))
    table = torch.tensor([[2, 0, 3], [2, 1, 0]], dtype=torch.int32)
    kernel().paged(queries, table[:, None].expand(-1, NUM_KV_HEADS, -1), key, value)
    rows = [part[table.long()].transpose(1, 2).flatten(2, 3) for part in (key, value)]
    out, _ = expected(query, rows[0], rows[1], lengths, num_tokens=1)

    torch.testing.assert_close(queries.out.double(), out, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("first", [0, 40], ids=["a whole block", "among others"])
def test_nan_in_is_nan_out_and_only_for_queries_that_see_it(first: int, dtype: torch.dtype) -> None:
    shape = (2, 1, NUM_KV_HEADS, 102, 64)
    key, value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    key[:, 0, first : first + BLOCK] = float("nan")
    _, queries = queries_of([100], num_tokens=1, num_groups=2, head_dim=64, dtype=dtype, columns=False)
    kernel().native(queries, [[0, 102]], key, value)

    assert queries.out[:, 0].isnan().all()
    assert queries.out[:, 1].isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_of_weight_zero_add_nothing(dtype: torch.dtype) -> None:
    """Scores of -inf, of a whole first block too."""
    shape = (2, 1, NUM_KV_HEADS, 102, 64)
    key, value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    query, queries = queries_of([100], num_tokens=1, num_groups=2, head_dim=64, dtype=dtype, columns=False)
    del queries
    query = query.abs()
    key[:, :, :50, 3] = float("-inf")
    queries = Queries(query, [100], num_tokens=1, num_rows=101, scale=0.125, want_weights=False)
    kernel().native(queries, [[0, 102]], key, value)
    out, _ = expected(query, key, value, [100], num_tokens=1)

    torch.testing.assert_close(queries.out.double(), out, rtol=0, atol=TOLERANCE[dtype])

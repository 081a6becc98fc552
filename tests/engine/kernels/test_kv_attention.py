"""The attention kernel over rows in blocks, and over values that are not finite, beside a softmax in float64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from codesign.engine.attention.fold import fold, unfold
from codesign.engine.kernels import kv_attention
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.kv_attention import BLOCK, KVAttention, Queries, row_starts
from codesign.engine.kv.codec import Parts
from codesign.engine.kv.codecs import int4
from codesign.registry import KV_CODECS

FOUND = kv_attention.load()
pytestmark = pytest.mark.skipif(isinstance(FOUND, Missing), reason=str(FOUND))
NUM_KV_HEADS = 2
# Of values about 1: sums are fp32, what comes out is rounded to the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Of weights up to 1; where products are bf16, columns go through fp16.
COLUMN_TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 3e-4}


def kernel() -> KVAttention:
    assert isinstance(FOUND, KVAttention)
    return FOUND


def queries_of(
    lengths: Sequence[int], *, num_tokens: int, num_groups: int, head_dim: int, dtype: torch.dtype, columns: bool
) -> tuple[Tensor, Queries]:
    """Queries [B, H_kv, M, D] that see lengths[b] rows before theirs, and what the kernel takes."""
    shape = (len(lengths), NUM_KV_HEADS, num_groups * num_tokens, head_dim)
    query = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    num_rows = max(lengths) + num_tokens
    return query, Queries(
        unfold(query, num_queries=num_tokens),
        lengths,
        num_kv_heads=NUM_KV_HEADS,
        num_tokens=num_tokens,
        num_rows=num_rows,
        scale=head_dim**-0.5,
        want_columns=columns,
    )


def one_token(query: Tensor) -> Queries:
    """query [1, H_kv, M, D] of one token that sees 101 rows."""
    heads = unfold(query, num_queries=1)
    return Queries(heads, [100], num_kv_heads=NUM_KV_HEADS, num_tokens=1, num_rows=101, scale=0.125, want_columns=False)


def out_of(queries: Queries) -> Tensor:
    """[B, H_kv, M, D]"""
    return fold(queries.out, num_queries=queries.struct.num_tokens, num_kv_heads=NUM_KV_HEADS)


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

    torch.testing.assert_close(out_of(queries).double(), out, rtol=0, atol=TOLERANCE[dtype])
    columns = weight.view(*weight.shape[:2], num_groups, num_tokens, -1).mean(dim=2)
    assert queries.columns is not None
    torch.testing.assert_close(queries.columns.double(), columns, rtol=0, atol=COLUMN_TOLERANCE[dtype])


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
        outs.append(out_of(queries))

    assert torch.equal(*outs)


def test_two_sequences_may_share_blocks() -> None:
    lengths = [70, 40]
    query, queries = queries_of(lengths, num_tokens=1, num_groups=2, head_dim=64, dtype=torch.float32, columns=False)
    key, value = torch.randn(2, 4, NUM_KV_HEADS, BLOCK, 64, generator=torch.Generator().manual_seed(0))
    table = torch.tensor([[2, 0, 3], [2, 1, 0]], dtype=torch.int32)
    kernel().paged(queries, table[:, None].expand(-1, NUM_KV_HEADS, -1), key, value)
    rows = [part[table.long()].transpose(1, 2).flatten(2, 3) for part in (key, value)]
    out, _ = expected(query, rows[0], rows[1], lengths, num_tokens=1)

    torch.testing.assert_close(out_of(queries).double(), out, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("first", [0, 40], ids=["a whole block", "among others"])
def test_nan_in_is_nan_out_and_only_for_queries_that_see_it(first: int, dtype: torch.dtype) -> None:
    shape = (2, 1, NUM_KV_HEADS, 102, 64)
    key, value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    key[:, 0, first : first + BLOCK] = float("nan")
    _, queries = queries_of([100], num_tokens=1, num_groups=2, head_dim=64, dtype=dtype, columns=False)
    kernel().native(queries, key, value)

    assert out_of(queries)[:, 0].isnan().all()
    assert out_of(queries)[:, 1].isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_of_weight_zero_add_nothing(dtype: torch.dtype) -> None:
    """Scores of -inf, of a whole first block too."""
    shape = (2, 1, NUM_KV_HEADS, 102, 64)
    key, value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    query, queries = queries_of([100], num_tokens=1, num_groups=2, head_dim=64, dtype=dtype, columns=False)
    del queries
    query = query.abs()
    key[:, :, :50, 3] = float("-inf")
    queries = one_token(query)
    kernel().native(queries, key, value, row_starts([0, 102]))
    out, _ = expected(query, key, value, [100], num_tokens=1)

    torch.testing.assert_close(out_of(queries).double(), out, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("head_dim", "num_groups"), [(64, 4), (128, 9), (96, 1)])
def test_what_lies_after_the_last_row_is_not_read(head_dim: int, num_groups: int, dtype: torch.dtype) -> None:
    lengths = list(range(70))
    shape = (2, len(lengths), NUM_KV_HEADS, 80, head_dim)
    key, value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    query, queries = queries_of(
        lengths, num_tokens=1, num_groups=num_groups, head_dim=head_dim, dtype=dtype, columns=False
    )
    out, _ = expected(query, key, value, lengths, num_tokens=1)
    for slot, length in enumerate(lengths):
        key[slot, :, length + 1 :] = value[slot, :, length + 1 :] = float("nan")
    kernel().native(queries, key, value)

    torch.testing.assert_close(out_of(queries).double(), out, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("decay", [1.0, 0.75])
@pytest.mark.parametrize("num_groups", [1, 4, 5, 9])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_scores_get_the_weights_of_their_rows(dtype: torch.dtype, num_groups: int, decay: float) -> None:
    """Beside `columns`; first from slot to slot, then from where each head's rows begin, in another order."""
    lengths = [0, 17, 99, 2100, 31, 1024]
    shape = (2, len(lengths), NUM_KV_HEADS, 2102, 64)
    key, value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    knobs = {"num_tokens": 1, "num_groups": num_groups, "head_dim": 64, "dtype": dtype}
    query, reference = queries_of(lengths, **knobs, columns=True)
    kernel().native(reference, key, value)
    assert reference.columns is not None
    before = torch.rand(shape[1:4], generator=torch.Generator().manual_seed(2))
    expected = before.clone()
    for slot, length in enumerate(lengths):
        seen = expected[slot, :, : length + 1]
        seen.mul_(decay).add_(reference.columns[slot, :, 0, : length + 1])
    order = [3, 0, 5, 4, 1, 2]
    first = row_starts((slot * NUM_KV_HEADS + head) * 2102 for slot in order for head in range(NUM_KV_HEADS))

    for slots, starts in ((list(range(6)), None), (order, first)):
        scores = before.clone()
        queries = Queries(
            unfold(query[slots], num_queries=1),
            [lengths[slot] for slot in slots],
            num_kv_heads=NUM_KV_HEADS,
            num_tokens=1,
            num_rows=2101,
            scale=0.125,
            want_columns=False,
            scores=scores,
            decay=decay,
        )
        kernel().native(queries, key, value, starts)
        assert torch.equal(out_of(queries), out_of(reference)[slots])
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
        for slot, length in enumerate(lengths):
            assert torch.equal(scores[slot, :, length + 1 :], before[slot, :, length + 1 :])


# Largest error of the bf16 kernel beside the 256-bit one, which multiplies in fp32, of outputs up to about 1: int8 rows
# meet 16-bit integers, others bf16.
NEAR = {"native": 4e-3, "int8": 3e-4, "fp8": 4e-3, "int4": 1e-2}


def run_encoded(codec: str, queries: Queries, key: Tensor, value: Tensor, lengths: Sequence[int]) -> None:
    """Lets queries attend to rows [B, H_kv, R, D], encoded here; R a multiple of 32."""
    if codec == "native":
        kernel().native(queries, key, value)
    elif codec == "int4":
        planes, (num_rows, dim) = key.shape[:2], key.shape[2:]
        code, step, low = int4._quantize(key.reshape(*planes, -1, 32, dim), dim=3)
        keys = [int4._pack(code.flatten(2, 3)), step.squeeze(3), low.squeeze(3)]
        code, step, low = int4._quantize(value.reshape(*planes, num_rows, -1, 32), dim=4)
        values = [int4._pack(code.flatten(3, 4)), step.squeeze(4), low.squeeze(4)]
        num_encoded = [length // 32 * 32 for length in lengths]
        rest = [
            torch.stack([own[:, start : start + 64] for own, start in zip(part, num_encoded, strict=True)])
            for part in (torch.nn.functional.pad(key, (0, 0, 0, 64)), torch.nn.functional.pad(value, (0, 0, 0, 64)))
        ]
        kernel().int4(queries, num_encoded, [*keys, *values], rest[0], rest[1], group_size=32)
    else:
        encode = KV_CODECS.create(codec).encode
        kernel().rows(codec, queries, encode(key), encode(value))


@pytest.mark.parametrize(("head_dim", "num_groups", "num_tokens"), [(64, 7, 1), (128, 4, 3), (64, 1, 1), (192, 9, 1)])
@pytest.mark.parametrize("lengths", [[0, 30, 31], [32, 63, 100], [1023, 1500, 1024]], ids=str)
@pytest.mark.parametrize("codec", NEAR)
def test_queries_in_bf16_stay_near_what_fp32_gives(
    codec: str, lengths: list[int], head_dim: int, num_groups: int, num_tokens: int
) -> None:
    if isinstance(kernel().bf16, Missing):
        pytest.skip(kernel().bf16.reason)
    assert kernel().is_bf16(codec, head_dim=head_dim, dtype=torch.bfloat16)
    num_rows = (max(lengths) + num_tokens + 31) // 32 * 32
    shape = (2, len(lengths), NUM_KV_HEADS, num_rows, head_dim)
    key, value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        query = torch.randn(*shape[1:3], num_groups * num_tokens, head_dim, generator=torch.Generator().manual_seed(1))
        queries = Queries(
            unfold(query.bfloat16().to(dtype), num_queries=num_tokens),
            lengths,
            num_kv_heads=NUM_KV_HEADS,
            num_tokens=num_tokens,
            num_rows=max(lengths) + num_tokens,
            scale=head_dim**-0.5,
            want_columns=True,
        )
        run_encoded(codec, queries, key, value, lengths)
        assert queries.columns is not None
        found.append((queries.out, queries.columns))
    (out, columns), (plain, plain_columns) = found

    torch.testing.assert_close(out.float(), plain, rtol=2**-8, atol=NEAR[codec])  # rounded to bf16 at the end
    torch.testing.assert_close(columns, plain_columns, rtol=0, atol=max(3e-4, NEAR[codec] / 4))
    torch.testing.assert_close(columns.sum(dim=-1), torch.ones(columns.shape[:-1]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("codec", NEAR)
def test_threads_change_no_bit_of_long_rows(codec: str) -> None:
    lengths, before, outs = [2500, 40], torch.get_num_threads(), []
    key, value = torch.randn(2, 2, NUM_KV_HEADS, 2528, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            _, queries = queries_of(
                lengths, num_tokens=1, num_groups=7, head_dim=64, dtype=torch.bfloat16, columns=False
            )
            run_encoded(codec, queries, key, value, lengths)
            outs.append(out_of(queries))
    finally:
        torch.set_num_threads(before)

    assert torch.equal(*outs)


def test_neither_threads_nor_neighbours_change_a_bit_however_planes_share_rooms() -> None:
    """More planes than rooms, of one part and of several, in two tiles of queries, with their weights."""
    lengths, num_tokens, before, found = [2500, 40, 1100, 7, 1021, 3000], 3, torch.get_num_threads(), []
    shape = (2, len(lengths), NUM_KV_HEADS, 3003, 64)
    key, value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    query = torch.randn(len(lengths) * num_tokens, 8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()

    def attend(first: int, last: int) -> tuple[Tensor, Tensor]:
        queries = Queries(
            query[first * num_tokens : last * num_tokens],
            lengths[first:last],
            num_kv_heads=NUM_KV_HEADS,
            num_tokens=num_tokens,
            num_rows=3003,
            scale=0.125,
            want_columns=True,
        )
        kernel().native(queries, key[first:last], value[first:last])
        assert queries.columns is not None
        return queries.out, queries.columns

    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            found.append(attend(0, len(lengths)))
    finally:
        torch.set_num_threads(before)
    alone = [attend(index, index + 1) for index in range(len(lengths))]

    for kind in range(2):
        together = torch.cat([own[kind] for own in alone])
        assert all(torch.equal(own[kind], together) for own in found)


@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_a_row_that_was_nan_when_it_was_encoded_gives_nan(codec: str, part: str) -> None:
    rows = torch.randn(2, 1, NUM_KV_HEADS, 101, 64, generator=torch.Generator().manual_seed(0))
    parts: list[Parts] = [KV_CODECS.create(codec).encode(own) for own in rows]
    parts[("key", "value").index(part)][1][0, 0, 50] = float("nan")
    _, queries = queries_of([100], num_tokens=1, num_groups=2, head_dim=64, dtype=torch.bfloat16, columns=False)
    kernel().rows(codec, queries, *parts)

    assert out_of(queries)[:, 0].isnan().all()
    assert out_of(queries)[:, 1].isfinite().all()


def test_a_query_that_is_not_finite_spoils_no_other_over_int8_rows() -> None:
    rows = torch.randn(2, 1, NUM_KV_HEADS, 101, 64, generator=torch.Generator().manual_seed(0))
    key, value = (KV_CODECS.create("int8").encode(own) for own in rows)
    query = torch.ones(1, NUM_KV_HEADS, 3, 64, dtype=torch.bfloat16)
    query[0, 0, 1, 5] = float("inf")
    queries = one_token(query)
    kernel().rows("int8", queries, key, value)

    assert not out_of(queries)[0, 0, 1].isfinite().any()
    assert out_of(queries)[0, 0, ::2].isfinite().all()
    assert out_of(queries)[0, 1].isfinite().all()


def test_the_bf16_kernel_is_there_where_the_machine_has_its_instructions() -> None:
    """A source that does not compile would otherwise only skip the tests above."""
    has = torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported()
    is_wanted = has and torch.backends.cpu.get_cpu_capability() == "AVX512"

    assert isinstance(kernel().bf16, Missing) != is_wanted, kernel().bf16


def test_kernels_are_named_by_what_they_multiply() -> None:
    found = KVAttention(kernel().library, kernel().library)  # as where both are there

    assert found.name("int8", head_dim=64, dtype=torch.float32) == "codesign::attend_int8"
    assert found.name("int8", head_dim=64, dtype=torch.bfloat16) == "codesign::attend_int8_bf16"
    assert found.name("int4", head_dim=96, dtype=torch.bfloat16, group_size=32) == "codesign::attend_int4"
    assert found.name("int4", head_dim=64, dtype=torch.bfloat16, group_size=16) == "codesign::attend_int4"
    assert found.beats_sdpa(head_dim=64, dtype=torch.bfloat16)
    assert not KVAttention(kernel().library, Missing("none")).beats_sdpa(head_dim=64, dtype=torch.bfloat16)

"""Attention over stored rows against a float64 softmax over them; what is not there is NaN or the largest code.

D 64 and 128 (and one that is no power of two), query groups of 1, 4 and 8, one token and four, rows 0, 1 and around the
edges of a block and of a split.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from codesign.engine.attention.weights import column_sums as plain_column_sums
from codesign.engine.kernels.triton.attend import attend, attend_int4
from codesign.engine.kernels.triton.column_sums import column_sums
from codesign.engine.kernels.triton.splits import DecodeConfig, decode_config

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Outputs are rounded once to their dtype, and so are the softmax weights.
RTOL = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
ATOL = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
CONFIG = DecodeConfig(block_m=16, block_r=32, rows_per_split=64, num_splits=2)
COUNTS = [0, 1, 31, 32, 33, 64, 65, 96]
NUM_ROWS = 96  # of the longest


def expected(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Output and columns; `visible` broadcasts to [B, H_kv, M, R]."""
    score = (query.double() @ key.double().mT * scale).masked_fill(~visible, -torch.inf)
    weight = score.softmax(dim=-1).nan_to_num(0)
    columns = weight.view(*key.shape[:2], -1, num_tokens, key.shape[2]).mean(dim=2)
    return weight @ value.double(), columns


def visible_rows(counts: Tensor, num_queries: int, num_tokens: int, num_rows: int) -> Tensor:
    token = torch.arange(num_queries) % num_tokens
    seen = counts[:, None] - (num_tokens - 1 - token)  # [B, M]
    return (torch.arange(num_rows) < seen[..., None])[:, None]


def stored(rows: Tensor, counts: Tensor, behind: float) -> Tensor:
    """[B, H_kv, R, X] as views of a larger cache in which everything beyond the counts is `behind`."""
    num_batch, num_heads, num_rows, width = rows.shape
    cache = torch.full((num_batch + 1, num_heads, num_rows + 7, width), behind, dtype=torch.float32).to(rows.dtype)
    for batch, count in enumerate(counts.tolist()):
        cache[1 + batch, :, :count] = rows[batch, :, :count]
    return cache[1:, :, :num_rows]


@pytest.mark.parametrize(
    ("head_dim", "num_groups", "num_tokens", "dtype"),
    [
        (64, 1, 4, torch.float32),
        (64, 8, 1, torch.bfloat16),
        (64, 8, 1, torch.float16),
        (128, 4, 1, torch.float32),
        (128, 4, 1, torch.bfloat16),
        (128, 1, 1, torch.bfloat16),
        (128, 4, 4, torch.float16),
        (24, 2, 4, torch.float32),
        (24, 2, 4, torch.bfloat16),
    ],
)
def test_ragged_rows(head_dim: int, num_groups: int, num_tokens: int, dtype: torch.dtype) -> None:
    counts = torch.tensor(COUNTS, dtype=torch.int32)
    rows = torch.randn(2, len(COUNTS), 1, NUM_ROWS, head_dim).to(dtype)
    query = torch.randn(len(COUNTS), 1, num_groups * num_tokens, head_dim).to(dtype)
    key, value = (stored(part, counts, torch.nan) for part in rows)
    visible = visible_rows(counts, query.shape[2], num_tokens, NUM_ROWS)

    out, columns = attend(
        query, (key,), (value,), counts=counts, num_tokens=num_tokens, scale=0.2, want_columns=True, config=CONFIG
    )

    wanted, wanted_columns = expected(query, *rows, visible, 0.2, num_tokens)
    assert out.dtype == dtype and columns is not None
    torch.testing.assert_close(out.double(), wanted, rtol=RTOL[dtype], atol=ATOL[dtype])
    torch.testing.assert_close(columns.double(), wanted_columns, rtol=0, atol=1e-6)
    assert not out[0].any() and not columns[0].any()  # no rows at all


def int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = (rows.float().abs().amax(dim=-1, keepdim=True) / 127).bfloat16()
    return (rows.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = (rows.float().abs().amax(dim=-1, keepdim=True) / 448).bfloat16()
    return (rows.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8), scale


def decoded(parts: tuple[Tensor, Tensor]) -> Tensor:
    code, scale = parts
    return (code if code.dtype == torch.int8 else code.view(torch.float8_e4m3fn)).double() * scale.double()


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1.0), (torch.bfloat16, 1e3), (torch.float16, 1.0), (torch.float16, 1e-4), (torch.float16, 1e3)],
)
@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_rows_of_codes_with_a_scale_each(codec: str, dtype: torch.dtype, size: float) -> None:
    """Values small enough that their scales times weights would vanish in fp16; rows of very unequal size."""
    counts = torch.tensor([1, 33, 96], dtype=torch.int32)
    rows = torch.randn(2, 3, 2, NUM_ROWS, 64) * torch.rand(NUM_ROWS, 1)
    rows[1] *= size
    encode = int8 if codec == "int8" else fp8
    key, value = (
        tuple(stored(part, counts, torch.inf if part.is_floating_point() else 127) for part in encode(own))
        for own in rows
    )
    query = torch.randn(3, 2, 4, 64).to(dtype)
    visible = visible_rows(counts, 4, 1, NUM_ROWS)

    out, columns = attend(query, key, value, codec=codec, counts=counts, scale=0.2, want_columns=True, config=CONFIG)

    wanted, wanted_columns = expected(query, decoded(encode(rows[0])), decoded(encode(rows[1])), visible, 0.2, 1)
    assert columns is not None
    torch.testing.assert_close(out.double() / size, wanted / size, rtol=RTOL[dtype], atol=ATOL[dtype])
    torch.testing.assert_close(columns.double(), wanted_columns, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_every_code_is_read_exactly(codec: str, dtype: torch.dtype) -> None:
    """As the low and as the high half of a word."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes.view(torch.int8) if codec == "int8" else codes[(codes & 127) != 127]
    both = torch.cat([codes, codes.roll(1)]).view(1, 1, 1, -1)
    scale = torch.ones(1, 1, 1, 1).bfloat16()

    out, _ = attend(torch.ones_like(both, dtype=dtype), (both, scale), (both, scale), codec=codec, scale=1.0)

    assert torch.equal(out.double(), decoded((both, scale)))


def test_large_and_tiny_queries_meet_codes_as_small_ones_do() -> None:
    """Products of codes are in fp16, far outside of whose range these queries lie; bf16 has the range of fp32."""
    rows = torch.randn(2, 1, 1, 40, 64)
    key, value = (int8(part) for part in rows)
    query = torch.randn(1, 1, 4, 64).bfloat16()
    found = [attend(query * size, key, value, codec="int8", scale=0.2 / size)[0] for size in (1.0, 2.0**30, 2.0**-30)]

    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])


def test_codes_at_odd_addresses_are_refused() -> None:
    codes, scale = torch.zeros(257, dtype=torch.int8)[1:].view(1, 1, 4, 64), torch.ones(1, 1, 4, 1).bfloat16()

    with pytest.raises(ValueError, match="even address"):
        attend(torch.ones(1, 1, 4, 64), (codes, scale), (codes, scale), codec="int8", scale=1.0)


def int4(rows: Tensor, group_size: int, channels: int, dim: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Codes, steps and lows over groups of tokens (dim 2) or channels (dim 3), and what they mean."""
    wide = rows.unflatten(dim, (-1, group_size if dim == 2 else channels))
    low = wide.amin(dim=dim + 1, keepdim=True).half()
    step = ((wide.amax(dim=dim + 1, keepdim=True) - low.float()) / 15).half()
    code = ((wide - low.float()) / step.float().clamp_min(1e-30)).round().clamp(0, 15)
    meant = (low.double() + code.double() * step.double()).flatten(dim, dim + 1)
    first, second = code.to(torch.uint8).flatten(dim, dim + 1).chunk(2, dim=3)
    return (first | (second << 4), step.squeeze(dim + 1), low.squeeze(dim + 1)), meant


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "group_size", "num_tokens"), [(128, 32, 1), (64, 64, 3), (32, 16, 1)])
def test_int4_groups_then_native_rows(dtype: torch.dtype, head_dim: int, group_size: int, num_tokens: int) -> None:
    """Keys with a few channels that are large for every token; sequences with no group, and with little else."""
    groups, counts = torch.tensor([0, 1, 3]), torch.tensor([5, num_tokens, 40], dtype=torch.int32)
    rows = torch.randn(2, 3, 2, 3 * group_size, head_dim) * 0.5
    rows[0, ..., ::16] += 6
    rows[1, ..., 7] = 0.25  # its group of channels is even, and of step 0 where the group is alone
    channels = min(group_size, head_dim // 2)
    key, meant_key = int4(rows[0], group_size, channels, 2)
    value, meant_value = int4(rows[1], group_size, channels, 3)
    newest = torch.randn(2, 3, 2, 40, head_dim).to(dtype)
    query = torch.randn(3, 2, 4 * num_tokens, head_dim).to(dtype)

    out = attend_int4(
        query,
        (*key, *value),
        (groups * group_size).int(),
        *(stored(part, counts, torch.nan) for part in newest),
        counts,
        group_size=group_size,
        most_encoded=3 * group_size,
        num_tokens=num_tokens,
        scale=0.1,
    )

    encoded = torch.arange(3 * group_size) < (groups * group_size)[:, None, None, None]
    visible = torch.cat(
        (encoded.expand(3, 1, query.shape[2], -1), visible_rows(counts, query.shape[2], num_tokens, 40)), dim=3
    )
    all_keys, all_values = (
        torch.cat((old, new.double()), dim=2) for old, new in zip((meant_key, meant_value), newest, strict=True)
    )
    wanted, _ = expected(query, all_keys, all_values, visible, 0.1, num_tokens)
    torch.testing.assert_close(out.double(), wanted, rtol=RTOL[dtype], atol=2 * ATOL[dtype])


def test_int4_groups_that_no_product_fits_are_refused() -> None:
    rows = torch.zeros(1, 1, 8, 24)
    key, value = int4(rows, 8, 8, 2)[0], int4(rows, 8, 8, 3)[0]
    count = torch.ones(1, dtype=torch.int32)

    with pytest.raises(ValueError, match="groups of 8 tokens and 8 of 24 channels"):
        attend_int4(rows[:, :, :1], (*key, *value), 8 * count, rows, rows, count, group_size=8, most_encoded=8, scale=1)


def test_a_mask_is_added_and_hides() -> None:
    query, rows = torch.randn(3, 2, 8, 64), torch.randn(2, 3, 2, 70, 64)
    mask = torch.randn(3, 1, 8, 70).masked_fill_(torch.rand(3, 1, 8, 70) < 0.4, -torch.inf)
    mask[1, :, 3] = -torch.inf

    out, columns = attend(query, (rows[0],), (rows[1],), num_tokens=2, mask=mask, scale=0.2, want_columns=True)

    weight = (query.double() @ rows[0].double().mT * 0.2 + mask).softmax(dim=-1).nan_to_num(0)
    assert columns is not None
    torch.testing.assert_close(out.double(), weight @ rows[1].double(), rtol=0, atol=2e-6)
    torch.testing.assert_close(columns.double(), weight.view(3, 2, 4, 2, 70).mean(dim=2), rtol=0, atol=1e-6)
    assert not out[1, :, 3].any()


def test_more_queries_than_a_program_takes_and_queries_that_are_views() -> None:
    query = torch.randn(2, 2, 72, 1, 64).permute(3, 1, 2, 0, 4)[:, :, :, 1]
    rows = torch.randn(2, 1, 2, 40, 64)
    visible = torch.ones(1, dtype=torch.bool)

    out, _ = attend(query, (rows[0],), (rows[1],), scale=0.2)

    torch.testing.assert_close(out.double(), expected(query, *rows, visible, 0.2, 1)[0], rtol=0, atol=2e-6)


def test_scores_of_any_size_stay_finite() -> None:
    query, rows = torch.randn(1, 1, 4, 64).bfloat16() * 1e4, torch.randn(1, 1, 80, 64).bfloat16() * 1e4

    out, _ = attend(query, (rows,), (rows,), scale=1.0, config=CONFIG)

    best = (query.double() @ rows.double().mT).argmax(dim=-1)
    assert torch.equal(out[0, 0], rows[0, 0, best[0, 0]])


def test_what_is_not_a_number_shows() -> None:
    query, rows = torch.randn(2, 1, 4, 64), torch.randn(2, 1, 80, 64)
    rows[1, 0, 70, 3] = torch.nan

    out, _ = attend(query, (rows,), (rows,), scale=0.2, config=CONFIG)

    assert out[0].isfinite().all() and out[1].isnan().all()


def test_rows_whose_values_or_scales_lie_elsewhere_are_refused() -> None:
    query, rows = torch.randn(1, 1, 4, 32), torch.randn(1, 1, 32, 40)
    code, scale = torch.zeros(1, 1, 40, 32, dtype=torch.int8), torch.ones(1, 1, 1, 40).mT

    with pytest.raises(ValueError, match="side by side"):
        attend(query, (rows.mT,), (rows.mT,), scale=1.0)
    with pytest.raises(ValueError, match="as their codes do"):
        attend(query, (code, scale[:, :, ::2]), (code, scale), codec="int8", scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "num_groups", "num_past"), [(64, 4, 0), (128, 1, 0), (24, 3, 0), (64, 2, 70)])
def test_column_sums_of_a_prompt(dtype: torch.dtype, head_dim: int, num_groups: int, num_past: int) -> None:
    """A whole prompt is causal; a later chunk has a mask."""
    num_queries = 1 if head_dim == 24 else 65
    num_rows = num_past + num_queries
    query = torch.randn(1, num_queries, 2 * num_groups, head_dim).to(dtype).transpose(1, 2)
    key = stored(torch.randn(1, 2, num_rows, head_dim).to(dtype), torch.tensor([num_rows]), torch.nan)
    mask = None
    if num_past:
        row = torch.arange(num_rows)
        hidden = row > row[num_past:, None]
        mask = torch.zeros(1, 1, *hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)

    sums = column_sums(query, key, mask=mask, is_causal=not num_past, scale=0.2, decay=0.97)

    plain = plain_column_sums(query.float(), key.float(), mask=mask, is_causal=not num_past, scale=0.2, decay=0.97)
    torch.testing.assert_close(sums, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", ["native", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_slots_in_any_order(codec: str, dtype: torch.dtype) -> None:
    """Five of eight slots; what the others hold is no number."""
    slots = torch.tensor([6, 0, 3, 7, 2], dtype=torch.int32)
    counts, num_tokens = torch.tensor([1, 33, 96, 64, 20], dtype=torch.int32), 2
    rows = torch.randn(2, 5, 2, NUM_ROWS, 64)
    encode = {"int8": int8, "fp8": fp8}.get(codec, lambda part: (part.to(dtype),))
    key, value = (tuple(in_slots(own, slots, counts) for own in encode(part)) for part in rows)
    query = torch.randn(5, 2, 4 * num_tokens, 64).to(dtype)

    out, columns = attend(
        query,
        key,
        value,
        codec=codec,
        counts=counts,
        slots=slots,
        num_tokens=num_tokens,
        scale=0.2,
        want_columns=True,
        config=CONFIG,
    )

    meant = [encode(part)[0].double() if codec == "native" else decoded(encode(part)) for part in rows]
    visible = visible_rows(counts, query.shape[2], num_tokens, NUM_ROWS)
    wanted, wanted_columns = expected(query, *meant, visible, 0.2, num_tokens)
    assert columns is not None
    torch.testing.assert_close(out.double(), wanted, rtol=RTOL[dtype], atol=ATOL[dtype])
    torch.testing.assert_close(columns.double(), wanted_columns, rtol=0, atol=2e-6)


def in_slots(rows: Tensor, slots: Tensor, counts: Tensor) -> Tensor:
    """Rows [B, H_kv, R, X] of those slots of eight."""
    own = stored(rows, counts, torch.nan if rows.is_floating_point() else 127)
    cache = own.new_full((8, *own.shape[1:3], own.shape[3]), torch.nan if rows.is_floating_point() else 127)
    cache[slots.long()] = own
    return cache


def test_the_rule_covers_every_row_with_whole_blocks() -> None:
    for num_rows in (0, 1, 64, 65, 1000, 4096, 16384, 131072):
        for num_planes in (1, 8, 256, 2048):
            found = decode_config(
                num_planes=num_planes,
                num_queries=4,
                num_rows=num_rows,
                head_dim=128,
                dtype=torch.bfloat16,
                num_processors=132,
            )
            covered = found.rows_per_split * found.num_splits
            assert covered >= num_rows > covered - found.rows_per_split or num_rows == 0
            assert found.rows_per_split % found.block_r == 0 and 1 <= found.num_splits <= 64


@pytest.mark.parametrize(
    ("codec", "dtype", "is_shared", "block_r"),
    [
        ("native", torch.float32, True, 16),
        ("native", torch.bfloat16, False, 32),
        ("native", torch.bfloat16, True, 64),
        ("int8", torch.bfloat16, True, 64),
        ("fp8", torch.float16, True, 32),
    ],
)
def test_rows_in_blocks(codec: str, dtype: torch.dtype, is_shared: bool, block_r: int) -> None:
    """One table for both heads (stride 0) or one each; beyond a count, and in all other blocks, rows are no numbers.
    Half a block of 32 rows is read at once, one, or two."""
    counts, head_dim, num_tokens = torch.tensor(COUNTS, dtype=torch.int32), 64, 2
    rows = torch.randn(2, len(COUNTS), 2, NUM_ROWS, head_dim)
    encode = {"int8": int8, "fp8": fp8}.get(codec, lambda part: (part.to(dtype),))
    ids = torch.randperm(2 * len(COUNTS) * 3, dtype=torch.int32)
    table = ids.view(len(COUNTS), 2, 3)[:, : 1 if is_shared else 2].expand(-1, 2, -1)
    parts = [
        tuple(
            in_blocks(stored(own, counts, torch.nan if own.is_floating_point() else 127), table, len(ids))
            for own in encode(part)
        )
        for part in rows
    ]
    query = torch.randn(len(COUNTS), 2, 4 * num_tokens, head_dim).to(dtype)
    visible = visible_rows(counts, query.shape[2], num_tokens, NUM_ROWS)

    out, _ = attend(
        query,
        *parts,
        codec=codec,
        counts=counts,
        table=table,
        num_tokens=num_tokens,
        scale=0.2,
        config=dataclasses.replace(CONFIG, block_r=block_r),
    )

    meant = [encode(part)[0].double() if codec == "native" else decoded(encode(part)) for part in rows]
    wanted, _ = expected(query, *meant, visible, 0.2, num_tokens)
    torch.testing.assert_close(out.double(), wanted, rtol=RTOL[dtype], atol=ATOL[dtype])


def in_blocks(rows: Tensor, table: Tensor, num_blocks: int) -> Tensor:
    """Rows [B, H_kv, R, X] in the blocks [num_blocks, H_kv, 32, X] that the table names."""
    blocks = torch.full((num_blocks, rows.shape[1], 32, rows.shape[3]), 127 if rows.dtype == torch.int8 else torch.nan)
    blocks = blocks.nan_to_num(127).to(rows.dtype) if rows.dtype == torch.uint8 else blocks.to(rows.dtype)
    for head in range(rows.shape[1]):
        blocks[table[:, head].long(), head] = rows[:, head].unflatten(1, (-1, 32))
    return blocks


def test_tables_that_the_kernel_cannot_follow_are_refused() -> None:
    query, blocks = torch.randn(1, 1, 4, 32), torch.randn(3, 1, 32, 32)
    table, count = torch.zeros(1, 1, 4, dtype=torch.int32), torch.ones(1, dtype=torch.int32)

    with pytest.raises(ValueError, match="blocks must be contiguous, and so must each table"):
        attend(query, (blocks,), (blocks,), counts=count, table=table[..., ::2], scale=1.0)
    with pytest.raises(ValueError, match="blocks must be contiguous"):
        attend(query, (blocks[::2],), (blocks,), counts=count, table=table, scale=1.0)
    with pytest.raises(ValueError, match="blocks of 24 rows"):
        few = blocks[:, :, :24].contiguous()
        attend(query, (few,), (few,), counts=count, table=table, scale=1.0)
    with pytest.raises(ValueError, match=r"keys torch.Size\(\[1, 32, 32\]\), values torch.Size\(\[1, 16, 32\]\)"):
        attend(query, (blocks,), (blocks[:, :, :16].contiguous(),), counts=count, table=table, scale=1.0)

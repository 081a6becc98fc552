"""The small operations in one pass against those of torch, bit for bit: which ran must not be seen in a result."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from codesign.engine.attention.rope import Rope
from codesign.engine.kernels import compiled, fused
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.fused import Fused
from codesign.engine.kernels.plain import PLAIN

DTYPES = [torch.float32, torch.bfloat16]
found = fused.load(torch.float32)
pytestmark = pytest.mark.skipif(isinstance(found, Missing), reason=str(found))

rows = st.sampled_from([0, 1, 2, 8, 33])
dtypes = st.sampled_from(DTYPES)
spreads = st.sampled_from([1e-30, 1e-3, 1.0, 30.0, 1e18, 1e30])
specials = st.sampled_from([None, float("inf"), float("-inf"), float("nan"), -0.0])
seeds = st.integers(0, 2**31)


@functools.cache
def kernels(dtype: torch.dtype) -> Fused:
    own = fused.load(dtype)
    assert isinstance(own, Fused)
    return own


class Values:
    """Random values of a spread, one of them special."""

    def __init__(self, seed: int, dtype: torch.dtype, spread: float = 1.0, special: float | None = None) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype
        self.spread, self.special = spread, special

    def __call__(self, *size: int) -> Tensor:
        made = (torch.randn(size, generator=self.generator) * self.spread).to(self.dtype)
        if self.special is not None and made.numel():
            made.view(-1)[made.numel() // 2] = self.special
        return made

    def weight(self, size: int) -> Tensor:
        return torch.randn(size, generator=self.generator).to(self.dtype)


def same(ours: Tensor, plain: Tensor) -> bool:
    """Every bit, but for those of NaNs; the signs of zeros count."""
    is_nan = plain.isnan()
    signs = torch.equal(ours.signbit() | is_nan, plain.signbit() | is_nan)
    return ours.dtype == plain.dtype and signs and torch.allclose(ours, plain, rtol=0, atol=0, equal_nan=True)


def last_places(ours: Tensor, plain: Tensor) -> int:
    """Largest distance of fp32 values in units of their last place."""
    ordered = [
        torch.where(own < 0, -(own & 0x7FFFFFFF), own) for own in (t.view(torch.int32).long() for t in (ours, plain))
    ]
    apart = (ordered[0] - ordered[1]).abs()
    return int(apart[~plain.isnan()].max()) if apart.numel() else 0


@given(dtypes, rows, st.integers(1, 150).map(lambda count: 8 * count), spreads, specials, seeds)
def test_norm_and_residual_are_those_of_torch(
    dtype: torch.dtype, num_rows: int, size: int, spread: float, special: float | None, seed: int
) -> None:
    values = Values(seed, dtype, spread, special)
    x, change, weight = values(num_rows, size), values(num_rows, size), values.weight(size)
    before = x.clone(), change.clone()

    total, normed = kernels(dtype).add_norm(x, change, weight, 1e-6)

    plain_total, plain_normed = PLAIN.add_norm(x, change, weight, 1e-6)
    assert same(total, plain_total) and same(normed, plain_normed)
    assert same(kernels(dtype).norm(x, weight, 1e-5), PLAIN.norm(x, weight, 1e-5))
    assert same(x, before[0]) and same(change, before[1])


@given(dtypes, rows, st.integers(1, 40).map(lambda count: 32 * count), spreads, specials, seeds)
def test_silu_times_up_is_that_of_torch(
    dtype: torch.dtype, num_rows: int, size: int, spread: float, special: float | None, seed: int
) -> None:
    gate_up = Values(seed, dtype, spread, special)(num_rows, 2 * size)
    before = gate_up.clone()

    assert same(kernels(dtype).silu_mul(gate_up), PLAIN.silu_mul(gate_up))
    assert same(gate_up, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_holds_where_exponentials_overflow_and_vanish(dtype: torch.dtype) -> None:
    near = torch.linspace(-110, 110, 2**14)
    gate = torch.cat(
        (near, torch.tensor([1e-45, -1e-40, 3e38, -3e38, float("inf"), float("-inf"), float("nan"), -0.0]))
    )
    gate = torch.cat((gate, gate.new_zeros(-len(gate) % 32))).to(dtype)[None]
    gate_up = torch.cat((gate, torch.full_like(gate, 1.25)), dim=1)

    assert same(kernels(dtype).silu_mul(gate_up), PLAIN.silu_mul(gate_up))


@given(
    dtypes,
    rows,
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([8, 16, 64, 80, 96, 128]),
    spreads,
    specials,
    seeds,
)
def test_norms_of_heads_are_those_of_torch(
    dtype: torch.dtype,
    num_rows: int,
    num_q: int,
    num_k: int,
    size: int,
    spread: float,
    special: float | None,
    seed: int,
) -> None:
    values = Values(seed, dtype, spread, special)
    q, k, _ = values(num_rows, num_q + 2 * num_k, size).split((num_q, num_k, num_k), dim=1)
    weights = values.weight(size), values.weight(size)

    ours = kernels(dtype).norm_heads(q, k, *weights, 1e-6)

    assert all(map(same, ours, PLAIN.norm_heads(q, k, *weights, 1e-6)))


@given(
    dtypes,
    rows,
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 70).map(lambda half: 2 * half),
    spreads,
    specials,
    seeds,
)
def test_rotary_positions_are_those_of_torch(
    dtype: torch.dtype,
    num_rows: int,
    num_q: int,
    num_k: int,
    size: int,
    spread: float,
    special: float | None,
    seed: int,
) -> None:
    values = Values(seed, dtype, spread, special)
    q, k, v = values(num_rows, num_q + 2 * num_k, size).split((num_q, num_k, num_k), dim=1)
    tables = Rope(1e4 ** (-torch.arange(0, size, 2) / size), 1.1).tables(1000, torch.device("cpu"))
    positions = torch.randint(0, 1000, (num_rows,), generator=values.generator)
    cos, signed_sin = (table[positions][:, None] for table in tables)

    ours = kernels(dtype).rotate(q, k, cos, signed_sin)

    plain = PLAIN.rotate(q, k, cos, signed_sin)
    assert all(map(same, ours, plain))
    cache = torch.zeros(2, num_rows * num_k + 3, size, dtype=dtype)
    row = torch.randperm(num_rows * num_k + 3, generator=values.generator)[: num_rows * num_k]
    expected = cache.clone()
    assert same(PLAIN.rotate_into(q, k, v, *(cos, signed_sin), key=expected[0], value=expected[1], rows=row), plain[0])
    turned = kernels(dtype).rotate_into(q, k, v, *(cos, signed_sin), key=cache[0], value=cache[1], rows=row)
    assert same(turned, plain[0]) and same(cache, expected)
    keys = torch.zeros(2, *cache.shape[1:], dtype=dtype)
    PLAIN.rotate_rows(k, cos, signed_sin, key=keys[0], rows=row)
    kernels(dtype).rotate_rows(k, cos, signed_sin, key=keys[1], rows=row)
    assert all(same(own, expected[0]) for own in keys)
    assert same(expected[0, row].view(plain[1].shape), plain[1]) and same(expected[1, row].view(v.shape), v)


@given(rows, st.integers(1, 100), spreads, seeds)
def test_odd_sizes_are_a_few_last_places_apart(num_rows: int, size: int, spread: float, seed: int) -> None:
    """Rows that are no whole number of vectors: ATen's compiler sums and exponentiates the rest in its own way."""
    for dtype in DTYPES:
        values = Values(seed, dtype, spread)
        x, weight, gate_up = values(num_rows, size), values.weight(size), values(num_rows, 2 * size)
        pairs = (
            (kernels(dtype).norm(x, weight, 1e-6), PLAIN.norm(x, weight, 1e-6)),
            (kernels(dtype).silu_mul(gate_up), PLAIN.silu_mul(gate_up)),
        )

        for ours, plain in pairs:
            if dtype == torch.float32:
                assert last_places(ours, plain) <= 8
            else:
                assert torch.allclose(ours, plain, rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_on_two_threads_are_the_same(dtype: torch.dtype) -> None:
    values, before = Values(0, dtype), torch.get_num_threads()
    x, change, weight, q, k = (
        values(130, 512),
        values(130, 512),
        values.weight(512),
        values(130, 6, 64),
        values(130, 2, 64),
    )
    tables = values(130, 1, 64).float(), values(130, 1, 64).float()

    def results() -> list[Tensor]:
        own = kernels(dtype)
        parts = own.add_norm(x, change, weight, 1e-6), own.norm_heads(q, k, weight[:64], weight[64:128], 1e-6)
        cache = torch.zeros(2, 260, 64, dtype=dtype)
        turned = own.rotate_into(q, k, k, *tables, key=cache[0], value=cache[1], rows=torch.arange(259, -1, -1))
        return [*parts[0], *parts[1], *own.rotate(q, k, *tables), own.silu_mul(x), turned, cache]

    single = results()
    try:
        torch.set_num_threads(2)
        double = results()
    finally:
        torch.set_num_threads(before)

    assert all(map(same, double, single))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_does_not_lie_in_one_piece_is_read_as_it_is_meant(dtype: torch.dtype) -> None:
    """Torch adds a row's squares in another order then, so that the reference gets a copy."""
    values = Values(0, dtype)
    turned, weight = values(64, 3).t(), values.weight(64)
    heads, tables = values(16, 4, 3).permute(2, 1, 0), [values(16, 3).t().float()[:, None] for _ in range(2)]
    own, in_one_piece = kernels(dtype), turned.contiguous()

    _, normed = own.add_norm(turned, turned, weight, 1e-6)

    assert same(normed, PLAIN.add_norm(in_one_piece, in_one_piece, weight, 1e-6)[1])
    assert same(own.silu_mul(turned), PLAIN.silu_mul(turned))
    assert all(map(same, own.rotate(heads, heads, *tables), PLAIN.rotate(heads, heads, *tables)))
    q_k, q_k_in_one_piece = ((own, own, weight[:16], weight[16:32], 1e-6) for own in (heads, heads.contiguous()))
    assert all(map(same, own.norm_heads(*q_k), PLAIN.norm_heads(*q_k_in_one_piece)))


def test_half_precision_is_left_to_torch_with_the_reason() -> None:
    assert fused.load(torch.float16) == Missing("written for bf16 and fp32, activations are float16")


def test_without_a_compiler_the_reason_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "load", lambda stem: Missing("no C compiler"))

    assert fused.load.__wrapped__(torch.float32) == Missing("no C compiler")

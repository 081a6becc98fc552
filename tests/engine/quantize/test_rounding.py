import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codesign.engine.quantize.rounding import dequantize_groups, dequantize_rows, quantize_groups, quantize_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLACK = 1 + 1e-5  # the fp32 arithmetic of the test itself


def weights(seed: int, num_out: int, num_in: int, exponent: int, offset: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_out, num_in, generator=generator) + offset) * 2.0**exponent


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), exponent=st.integers(-12, 8), offset=st.floats(-30, 30), dtype=st.sampled_from(DTYPES)
)
def test_int8_error_is_at_most_half_a_stored_scale(seed: int, exponent: int, offset: float, dtype: torch.dtype) -> None:
    weight = weights(seed, 5, 48, exponent, offset)

    codes, scale = quantize_rows(weight, scale_dtype=dtype)

    assert scale.dtype == dtype
    assert codes.abs().max() <= 127
    error = (dequantize_rows(codes, scale) - weight).abs()
    assert (error <= scale.float()[:, None] / 2 * SLACK + weight.abs() * 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    exponent=st.integers(-8, 8),
    offset=st.floats(-30, 30),
    dtype=st.sampled_from(DTYPES),
    group_size=st.sampled_from([8, 32, 64]),
)
def test_int4_error_is_at_most_half_a_stored_scale(
    seed: int, exponent: int, offset: float, dtype: torch.dtype, group_size: int
) -> None:
    weight = weights(seed, 3, 2 * group_size, exponent, offset)

    codes, scale, zero = quantize_groups(weight, group_size=group_size, scale_dtype=dtype)

    assert codes.max() <= 15
    error = (dequantize_groups(codes, scale, zero) - weight).abs()
    bound = scale.float().repeat_interleave(group_size, dim=1) / 2
    assert (error <= bound * SLACK + weight.abs() * 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_no_wider_than_the_range_needs(dtype: torch.dtype) -> None:
    """Rounding up to a 16-bit scale costs at most one step of its precision."""
    weight = weights(1, 16, 256, -5, 0.0)

    _, row_scale = quantize_rows(weight, scale_dtype=dtype)
    _, group_scale, _ = quantize_groups(weight, group_size=64, scale_dtype=dtype)

    step = 1 + {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    groups = weight.view(16, 4, 64)
    assert (row_scale.float() <= weight.abs().amax(1) / 127 * step).all()
    assert (group_scale.float() <= (groups.amax(2) - groups.amin(2)) / 15 * step).all()


def test_a_row_of_zeros_stays_zero() -> None:
    weight = weights(2, 4, 64, 0, 0.0)
    weight[1] = 0

    row = dequantize_rows(*quantize_rows(weight, scale_dtype=torch.bfloat16))
    group = dequantize_groups(*quantize_groups(weight, group_size=32, scale_dtype=torch.bfloat16))

    assert (row[1] == 0).all()
    assert (group[1] == 0).all()
    assert row[0].abs().min() > 0 or row[0].abs().max() > 0


@pytest.mark.parametrize("value", [3.0, -3.0, 1e-20, 1e30])
def test_a_constant_group_comes_back_to_storage_precision(value: float) -> None:
    weight = torch.full((2, 64), value)

    found = dequantize_groups(*quantize_groups(weight, group_size=32, scale_dtype=torch.bfloat16))

    torch.testing.assert_close(found, weight, rtol=2.0**-7, atol=0)


def test_huge_weights_fit_bf16_scales_and_are_refused_for_fp16() -> None:
    weight = torch.tensor([[3e38, -3e38] * 16])

    codes, scale, zero = quantize_groups(weight, group_size=32, scale_dtype=torch.bfloat16)
    assert dequantize_groups(codes, scale, zero).isfinite().all()
    with pytest.raises(ValueError, match="does not fit float16"):
        quantize_groups(weight, group_size=32, scale_dtype=torch.float16)
    with pytest.raises(ValueError, match="does not fit float16"):
        quantize_rows(weight, scale_dtype=torch.float16)


def test_a_midpoint_that_overflows_fp16_is_refused_even_when_its_scale_fits() -> None:
    weight = torch.full((1, 32), 200_000.0)

    with pytest.raises(ValueError, match=r"zero .* does not fit float16"):
        quantize_groups(weight, group_size=32, scale_dtype=torch.float16)


def test_weights_too_small_for_fp16_steps_keep_the_bound() -> None:
    weight = weights(3, 2, 32, -26, 0.0)

    codes, scale = quantize_rows(weight, scale_dtype=torch.float16)

    assert ((dequantize_rows(codes, scale) - weight).abs() <= scale.float()[:, None] / 2 * SLACK).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.zeros(4, 64)
    weight[2, 3] = bad

    with pytest.raises(ValueError, match="not finite"):
        quantize_rows(weight, scale_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="not finite"):
        quantize_groups(weight, group_size=32, scale_dtype=torch.bfloat16)


def test_groups_run_along_the_input() -> None:
    """One large input column spoils its own group and no other."""
    weight = weights(4, 8, 128, -5, 0.0)
    spoiled = weight.clone()
    spoiled[:, 5] = 100.0

    clean = dequantize_groups(*quantize_groups(weight, group_size=32, scale_dtype=torch.float32))
    found = dequantize_groups(*quantize_groups(spoiled, group_size=32, scale_dtype=torch.float32))

    assert torch.equal(clean[:, 32:], found[:, 32:])
    assert (clean[:, :32] - found[:, :32]).abs().amin(dim=1).max() >= 0
    assert (found[:, :5] - weight[:, :5]).abs().max() > 0.05


def test_smaller_groups_lose_less() -> None:
    weight = weights(5, 64, 512, -5, 0.0)

    errors = [
        (dequantize_groups(*quantize_groups(weight, group_size=size, scale_dtype=torch.bfloat16)) - weight).norm()
        for size in (32, 64, 128, 256)
    ]

    assert errors == sorted(errors)
    assert errors[0] < 0.85 * errors[-1]

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codesign.engine.quantize.format import GridFormat
from codesign.engine.quantize.grid import AffineGrid, Fit, Quantized, finite
from codesign.engine.quantize.methods.rtn import Rtn
from codesign.engine.quantize.nf4_grid import Nf4Grid, ScaleCodes, levels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLACK = 1 + 1e-5  # the fp32 arithmetic of the test itself
OFFSET_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def weights(seed: int, num_out: int, num_in: int, exponent: int, offset: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_out, num_in, generator=generator) + offset) * 2.0**exponent


def grid(
    bits: int, group_size: int | None = 32, *, symmetric: bool = False, dtype: torch.dtype = torch.bfloat16
) -> AffineGrid:
    return AffineGrid(bits=bits, group_size=group_size, is_symmetric=symmetric, scale_dtype=dtype)


def rounded(weight: Tensor, own: AffineGrid | Nf4Grid) -> Tensor:
    return own.dequantize(own.quantize(weight, own.fit(weight)))


def steps(fit: Fit, num_in: int) -> Tensor:
    return fit.scale.float().repeat_interleave(num_in // fit.scale.shape[1], dim=1)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    exponent=st.integers(-8, 8),
    offset=st.floats(-30, 30),
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([8, 32, None]),
)
def test_symmetric_error_is_at_most_half_a_stored_step(
    seed: int, exponent: int, offset: float, dtype: torch.dtype, bits: int, group_size: int | None
) -> None:
    weight, own = weights(seed, 3, 64, exponent, offset), grid(bits, group_size, symmetric=True, dtype=dtype)

    quantized = own.quantize(weight, own.fit(weight))

    assert quantized.fit.scale.dtype == dtype
    assert int(quantized.codes.max()) < 2**bits
    error = (own.dequantize(quantized) - weight).abs()
    assert (error <= steps(quantized.fit, 64) * (0.5 + 1e-4)).all()  # 127.5 steps in fp32


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    exponent=st.integers(-8, 8),
    offset=st.floats(-3, 3),
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from([2, 3, 4]),
    group_size=st.sampled_from([8, 32, 64]),
)
def test_asymmetric_error_is_at_most_a_step_and_half_a_step_inside_the_range(
    seed: int, exponent: int, offset: float, dtype: torch.dtype, bits: int, group_size: int
) -> None:
    weight, own = weights(seed, 3, 64, exponent, offset), grid(bits, group_size, dtype=dtype)

    quantized = own.quantize(weight, own.fit(weight))

    step = steps(quantized.fit, 64)
    error = (own.dequantize(quantized) - weight).abs() - 2**bits * step * OFFSET_ROUNDING[dtype]
    assert (error <= step * SLACK + weight.abs() * 1e-6).all()
    inside = (quantized.codes > 0) & (quantized.codes < 2**bits - 1)
    assert (error <= step / 2 * SLACK + weight.abs() * 1e-6)[inside].all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([2, 3, 4]), offset=st.floats(-3, 3))
def test_integer_zero_points_say_the_same_as_the_stored_offset(seed: int, bits: int, offset: float) -> None:
    weight, own = weights(seed, 3, 64, 0, offset), grid(bits)
    quantized = own.quantize(weight, own.fit(weight))
    zero_points = own.zero_points(quantized.fit)
    assert zero_points is not None

    groups = quantized.codes.view(3, 2, 32).float() - zero_points.float()[..., None]
    by_integers = (groups * quantized.fit.scale.float()[..., None]).flatten(1)

    bound = steps(quantized.fit, 64) * 2**bits * OFFSET_ROUNDING[torch.bfloat16]
    assert ((by_integers - own.dequantize(quantized)).abs() <= bound * SLACK).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([2, 3, 4]), symmetric=st.booleans())
def test_what_is_on_the_grid_stays_where_it_is(seed: int, bits: int, symmetric: bool) -> None:
    own = grid(bits, symmetric=symmetric)
    weight = weights(seed, 3, 64, 0, 0.0)
    once = own.quantize(weight, own.fit(weight))

    again = own.quantize(own.dequantize(once), once.fit)

    assert torch.equal(again.codes, once.codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_no_wider_than_the_range_needs(dtype: torch.dtype) -> None:
    """Rounding up to a 16-bit scale costs at most one step of its precision."""
    weight = weights(1, 16, 256, -5, 0.0)

    row = grid(8, None, symmetric=True, dtype=dtype).fit(weight).scale.flatten()
    group = grid(4, 64, dtype=dtype).fit(weight).scale

    step = 1 + {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    groups = weight.view(16, 4, 64)
    assert (row.float() <= weight.abs().amax(1) / 127.5 * step).all()
    assert (group.float() <= (groups.amax(2) - groups.amin(2)) / 15 * step).all()


def test_narrow_codes_leave_out_the_lowest() -> None:
    weight = torch.tensor([[-1.0, 1.0, 0.5, 0.0]])
    own = AffineGrid(bits=8, group_size=None, is_symmetric=True, is_narrow=True, scale_dtype=torch.float32)

    quantized = own.quantize(weight, own.fit(weight))

    assert quantized.codes.tolist() == [[1, 255, 192, 128]]


def test_shrinking_the_range_clips() -> None:
    weight = weights(7, 4, 64, 0, 0.0)
    own = grid(4, symmetric=True)

    narrow = own.dequantize(own.quantize(weight, own.fit(weight, 0.5)))

    assert narrow.abs().max() < 0.6 * weight.abs().max()


@pytest.mark.parametrize("own", [grid(2), grid(4), grid(3, symmetric=True), grid(8, None, symmetric=True)])
def test_zeros_stay_zero(own: AffineGrid) -> None:
    weight = weights(2, 4, 64, 0, 0.0)
    weight[1] = 0

    found = rounded(weight, own)

    assert (found[1] == 0).all()
    assert found[0].abs().max() > 0


@pytest.mark.parametrize("value", [3.0, -3.0, 1e-20, 1e30])
def test_a_constant_group_comes_back_to_storage_precision(value: float) -> None:
    weight = torch.full((2, 64), value)

    torch.testing.assert_close(rounded(weight, grid(4)), weight, rtol=2.0**-6, atol=0)


def test_huge_weights_fit_bf16_scales_and_are_refused_for_fp16() -> None:
    weight = torch.tensor([[3e38, -3e38] * 16])

    assert rounded(weight, grid(4)).isfinite().all()
    for own in (grid(4, dtype=torch.float16), grid(8, None, symmetric=True, dtype=torch.float16)):
        with pytest.raises(ValueError, match="does not fit float16"):
            own.fit(weight)


def test_an_offset_that_overflows_fp16_is_refused_even_when_its_scale_fits() -> None:
    weight = torch.full((1, 32), 200_000.0)

    with pytest.raises(ValueError, match=r"offset .* does not fit float16"):
        grid(4, dtype=torch.float16).fit(weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.zeros(4, 64)
    weight[2, 3] = bad

    with pytest.raises(ValueError, match="not finite"):
        finite(weight)


def test_large_finite_weights_pass_though_their_sum_overflows() -> None:
    weight = torch.full((4, 64), 3e38)

    assert finite(weight) is weight


@pytest.mark.parametrize("own", [grid(4), grid(2, symmetric=True), Nf4Grid()])
def test_groups_run_along_the_input(own: AffineGrid | Nf4Grid) -> None:
    """One large input column spoils its own group's scale and no other."""
    weight = weights(4, 8, 128, -5, 0.0)
    spoiled = weight.clone()
    spoiled[:, 5] = 1.0

    clean, found = own.fit(weight), own.fit(spoiled)

    tolerance = 0.02 if isinstance(own, Nf4Grid) else 0.0  # its scales are rounded together
    torch.testing.assert_close(clean.scale[:, 1:], found.scale[:, 1:], rtol=0, atol=tolerance)
    assert (found.scale[:, 0] > 3 * clean.scale[:, 0]).all()


def test_smaller_groups_lose_less() -> None:
    weight = weights(5, 64, 512, -5, 0.0)

    errors = [(rounded(weight, grid(4, size)) - weight).norm() for size in (32, 64, 128, 256)]

    assert errors == sorted(errors)
    assert errors[0] < 0.85 * errors[-1]


def test_uneven_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of group_size 32, got 48"):
        grid(4).fit(torch.zeros(2, 48))


def test_nf4_levels_are_the_quantiles_of_the_paper() -> None:
    """QLoRA, section 3: seven below an exact 0, eight above, of a normal distribution cut at the same tail."""
    highest, quantile = 1 - (1 / 30 + 1 / 32) / 2, NormalDist().inv_cdf
    above = [quantile(highest + (0.5 - highest) * i / 8) for i in range(8)]
    below = [-quantile(highest + (0.5 - highest) * i / 7) for i in range(7)]

    expected = torch.tensor(sorted([*above, 0.0, *below])) / max(above)
    torch.testing.assert_close(levels(), expected, rtol=0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-8, 4))
def test_nf4_picks_the_nearest_level(seed: int, exponent: int) -> None:
    weight, own = weights(seed, 4, 128, exponent, 0.0), Nf4Grid()

    quantized = own.quantize(weight, own.fit(weight))

    candidates = levels() * quantized.fit.scale[..., None, None]
    nearest = (weight.view(4, 2, 64, 1) - candidates).abs().amin(-1).flatten(1)
    torch.testing.assert_close((own.dequantize(quantized) - weight).abs(), nearest, rtol=1e-4, atol=1e-9)


def test_double_quantised_scales_are_within_half_a_step() -> None:
    scale = weights(9, 40, 33, -6, 2.0).abs()

    found = ScaleCodes.of(scale)

    per_value = found.step.repeat_interleave(256)[: scale.numel()].view(scale.shape)
    assert ((found.scale() - scale).abs() <= per_value / 2 * SLACK).all()


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int8", "nf4", "w8a8"])
def test_rtn_is_every_weight_to_its_nearest_value(name: str) -> None:
    from codesign.registry import WEIGHT_FORMATS

    member: GridFormat = WEIGHT_FORMATS.create(name)
    weight, own = weights(11, 16, 128, -4, 0.1), member.grid(torch.bfloat16)

    found: Quantized = Rtn().quantize(weight, own, None)

    assert torch.equal(found.codes, own.quantize(weight, own.fit(weight)).codes)

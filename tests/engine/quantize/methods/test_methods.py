"""What every weight method owes, and the order that the papers promise, on inputs with correlated columns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codesign.engine.quantize.formats.int4 import Int4
from codesign.engine.quantize.fp8_grid import Fp8Grid
from codesign.engine.quantize.grid import AffineGrid, Grid
from codesign.engine.quantize.inputs import InputStats
from codesign.engine.quantize.linear import Workspace
from codesign.engine.quantize.method import Method
from codesign.engine.quantize.methods.awq import Awq, best_shrinks, scales
from codesign.engine.quantize.methods.gptq import Gptq, inverse_factor
from codesign.engine.quantize.methods.hqq import Hqq
from codesign.engine.quantize.methods.rtn import Rtn
from codesign.engine.quantize.nf4_grid import Nf4Grid
from codesign.registry import WEIGHT_METHODS


def grid(bits: int = 4, group_size: int | None = 32, *, symmetric: bool = False) -> AffineGrid:
    return AffineGrid(bits=bits, group_size=group_size, is_symmetric=symmetric, scale_dtype=torch.bfloat16)


def dense(num_out: int = 48, num_in: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(seed)) * 0.05


def correlated(num_tokens: int = 1024, num_in: int = 128, seed: int = 0) -> Tensor:
    """[tokens, in] of low rank plus noise, with columns of very different size."""
    generator = torch.Generator().manual_seed(seed + 1)
    factors = torch.randn(num_tokens, num_in // 4, generator=generator)
    mixing = torch.randn(num_in // 4, num_in, generator=generator)
    noise = torch.randn(num_tokens, num_in, generator=generator)
    return (factors @ mixing * 0.3 + noise * 0.3) * torch.logspace(-1, 1, num_in)[torch.randperm(num_in)]


def seen(x: Tensor) -> InputStats:
    stats = InputStats(x.shape[1])
    for part in torch.split(x, 100):
        stats.add(part)
    return stats


def output_error(method: Method, weight: Tensor, own: Grid, x: Tensor) -> float:
    rounded = own.dequantize(method.quantize(weight, own, seen(x)))
    return float(((weight - rounded) @ x.t()).norm() / (weight @ x.t()).norm())


@pytest.mark.parametrize(
    "own", [grid(2), grid(3), grid(4, 64), grid(4, symmetric=True), grid(8, None), Nf4Grid(), Fp8Grid()]
)
def test_gptq_repairs_at_least_a_quarter_of_the_output_error_on_correlated_inputs(own: Grid) -> None:
    weight, x = dense(), correlated()

    assert output_error(Gptq(), weight, own, x) < 0.75 * output_error(Rtn(), weight, own, x)


def test_gptq_carries_errors_across_blocks_of_columns() -> None:
    """With feedback only inside its blocks of 128 columns it would gain little on 512."""
    weight, x = dense(32, 512), correlated(2048, 512)

    whole = output_error(Gptq(), weight, grid(), x)
    halves = [
        output_error(Gptq(act_order=False), weight[:, part], grid(), x[:, part])
        for part in (slice(at, at + 128) for at in range(0, 512, 128))
    ]

    assert whole < 0.9 * min(halves)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_without_feedback_is_rtn(act_order: bool) -> None:
    weight, x = dense(), correlated()

    found = Gptq(feedback=False, act_order=act_order).quantize(weight, grid(), seen(x))

    assert torch.equal(found.codes, Rtn().quantize(weight, grid(), None).codes)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([2, 3, 4]), scale=st.floats(1e-3, 1e3))
def test_gptq_with_uncorrelated_inputs_is_rtn(seed: int, bits: int, scale: float) -> None:
    """H = c I leaves nothing to repair."""
    weight = dense(8, 64, seed)

    found = Gptq().quantize(weight, grid(bits), seen(torch.eye(64) * scale))

    assert torch.equal(found.codes, Rtn().quantize(weight, grid(bits), None).codes)


def test_the_inverse_factor_is_that_of_the_damped_inverse() -> None:
    hessian = seen(correlated()).hessian

    upper = inverse_factor(hessian, 0.01)[0].double()

    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(128)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.t() @ upper @ damped, torch.eye(128, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", [Gptq(), Awq()], ids=["gptq", "awq"])
@pytest.mark.parametrize("num_tokens", [1, 5, 0])
def test_fewer_tokens_than_columns_still_give_finite_weights_close_to_rtn(method: Method, num_tokens: int) -> None:
    weight, x = dense(), correlated()[:num_tokens]

    found = grid().dequantize(method.quantize(weight, grid(), seen(x)))

    assert found.isfinite().all()
    assert (found - weight).norm() < 3 * (grid().dequantize(Rtn().quantize(weight, grid(), None)) - weight).norm()


@pytest.mark.parametrize("method", [Gptq(), Awq()], ids=["gptq", "awq"])
def test_inputs_that_are_always_zero_do_no_harm(method: Method) -> None:
    weight, x = dense(), correlated()
    x[:, ::3] = 0

    found = grid().dequantize(method.quantize(weight, grid(), seen(x)))

    assert found.isfinite().all()
    assert float(((weight - found) @ x.t()).norm() / (weight @ x.t()).norm()) < 0.15


@pytest.mark.parametrize("method", [Gptq(), Awq()], ids=["gptq", "awq"])
def test_a_method_that_needs_inputs_says_so(method: Method) -> None:
    assert method.needs_inputs
    with pytest.raises(ValueError, match="needs calibration inputs"):
        method.quantize(dense(), grid(), None)


def test_inputs_that_are_not_finite_are_refused() -> None:
    x = correlated()
    x[3, 3] = float("nan")

    with pytest.raises(ValueError, match="not finite"):
        Gptq().quantize(dense(), grid(), seen(x))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_has_no_larger_error_in_its_own_norm_than_rtn(bits: int) -> None:
    weight = torch.distributions.StudentT(3.0).sample((64, 256)) * 0.05
    own = grid(bits, 64)

    ours = own.dequantize(Hqq().quantize(weight, own, None))
    theirs = own.dequantize(Rtn().quantize(weight, own, None))

    norms = [(weight - found).abs().pow(0.7).view(64, 4, 64).mean(-1) for found in (ours, theirs)]
    assert (norms[0] <= norms[1] * (1 + 1e-5)).all()
    assert norms[0].mean() < 0.99 * norms[1].mean()


def test_hqq_does_not_depend_on_the_unit_of_the_weights() -> None:
    weight, own = dense(), AffineGrid(bits=4, group_size=32, is_symmetric=False, scale_dtype=torch.float32)

    found = Hqq().quantize(weight, own, None)
    scaled = Hqq().quantize(weight * 1024, own, None)

    assert torch.equal(found.codes, scaled.codes)


@pytest.mark.parametrize("own", [grid(symmetric=True), Nf4Grid()])
def test_hqq_refuses_grids_without_an_offset(own: Grid) -> None:
    with pytest.raises(ValueError, match="asymmetric"):
        Hqq().quantize(dense(), own, None)


def test_awq_scales_are_one_at_alpha_zero_and_follow_the_inputs_beyond() -> None:
    mean_abs = torch.tensor([0.01, 1.0, 100.0])

    assert torch.equal(scales(mean_abs, 0.0), torch.ones(3))
    torch.testing.assert_close(scales(mean_abs, 0.5), torch.tensor([0.1, 1.0, 10.0]))


def test_awq_without_search_is_rtn() -> None:
    weight, x = dense(), correlated()

    found = Awq(clips=False).quantize(weight, grid(), seen(x))

    assert torch.equal(found.codes, Rtn().quantize(weight, grid(), None).codes)


def test_awq_clips_where_it_lowers_the_output_error_and_never_where_it_must_not() -> None:
    weight, x = torch.distributions.StudentT(2.5).sample((48, 128)) * 0.05, correlated()
    own = grid(3)

    clipped = Awq().quantize(weight, own, seen(x), num_unclipped_rows=16)
    plain = Rtn().quantize(weight, own, None)

    assert torch.equal(clipped.codes[:16], plain.codes[:16])
    assert output_error(Awq(), weight, own, x) < output_error(Rtn(), weight, own, x)
    assert not torch.equal(clipped.codes[16:], plain.codes[16:])


def test_the_best_range_is_that_of_a_search_by_products() -> None:
    weight, x = dense(6, 64), correlated(256, 64)
    own = grid(3)

    found = best_shrinks(weight, own, seen(x).hessian)

    for row in range(6):
        for group in range(2):
            part = slice(32 * group, 32 * group + 32)
            errors = {}
            for shrink in [1 - 0.05 * step for step in range(10)]:
                rounded = own.dequantize(own.quantize(weight, own.fit(weight, shrink)))
                errors[shrink] = float((x[:, part] @ (weight - rounded)[row, part]).square().sum())
            chosen = min(errors, key=lambda shrink: abs(shrink - float(found[row, group])))
            assert errors[chosen] <= min(errors.values()) * (1 + 1e-4)


@pytest.mark.parametrize("name", WEIGHT_METHODS.names())
def test_methods_leave_the_weight_alone_and_use_the_grid_they_are_given(name: str) -> None:
    weight, x = dense(), correlated()
    kept, own = weight.clone(), grid()
    method: Method = WEIGHT_METHODS.create(name)

    found = method.quantize(weight, own, seen(x))

    assert torch.equal(weight, kept)
    assert found.codes.dtype == torch.uint8
    assert found.codes.shape == weight.shape
    assert int(found.codes.max()) <= 15
    assert found.fit.scale.shape == (48, 4)


def test_second_moments_add_up_over_batches() -> None:
    x = correlated(300, 16)
    stats = seen(x)

    torch.testing.assert_close(stats.hessian, 2 / 300 * x.t() @ x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.norm, x.norm(dim=0))
    torch.testing.assert_close(stats.mean_abs, x.abs().mean(0))
    torch.testing.assert_close(stats.max_abs, x.abs().amax(0))


def test_poor_evidence_and_more_damping_than_asked_for_are_said() -> None:
    few, nothing, singular = InputStats(64), InputStats(64), InputStats(64)
    few.add(torch.randn(16, 64))
    nothing.add(torch.zeros(100, 64))
    singular.add(torch.ones(100, 64) * torch.linspace(1, 1e4, 64))
    weight, member = torch.randn(32, 64), Int4(method="gptq")

    def note(inputs: InputStats, damping: float = 0.01) -> str:
        own = Gptq(damping=damping)
        quantized = own.quantize(weight, member.grid(torch.bfloat16), inputs)
        assert torch.isfinite(member.grid(torch.bfloat16).dequantize(quantized)).all()
        return quantized.note

    assert member.pack(weight, None, dtype=torch.bfloat16, workspace=Workspace(), inputs=few).note == (
        "fewer calibration tokens (16) than inputs (64)"
    )
    assert "no calibration input" in nothing.weakness
    assert note(nothing) == ""
    assert note(singular, damping=1e-9).startswith("gptq: damping ")

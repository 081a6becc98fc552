"""fp8: what it rounds to, where it runs, and that an emulation never passes for the real thing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codesign.engine.build import build_engine
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.quantize.formats import fp8
from codesign.engine.quantize.formats.fp8 import Fp8, round_tokens
from codesign.engine.quantize.fp8_grid import LARGEST, Fp8Grid
from codesign.engine.quantize.linear import Linear, Workspace
from codesign.errors import Unsupported
from codesign.spec.engine_config import Choice, EngineConfig
from tests.engine.driving import generate, request

BF16 = torch.bfloat16


def every_value() -> Tensor:
    """The finite e4m3 values, by the format's definition: sign, 4 bits of exponent, 3 of mantissa, bias 7."""
    found = []
    for byte in range(256):
        sign, exponent, mantissa = (-1.0) ** (byte >> 7), byte >> 3 & 15, byte & 7
        if (exponent, mantissa) != (15, 7):  # NaN
            found.append(sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)))
    return torch.tensor(found)


def emulated(weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = BF16) -> Linear:
    return Fp8(emulated=True).pack(weight, bias, dtype=dtype, workspace=Workspace())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-20, 20), shrink=st.sampled_from([1.0, 0.9, 0.55]))
def test_every_weight_goes_to_the_nearest_value_and_what_is_clipped_to_the_largest(
    seed: int, exponent: int, shrink: float
) -> None:
    weight = torch.randn(3, 48, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    grid = Fp8Grid()
    fit = grid.fit(weight, shrink)

    found = grid.dequantize(grid.quantize(weight, fit))

    assert torch.equal(fit.scale.flatten(), weight.abs().amax(1) * shrink / LARGEST)
    distance = (weight[..., None] - every_value() * fit.scale[..., None]).abs().amin(-1)
    error = (found - weight).abs()
    assert (error <= distance * (1 + 1e-5) + weight.abs() * 1e-6).all()


def test_rows_of_zeros_and_rows_too_small_for_a_scale_are_zero() -> None:
    weight = torch.randn(16, 32)
    weight[3] = 0
    weight[5] = 1e-44

    found = emulated(weight).dequantize()

    assert found.isfinite().all()
    assert (found[3] == 0).all()
    assert float(found[5].abs().max()) <= 1e-44


@given(st.integers(0, 10**6), st.integers(-30, 30))
@settings(max_examples=40, deadline=None)
def test_activations_are_rounded_by_at_most_a_sixteenth_whatever_their_scale(seed: int, exponent: int) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    x[1] = 0

    codes, scale = round_tokens(x)

    assert codes.dtype == torch.float8_e4m3fn
    error, smallest_step = (codes.float() * scale - x).abs(), scale * 2**-9
    assert (error <= torch.maximum(x.abs() / 16, smallest_step / 2) * (1 + 1e-5)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_stays_so_and_touches_no_other(bad: float) -> None:
    linear = emulated(torch.randn(32, 64))
    x = torch.randn(4, 64).bfloat16()
    clean = linear(x)
    x[2, 7] = bad

    found = linear(x)

    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3]], clean[[0, 1, 3]])


def test_a_token_is_rounded_alone_whatever_batch_it_is_in() -> None:
    linear = emulated(torch.randn(32, 64))
    x = torch.randn(40, 64) * torch.logspace(-3, 3, 40)[:, None]

    assert torch.equal(linear.rounded(x)[17:18], linear.rounded(x[17:18]))


@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_the_product_of_the_tensor_cores_is_called_as_torch_defines_it(num_rows: int) -> None:
    """`_scaled_mm` also has a slow CPU version: what the call means is checked here, the kernels on a GPU."""
    weight, bias = torch.randn(48, 64) * 0.05, torch.randn(48)
    plain = emulated(weight, bias)
    linear = fp8._Fp8Linear(plain.codes, plain.scale, plain.bias, dtype=BF16, workspace=Workspace())  # type: ignore[arg-type]
    x = torch.randn(num_rows, 64).bfloat16()

    wanted = linear.rounded(x).double() @ linear.dequantize().double().t() + bias.bfloat16().double()

    assert float((linear(x).double() - wanted).norm() / wanted.norm()) < 6e-3


def test_weights_take_one_byte_and_an_emulation_says_what_it_is() -> None:
    linear = emulated(torch.randn(32, 64))

    assert linear.codes.dtype == torch.float8_e4m3fn
    assert linear.num_bytes == 32 * 64 + 32 * 4
    assert linear.kernel.startswith("emulation")
    assert linear.stored() is None


@pytest.mark.parametrize(
    ("capability", "member", "dtype", "message"),
    [
        ((8, 0), Fp8(), BF16, r"compute capability 8\.9 and above, this is one of 8\.0; use w8a8, or `emulated: true`"),
        ((8, 9), Fp8(emulated=True), BF16, "leave it out"),
        ((9, 0), Fp8(), torch.float16, "comes in bf16"),
        ((8, 0), Fp8(emulated=True), torch.float16, None),
        ((8, 9), Fp8(), BF16, None),
        ((10, 0), Fp8(), BF16, None),
    ],
    ids=str,
)
def test_a_gpu_runs_it_for_real_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], member: Fp8, dtype: torch.dtype, message: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    if message is None:
        member.check_device(torch.device("cuda"), dtype)
    else:
        with pytest.raises(ValueError, match=message):
            member.check_device(torch.device("cuda"), dtype)


def test_a_cpu_never_emulates_silently() -> None:
    with pytest.raises(ValueError, match="this is a CPU; use w8a8"):
        Fp8().pack(torch.randn(32, 64), None, dtype=BF16, workspace=Workspace())
    with pytest.raises(Unsupported, match=r"weights fp8: .*this is a CPU; use w8a8"):
        build_engine(tiny_spec(), EngineConfig(weights=Choice("fp8"), max_model_len=64))


def test_what_a_device_that_has_the_cores_put_in_the_cache_is_not_run_without_them() -> None:
    tensors = dict(emulated(torch.randn(32, 64)).named_buffers())

    with pytest.raises(ValueError, match="this is a CPU"):
        Fp8().restore(tensors, dtype=BF16, workspace=Workspace())


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "smoothquant"])
def test_methods_choose_its_codes(method: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weights = Choice.of("fp8", method=method, emulated=True)

    engine = build_engine(tiny_spec(), EngineConfig(max_batch_size=1, max_model_len=64, weights=weights))

    assert "emulation" in engine.facts()["kernels"]["weights"]
    assert len(generate(engine, request("one", 10, 5))["one"]) == 5


@pytest.mark.parametrize("size", [(24, 64), (32, 40)])
def test_a_size_that_the_tensor_cores_do_not_take_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        emulated(torch.randn(*size))


@pytest.mark.parametrize("bad", [1, "yes", None])
def test_emulated_is_a_plain_yes_or_no(bad: object) -> None:
    """`is_emulated` looks for true, so nothing else may switch it on."""
    with pytest.raises(ValueError, match="must be true or false"):
        Fp8(emulated=bad)  # type: ignore[arg-type]

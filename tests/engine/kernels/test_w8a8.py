"""The compiled 8-bit products against the plain operations, bit for bit: they decide what a trial computes."""

import pytest
import torch

from codesign.engine.kernels import w8a8
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.w8a8 import W8A8Kernel
from codesign.engine.quantize.formats.w8a8 import quantize_tokens

found = w8a8.load()
pytestmark = pytest.mark.skipif(isinstance(found, Missing), reason=str(found))
kernel: W8A8Kernel = found  # type: ignore[assignment]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [(1, 8), (3, 72), (17, 200)])
@pytest.mark.parametrize("spread", [1e-30, 1.0, 1e30])
def test_tokens_are_rounded_as_the_plain_path_rounds_them(
    dtype: torch.dtype, size: tuple[int, int], spread: float
) -> None:
    x = (torch.randn(size, generator=torch.Generator().manual_seed(0)) * spread).to(dtype)
    x[0] = 0  # a row without any value

    codes, scale = kernel.quantize(x)

    plain_codes, plain_scale = quantize_tokens(x)
    assert torch.equal(codes, plain_codes)
    assert torch.equal(scale, plain_scale)


def test_halves_round_to_even_and_the_largest_value_is_127() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 126.5]])

    codes, _ = kernel.quantize(x)

    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -127, 126]]


@pytest.mark.skipif(not isinstance(found, Missing) and found.max_rows(64) == 0, reason="no VNNI instructions here")
@pytest.mark.parametrize("num_in", [8, 64, 72, 136, 1024])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9, 16])
def test_sums_are_exact_at_any_length_and_at_the_extremes(num_rows: int, num_in: int) -> None:
    generator = torch.Generator().manual_seed(num_in)
    codes = torch.randint(-127, 128, (num_rows, num_in), dtype=torch.int8, generator=generator)
    weight = torch.randint(-128, 128, (24, num_in), dtype=torch.int8, generator=generator)
    codes[0], weight[0], weight[1] = 127, 127, -128

    assert torch.equal(kernel.sums(codes, weight).long(), codes.long() @ weight.long().t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_bias", [False, True])
def test_sums_become_outputs_as_the_plain_path_makes_them(dtype: torch.dtype, has_bias: bool) -> None:
    sums = torch.randint(-(10**7), 10**7, (5, 40), dtype=torch.int32)
    scale, weight_scale, bias = torch.rand(5, 1), torch.rand(40), torch.randn(40) if has_bias else None

    y = kernel.scaled(sums, scale, weight_scale, bias, dtype)

    plain = sums.float() * scale * weight_scale
    assert y.dtype == dtype
    assert torch.allclose(y.float(), plain if bias is None else plain + bias, rtol=2.0**-8, atol=1e-6)

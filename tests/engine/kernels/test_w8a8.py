"""The compiled 8-bit products against the plain operations, bit for bit: they decide what a trial computes."""

import pytest
import torch

from codesign.engine.kernels import w8a8
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.w8a8 import W8A8Kernel, from_blocks, to_blocks
from codesign.engine.quantize.formats.w8a8 import W8A8, quantize_tokens
from codesign.engine.quantize.linear import Workspace

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

    codes, scale, sums = kernel.quantize(x)

    plain_codes, plain_scale = quantize_tokens(x)
    assert torch.equal(codes, plain_codes)
    assert torch.equal(scale, plain_scale)
    assert torch.equal(sums.long(), plain_codes.long().sum(1))


def test_halves_round_to_even_and_the_largest_value_is_127() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 126.5]])

    codes, _, _ = kernel.quantize(x)

    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -127, 126]]


@pytest.mark.skipif(not isinstance(found, Missing) and not found.has_products, reason="no VNNI instructions here")
@pytest.mark.parametrize("num_in", [8, 72, 1024, 4096])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 8, 9, 16, 133])
def test_sums_are_exact_at_any_length_and_at_the_extremes(num_rows: int, num_in: int) -> None:
    generator = torch.Generator().manual_seed(num_in)
    x = torch.randn(num_rows, num_in, generator=generator)
    x[0] = 1.0
    weight = torch.randint(-127, 128, (48, num_in), dtype=torch.int8, generator=generator)
    weight[0], weight[1] = 127, -127
    codes, _, code_sums = kernel.quantize(x, is_padded=True)

    found = kernel.sums(codes, code_sums, to_blocks(weight))

    assert torch.equal(found.long(), codes.long() @ weight.long().t())


def test_blocks_are_another_order_of_the_same_codes() -> None:
    codes = torch.randint(-127, 128, (32, 24), dtype=torch.int8)

    blocks = to_blocks(codes)

    assert blocks.shape == (2, 6, 16, 4)
    assert int(blocks[1, 2, 3, 1]) == int(codes[16 + 3, 4 * 2 + 1]) + 128
    assert torch.equal(from_blocks(blocks), codes)


@pytest.mark.parametrize("is_blocked", [False, True])
def test_codes_kept_in_either_order_give_the_same_linear(is_blocked: bool) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    linear = W8A8().pack(weight, None, dtype=torch.bfloat16, workspace=Workspace())
    tensors = dict(linear.named_buffers())
    plain = tensors["codes"] if tensors["codes"].dim() == 2 else from_blocks(tensors["codes"])
    tensors["codes"] = to_blocks(plain) if is_blocked else plain

    restored = W8A8().restore(tensors, dtype=torch.bfloat16, workspace=Workspace())

    x = torch.randn(5, 64).bfloat16()
    assert torch.equal(restored(x), linear(x))
    assert torch.equal(restored.dequantize(), linear.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_bias", [False, True])
def test_sums_become_outputs_as_the_plain_path_makes_them(dtype: torch.dtype, has_bias: bool) -> None:
    sums = torch.randint(-(10**7), 10**7, (5, 40), dtype=torch.int32)
    scale, weight_scale, bias = torch.rand(5, 1), torch.rand(40), torch.randn(40) if has_bias else None

    y = kernel.scaled(sums, scale, weight_scale, bias, dtype)

    plain = sums.float() * scale * weight_scale
    assert y.dtype == dtype
    assert torch.allclose(y.float(), plain if bias is None else plain + bias, rtol=2.0**-8, atol=1e-6)

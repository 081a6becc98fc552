"""Each kernel against a float64 product of the very weights that it holds, by the norm of the difference."""

import pytest
import torch
from torch import Tensor

from codesign.engine.kernels.triton.affine import affine
from codesign.engine.kernels.triton.configs import Config
from codesign.engine.kernels.triton.nf4 import nf4
from codesign.engine.kernels.triton.w8a16 import w8a16
from codesign.engine.quantize.bit_packed import pack_bits
from codesign.engine.quantize.nf4_grid import Nf4Fit, Nf4Grid, levels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# |y - y64| / |y64|: y is rounded to its dtype once, by half a unit in the last place at most, and sums are fp32.
EPS = {torch.float32: 1e-6, torch.bfloat16: 2**-8 + 1e-6, torch.float16: 2**-11 + 1e-6}
# M, rows of a tile, splits
WORK = [(1, 16, 1), (3, 16, 2), (16, 16, 4), (17, 16, 1), (64, 64, 2)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def guarded(tensor: Tensor) -> Tensor:
    """The same values, with NaN (or the largest codes) right behind them: reading on shows."""
    behind = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    buffer = torch.full((tensor.numel() + 4096,), behind, dtype=tensor.dtype)
    buffer[: tensor.numel()] = tensor.flatten()
    return buffer[: tensor.numel()].view(tensor.shape)


def rows_of(num_rows: int, num_in: int, dtype: torch.dtype) -> Tensor:
    return guarded(torch.randn(num_rows, num_in).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(40, 48), (96, 144)])
def test_w8a16(dtype: torch.dtype, size: tuple[int, int]) -> None:
    codes, scale = torch.randint(-127, 128, size, dtype=torch.int8), (torch.rand(size[0]) * 0.1).to(dtype)
    weight = codes.double() * scale.double()[:, None]

    for num_rows, block_m, split_k in WORK:
        config = Config(block_m=block_m, block_n=32, block_k=32, split_k=split_k)
        x = rows_of(num_rows, size[1], dtype)
        y = w8a16(x, guarded(codes), guarded(scale), config=config)

        assert y.dtype == dtype
        assert relative_error(y, x.double() @ weight.t()) < EPS[dtype], num_rows


def affine_weight(
    bits: int, num_out: int, num_in: int, group_size: int, dtype: torch.dtype, is_symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """packed, scale, offset and the float64 weight."""
    codes = torch.randint(0, 2**bits, (num_out, num_in), dtype=torch.uint8)
    codes[0], codes[1] = 0, 2**bits - 1
    scale = (torch.rand(num_out, num_in // group_size) * 0.1).to(dtype)
    offset = None if is_symmetric else (torch.randn(scale.shape) * 0.1).to(dtype)
    weight = (codes.double() - 2 ** (bits - 1)).view(num_out, -1, group_size) * scale.double()[..., None]
    if offset is not None:
        weight = weight + offset.double()[..., None]
    packed = guarded(pack_bits(codes, bits))
    return packed, guarded(scale), None if offset is None else guarded(offset), weight.flatten(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "is_symmetric"), [(2, True), (3, False), (4, True), (4, False)])
def test_affine(dtype: torch.dtype, bits: int, is_symmetric: bool) -> None:
    # fp32 activations go with 16-bit scales
    stored = torch.bfloat16 if dtype == torch.float32 else dtype
    packed, scale, offset, weight = affine_weight(bits, 40, 96, 32, stored, is_symmetric)

    for num_rows, block_m, split_k in WORK:
        x = rows_of(num_rows, 96, dtype)
        config = Config(block_m=block_m, block_n=32, block_k=32, split_k=split_k)
        y = affine(x, packed, scale, offset, bits=bits, config=config)

        assert y.dtype == dtype
        assert relative_error(y, x.double() @ weight.t()) < EPS[dtype], num_rows


@pytest.mark.parametrize(("group_size", "block_k"), [(16, 16), (32, 16), (64, 64), (128, 32), (256, 128)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_affine_in_groups_of_every_size(bits: int, group_size: int, block_k: int) -> None:
    num_in = 3 * max(group_size, 32)
    packed, scale, offset, weight = affine_weight(bits, 48, num_in, group_size, torch.float16, False)
    x = rows_of(5, num_in, torch.float16)

    y = affine(x, packed, scale, offset, bits=bits, config=Config(block_m=16, block_n=64, block_k=block_k, split_k=2))

    assert relative_error(y, x.double() @ weight.t()) < EPS[torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4(dtype: torch.dtype) -> None:
    """336 scales, so that two steps matter; levels are rounded to a 16-bit dtype, which adds as much error again."""
    grid = Nf4Grid()
    weight = torch.randn(48, 448) * torch.rand(48, 1)
    fit = grid.fit(weight)
    assert isinstance(fit, Nf4Fit) and fit.scale_codes is not None
    quantized, scales = grid.quantize(weight, fit), fit.scale_codes
    expected, packed = grid.dequantize(quantized).double(), guarded(pack_bits(quantized.codes, 4))

    for num_rows, block_m, split_k in WORK:
        x = rows_of(num_rows, 448, dtype)
        config = Config(block_m=block_m, block_n=32, block_k=64, split_k=split_k)
        y = nf4(x, packed, levels().to(dtype), scales.codes, scales.step, scales.mean, config=config)

        assert y.dtype == dtype
        assert relative_error(y, x.double() @ expected.t()) < 1.5 * EPS[dtype], num_rows


def test_a_negative_nf4_scale_is_zero() -> None:
    packed = torch.full((16, 32), 0xFF, dtype=torch.uint8)
    codes = torch.full((16, 1), -100, dtype=torch.int8)
    x = torch.ones(1, 64)

    y = nf4(
        x, packed, levels(), codes, torch.ones(1), torch.tensor(50.0), config=Config(block_m=16, block_n=16, block_k=64)
    )

    assert torch.equal(y, torch.zeros(1, 16))


def test_sums_of_unscaled_codes_do_not_overflow_fp16() -> None:
    x, scale = torch.full((2, 64), 60000.0).half(), torch.full((32,), 1e-4).half()
    codes = torch.full((32, 64), 127, dtype=torch.int8)
    codes[:, ::2] = -126
    config = Config(block_m=16, block_n=32, block_k=32)

    y = w8a16(x, codes, scale, config=config)
    packed = pack_bits(torch.full((32, 64), 15, dtype=torch.uint8), 4)
    z = affine(x, packed, scale[:, None].expand(32, 2).contiguous(), None, bits=4, config=config)

    assert relative_error(y, torch.full((2, 32), 60000.0 * 32 * float(scale[0])).double()) < EPS[torch.float16]
    assert relative_error(z, torch.full((2, 32), 60000.0 * 64 * 7 * float(scale[0])).double()) < EPS[torch.float16]


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_bf16_of_extreme_size(size: float) -> None:
    x, scale = (torch.randn(3, 64) * size).bfloat16(), torch.rand(32).bfloat16()
    codes = torch.randint(-127, 128, (32, 64), dtype=torch.int8)

    y = w8a16(x, codes, scale, config=Config(block_m=16, block_n=32, block_k=32, split_k=2))

    assert relative_error(y, x.double() @ (codes.double() * scale.double()[:, None]).t()) < EPS[torch.bfloat16]


def test_what_is_not_finite_stays_in_its_row() -> None:
    packed, scale, offset, weight = affine_weight(4, 32, 64, 32, torch.float16, False)
    x = torch.randn(5, 64)
    x[2, 7] = float("nan")
    x[3] = 0

    y = affine(x, packed, scale, offset, bits=4, config=Config(block_m=16, block_n=32, block_k=32))

    assert bool(y[2].isnan().all())
    assert torch.equal(y[3], torch.zeros(32))
    kept = torch.tensor([0, 1, 4])
    assert relative_error(y[kept], x[kept].double() @ weight.t()) < EPS[torch.float32]


def test_splits_are_added_in_one_order() -> None:
    packed, scale, offset, _ = affine_weight(4, 32, 256, 32, torch.float16, False)
    x = torch.randn(3, 256)
    config = Config(block_m=16, block_n=32, block_k=32, split_k=4)

    assert torch.equal(
        affine(x, packed, scale, offset, bits=4, config=config), affine(x, packed, scale, offset, bits=4, config=config)
    )


def test_views_that_are_not_contiguous_are_taken() -> None:
    codes, scale = torch.randint(-127, 128, (32, 64), dtype=torch.int8), torch.rand(32)
    x = torch.randn(64, 6).t()

    y = w8a16(x, codes, scale, config=Config(block_m=16, block_n=32, block_k=32))

    assert relative_error(y, x.double() @ (codes.double() * scale.double()[:, None]).t()) < EPS[torch.float32]

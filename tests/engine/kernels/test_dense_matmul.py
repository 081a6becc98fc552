"""The compiled bf16 product against fp64, and against itself with other rows and threads beside."""

import pytest
import torch

from codesign.engine.kernels import dense_matmul
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.dense_matmul import OUTPUTS, DenseMatmul

found = dense_matmul.load()
pytestmark = pytest.mark.skipif(isinstance(found, Missing), reason=str(found))
kernel: DenseMatmul = found  # type: ignore[assignment]
SIZES = [(1, 1), (31, 7), (32, 16), (33, 17), (100, 200), (64, 4096)]  # (out, in)


def weight_of(num_out: int, num_in: int) -> torch.Tensor:
    return torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(num_in)).bfloat16()


def rows_of(num_rows: int, num_in: int) -> torch.Tensor:
    return torch.randn(num_rows, num_in, generator=torch.Generator().manual_seed(num_rows)).bfloat16()


def padded(bias: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    return torch.cat((bias, torch.zeros(blocks.shape[0] * OUTPUTS - len(bias))))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 11, 12, 13, 25, 133])
def test_products_are_those_of_fp64(num_rows: int, size: tuple[int, int]) -> None:
    weight, x = weight_of(*size), rows_of(num_rows, size[1])
    bias = torch.randn(size[0])
    blocks = kernel.pack(weight)

    wide = kernel.multiply(x, blocks, padded(bias, blocks), num_out=size[0], dtype=torch.float32)
    rounded = kernel.multiply(x, blocks, padded(bias, blocks), num_out=size[0])

    expected = x.double() @ weight.double().t() + bias.double()
    scale = x.double().abs() @ weight.double().abs().t() + bias.double().abs()
    assert bool(((wide.double() - expected).abs() <= 1e-5 * scale).all())
    assert torch.equal(rounded, wide.bfloat16())


@pytest.mark.parametrize("num_rows", [2, 12, 32, 50, 300])
def test_a_row_does_not_depend_on_its_neighbours(num_rows: int) -> None:
    """Rows beyond one pass over the weights too: 300 rows of 4096 inputs do not stay in the L2 cache."""
    weight, x = weight_of(70, 4096), rows_of(num_rows, 4096)
    blocks = kernel.pack(weight)

    together = kernel.multiply(x, blocks, None, num_out=70)

    alone = torch.cat([kernel.multiply(row[None], blocks, None, num_out=70) for row in x])
    assert torch.equal(together, alone)


def test_the_number_of_threads_changes_no_bit() -> None:
    weight, x = weight_of(320, 200), rows_of(30, 200)
    blocks, threads = kernel.pack(weight), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(kernel.multiply(x, blocks, None, num_out=320))
    finally:
        torch.set_num_threads(threads)

    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("size", SIZES)
def test_weights_come_back_from_their_blocks(size: tuple[int, int]) -> None:
    weight = weight_of(*size)

    assert torch.equal(kernel.unpack(kernel.pack(weight), num_out=size[0], num_in=size[1]), weight)


def test_rows_that_are_a_view_are_read_as_they_look() -> None:
    weight, x = weight_of(40, 24), rows_of(10, 48)[::2, ::2]
    blocks = kernel.pack(weight)

    assert torch.equal(
        kernel.multiply(x, blocks, None, num_out=40), kernel.multiply(x.clone(), blocks, None, num_out=40)
    )


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_one_and_spoils_no_other_row(wrong: float) -> None:
    weight, x = weight_of(40, 24), rows_of(14, 24)
    blocks = kernel.pack(weight)
    clean = kernel.multiply(x, blocks, None, num_out=40)
    x[3, 5] = wrong

    spoilt = kernel.multiply(x, blocks, None, num_out=40)

    assert not bool(spoilt[3].isfinite().any())
    others = [row for row in range(14) if row != 3]
    assert torch.equal(spoilt[others], clean[others])

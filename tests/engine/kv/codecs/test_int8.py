import pytest
import torch

from codesign.engine.kv.codecs.int8 import Int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_no_value_is_off_by_more_than_half_a_step(dtype: torch.dtype, size: float) -> None:
    rows = (torch.randn(4, 50, 64, generator=torch.Generator().manual_seed(0)) * size).clamp(-6e4, 6e4).to(dtype)
    codec = Int8()
    error = (codec.decode(codec.encode(rows), torch.float32) - rows.float()).abs()

    step = rows.float().abs().amax(dim=-1, keepdim=True) / 127
    assert (error <= 0.505 * step).all()


def test_rows_of_zeros_stay_zeros() -> None:
    codec = Int8()

    assert torch.equal(codec.decode(codec.encode(torch.zeros(3, 8)), torch.float32), torch.zeros(3, 8))


def test_what_is_not_finite_is_not_hidden() -> None:
    rows = torch.ones(3, 8)
    rows[0, 2], rows[1, 3] = float("nan"), float("inf")
    codec = Int8()
    decoded = codec.decode(codec.encode(rows), torch.float32)

    assert not decoded[0].isfinite().all()
    assert not decoded[1].isfinite().all()
    torch.testing.assert_close(decoded[2], rows[2], rtol=0, atol=0.005)


def test_a_scale_of_two_bytes_loses_nothing_against_one_of_four() -> None:
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    exact = rows.abs().amax(dim=-1, keepdim=True) / 127
    with_four = ((rows / exact).round() * exact - rows).pow(2).mean()
    codec = Int8()
    with_two = (codec.decode(codec.encode(rows), torch.float32) - rows).pow(2).mean()

    assert with_two < 1.01 * with_four

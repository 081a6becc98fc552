import pytest
import torch

from codesign.engine.models.decoder import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 256), (7, 3, 64), (300, 896)])
def test_norm_is_that_of_transformers_in_its_order_of_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    weight = torch.rand(shape[-1], generator=generator).to(dtype)
    before = x.clone()
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)

    found = RMSNorm(weight, 1e-6)(x)

    assert found.dtype == dtype and torch.equal(x, before)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    assert ((found - expected).abs() <= tolerance * expected.abs().clamp(min=1e-6)).all()
    if dtype != torch.float32:  # another order of casts changes a quarter of the values
        assert (found == expected).float().mean() > 0.99


def test_norm_of_zeros_is_zero() -> None:
    assert torch.equal(RMSNorm(torch.ones(8), 1e-6)(torch.zeros(2, 8)), torch.zeros(2, 8))

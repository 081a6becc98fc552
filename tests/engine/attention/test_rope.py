import math

import torch

from codesign.engine.attention.rope import Rope, rotate

CPU = torch.device("cpu")
INV_FREQ = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)


def test_rotation_turns_half_split_pairs_by_position_times_frequency() -> None:
    cos, signed_sin = Rope(INV_FREQ).tables(50, CPU)
    x = torch.randn(8)
    turned = rotate(x, cos[37], signed_sin[37])

    for pair in range(4):
        angle = 37 * float(INV_FREQ[pair])
        first, second = float(x[pair]), float(x[pair + 4])
        assert math.isclose(float(turned[pair]), first * math.cos(angle) - second * math.sin(angle), abs_tol=1e-5)
        assert math.isclose(float(turned[pair + 4]), second * math.cos(angle) + first * math.sin(angle), abs_tol=1e-5)


def test_products_see_only_distances() -> None:
    cos, signed_sin = Rope(INV_FREQ).tables(200, CPU)
    q, k = torch.randn(8), torch.randn(8)
    near = rotate(q, cos[30], signed_sin[30]) @ rotate(k, cos[13], signed_sin[13])
    far = rotate(q, cos[130], signed_sin[130]) @ rotate(k, cos[113], signed_sin[113])

    torch.testing.assert_close(near, far, rtol=0, atol=1e-4)


def test_attention_scaling_multiplies_both_tables() -> None:
    plain, scaled = Rope(INV_FREQ).tables(9, CPU), Rope(INV_FREQ, 1.25).tables(9, CPU)

    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other, one * 1.25)


def test_rotation_keeps_the_dtype_and_rounds_once() -> None:
    cos, signed_sin = Rope(INV_FREQ).tables(50, CPU)
    x = torch.randn(5, 8, dtype=torch.bfloat16)
    turned = rotate(x, cos[:5], signed_sin[:5])

    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), cos[:5], signed_sin[:5]).bfloat16())

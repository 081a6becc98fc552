import pytest
import torch

from codesign.engine.quantize.formats.int8 import Int8
from codesign.engine.quantize.linear import Workspace


def test_bytes_are_as_theory_says() -> None:
    linear = Int8().pack(torch.randn(512, 1024), None, dtype=torch.bfloat16, workspace=Workspace())

    assert linear.num_bytes * 8 / (512 * 1024) == pytest.approx(8 + 16 / 1024, rel=0.01)


@pytest.mark.parametrize("num_in", [8, 24, 33, 100])
def test_an_input_size_that_aten_would_read_past_is_refused(num_in: int) -> None:
    """The kernel has no tail loop: at these sizes it reads outside the weight and can fault."""
    with pytest.raises(ValueError, match="multiple of 16"):
        Int8().pack(torch.randn(32, num_in), None, dtype=torch.bfloat16, workspace=Workspace())


@pytest.mark.parametrize("num_out", [1, 2, 3, 7, 33])
def test_any_output_size_is_held(num_out: int) -> None:
    weight, x = torch.randn(num_out, 64), torch.randn(5, 64).bfloat16()
    linear = Int8().pack(weight, None, dtype=torch.bfloat16, workspace=Workspace())

    torch.testing.assert_close(linear(x).double(), x.double() @ linear.dequantize().double().t(), rtol=0.01, atol=0.05)


def test_codes_that_sum_past_fp16_do_not_overflow() -> None:
    weight = torch.full((32, 4096), 0.01)
    linear = Int8().pack(weight, None, dtype=torch.float16, workspace=Workspace())

    found = linear(torch.full((133, 4096), 8.0, dtype=torch.float16))

    torch.testing.assert_close(found.float(), torch.full((133, 32), 0.01 * 8 * 4096), rtol=2e-3, atol=0)

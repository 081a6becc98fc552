import pytest
import torch

from codesign.engine.quantize import cpu
from codesign.engine.quantize.formats.int4 import Int4
from codesign.engine.quantize.linear import Workspace

EPS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_are_as_theory_says(group_size: int, dtype: torch.dtype) -> None:
    linear = Int4(group_size=group_size).pack(torch.randn(512, 1024), None, dtype=dtype, workspace=Workspace())

    assert linear.num_bytes * 8 / (512 * 1024) == pytest.approx(4 + 32 / group_size, rel=0.01)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 7, 32, 65])
def test_every_group_size_multiplies_as_its_dequantised_weight(
    group_size: int, dtype: torch.dtype, num_rows: int
) -> None:
    linear = Int4(group_size=group_size).pack(torch.randn(144, 768), None, dtype=dtype, workspace=Workspace())
    x = torch.randn(num_rows, 768).to(dtype)

    expected = x.double() @ linear.dequantize().double().t()
    assert float((linear(x).double() - expected).norm() / expected.norm()) < EPS[dtype]


@pytest.mark.parametrize("group_size", [0, 1, 16, 48, 512, -64, True])
def test_group_sizes_without_a_kernel_are_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match="group_size must be one of"):
        Int4(group_size=group_size)


def test_an_output_size_that_does_not_fit_names_the_multiple() -> None:
    with pytest.raises(ValueError, match="multiple of 16, got 40"):
        Int4().pack(torch.randn(40, 64), None, dtype=torch.bfloat16, workspace=Workspace())


def test_an_input_size_that_does_not_fit_names_the_group_sizes_that_do() -> None:
    with pytest.raises(ValueError, match=r"multiple of group_size 128, got 192; this layer takes group_size 32, 64"):
        Int4(group_size=128).pack(torch.randn(32, 192), None, dtype=torch.bfloat16, workspace=Workspace())


def test_an_unknown_packing_order_is_refused_instead_of_computing_nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    other = "AVX512" if cpu.capability() != "AVX512" else "AVX2"
    monkeypatch.setattr(cpu, "capability", lambda: other)

    with pytest.raises(ValueError, match="order that is not known"):
        Int4().pack(torch.randn(64, 64), None, dtype=torch.bfloat16, workspace=Workspace())


def test_the_workspace_stays_a_slice_of_one_layer() -> None:
    workspace = Workspace()
    linear = Int4().pack(torch.randn(4096, 1024), None, dtype=torch.bfloat16, workspace=workspace)

    linear(torch.randn(1030, 1024).bfloat16())

    assert 0 < workspace.num_bytes <= 4 * 2**20

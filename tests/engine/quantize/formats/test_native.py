import pytest
import torch

from codesign.engine.quantize import cpu, half_packed
from codesign.engine.quantize.formats.native import Native
from codesign.engine.quantize.linear import Workspace

EPS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.mark.parametrize(("dtype", "num_bits"), [(torch.float32, 32), (torch.bfloat16, 16), (torch.float16, 16)])
def test_bytes_are_those_of_the_dtype(dtype: torch.dtype, num_bits: int) -> None:
    linear = Native().pack(torch.randn(512, 1024), None, dtype=dtype, workspace=Workspace())

    assert linear.num_bytes * 8 / (512 * 1024) == pytest.approx(num_bits, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_the_dtype_come_back_exactly(dtype: torch.dtype) -> None:
    weight = (torch.randn(48, 100) * 0.02).to(dtype)
    weight[weight.abs() < 2.0**-17] = 0

    linear = Native().pack(weight, None, dtype=dtype, workspace=Workspace())

    assert torch.equal(linear.dequantize(), weight.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 4, 40])
def test_a_wrapped_tensor_multiplies_and_is_not_copied(dtype: torch.dtype, num_rows: int) -> None:
    weight = torch.randn(1000, 96).to(dtype)

    linear = Native().wrap(weight, None, workspace=Workspace())

    assert [buffer.data_ptr() for buffer in linear.buffers()] == [weight.data_ptr()]
    assert linear.opaque_bytes == 0
    x = torch.randn(num_rows, 96).to(dtype)
    expected = x.double() @ weight.double().t()
    assert float((linear(x).double() - expected).norm()) <= EPS[dtype] * float(expected.norm())


@pytest.mark.parametrize("scale", [1e-7, 1e6])
def test_bf16_weights_that_fp16_cannot_hold_keep_their_values(scale: float) -> None:
    weight = (torch.randn(64, 64) * scale).bfloat16()

    linear = Native().pack(weight, None, dtype=torch.bfloat16, workspace=Workspace())

    assert not half_packed.holds(weight)
    assert torch.equal(linear.dequantize(), weight.float())
    x = torch.randn(5, 64).bfloat16()
    expected = x.double() @ weight.double().t()
    assert float((linear(x).double() - expected).norm() / expected.norm()) < EPS[torch.bfloat16]


@pytest.mark.skipif(not cpu.has_half_packed_kernel(), reason="this build of torch has no FBGEMM fp16 kernel")
def test_opaque_bytes_are_what_the_process_grows_by() -> None:
    def resident_bytes() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    weight = torch.randn(4096, 4096).bfloat16()
    half_packed.HalfPackedLinear(weight, None)  # what the first one costs once
    before = resident_bytes()
    linears = [half_packed.HalfPackedLinear(weight, None) for _ in range(3)]
    grown = resident_bytes() - before

    assert sum(linear.num_bytes for linear in linears) == pytest.approx(grown, rel=0.1)


@pytest.mark.skipif(not cpu.has_half_packed_kernel(), reason="this build of torch has no FBGEMM fp16 kernel")
@pytest.mark.parametrize("num_out", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("num_in", [1, 7, 511, 513, 1100])
def test_half_packed_takes_any_size(num_out: int, num_in: int) -> None:
    weight, bias = torch.randn(num_out, num_in).half(), torch.randn(num_out).half()
    linear = half_packed.HalfPackedLinear(weight, bias)

    for num_rows in (1, 6, 7, 15):
        x = torch.randn(num_rows, num_in).half()
        expected = x.double() @ weight.double().t() + bias.double()
        assert float((linear(x).double() - expected).norm() / expected.norm()) < EPS[torch.float16]

"""The way of CUDA from format to kernel, driven on CPU tensors, which the interpreter has laid out as on CUDA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codesign.engine.build import build_engine
from codesign.engine.kernels.triton import available
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.quantize.bit_packed import BitPackedLinear
from codesign.engine.quantize.format import GridFormat
from codesign.engine.quantize.linear import Workspace
from codesign.registry import WEIGHT_FORMATS
from codesign.spec.engine_config import EngineConfig
from tests.engine.driving import generate, request

KERNELS = {"int8": "w8a16", "int4": "w4a16", "int3": "w3a16", "int2": "w2a16", "nf4": "nf4"}
EPS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def pack(name: str, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, **knobs: Any) -> Any:
    member: GridFormat = WEIGHT_FORMATS.create(name, **knobs)
    return member.pack(weight, bias, dtype=dtype, workspace=Workspace())


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("name", KERNELS)
def test_few_rows_take_the_kernel_and_many_the_slices(name: str, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(48, 128) * 0.05, torch.randn(48)
    linear = pack(name, weight, bias, dtype)
    expected = linear.dequantize().double()

    assert linear.kernel.startswith(f"triton::{KERNELS[name]} (M<={linear.kernel_max_rows}, a guess; 16x")
    assert "not tuned on the interpreter" in linear.kernel
    assert "unpack + aten::mm" in linear.kernel.split("), ")[-1]
    for num_rows in (1, 5, linear.kernel_max_rows, linear.kernel_max_rows + 1):
        x = torch.randn(num_rows, 128).to(dtype)
        y = linear(x)
        wanted = x.double() @ expected.t() + bias.to(dtype).double()
        assert y.dtype == dtype
        assert float((y.double() - wanted).norm() / wanted.norm()) < EPS[dtype], num_rows


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_is_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = pack(name, torch.randn(32, 64), None, torch.bfloat16)
    monkeypatch.setattr(linear, "unpack", None)

    assert linear(torch.randn(2, 64).bfloat16()).shape == (2, 32)
    with pytest.raises(TypeError):
        linear(torch.randn(linear.kernel_max_rows + 1, 64).bfloat16())


@pytest.mark.parametrize("name", KERNELS)
def test_a_linear_comes_back_from_its_buffers(name: str) -> None:
    linear = pack(name, torch.randn(32, 64), torch.randn(32), torch.bfloat16)
    x = torch.randn(5, 64).bfloat16()

    found = WEIGHT_FORMATS.create(name).restore(
        dict(linear.named_buffers()), dtype=torch.bfloat16, workspace=Workspace()
    )

    assert torch.equal(found(x), linear(x))
    assert found.kernel == linear.kernel


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_int4_is_laid_out_in_neighbouring_nibbles(is_symmetric: bool) -> None:
    """And holds the codes that its grid chose; symmetric weights need no offset."""
    weight = torch.randn(32, 64)
    linear = pack("int4", weight, None, torch.bfloat16, symmetric=is_symmetric, group_size=32)
    member = WEIGHT_FORMATS.create("int4", symmetric=is_symmetric, group_size=32)
    grid = member.grid(torch.bfloat16)
    quantized = grid.quantize(weight, grid.fit(weight))

    assert isinstance(linear, BitPackedLinear)
    assert (linear.offset is None) == is_symmetric
    assert torch.equal(linear.packed & 15, quantized.codes[:, ::2])
    assert torch.equal(linear.packed >> 4, quantized.codes[:, 1::2])
    assert torch.equal(linear.dequantize(), grid.dequantize(quantized))
    assert torch.equal(linear.stored().quantized.codes, quantized.codes)


def test_a_group_that_no_block_fits_says_so_and_is_unpacked() -> None:
    linear = pack("int2", torch.randn(32, 48), None, torch.bfloat16, group_size=24)

    assert linear.kernel.endswith("; triton: groups of 24, not of (16, 32, 64, 128, 256)")
    assert linear(torch.randn(2, 48).bfloat16()).shape == (2, 32)


def test_without_triton_the_reason_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = available.Missing("the package triton is not installed")
    monkeypatch.setattr(available, "missing", lambda device: reason)
    linear = pack("int4", torch.randn(32, 64), None, torch.float32)

    assert linear.kernel.endswith("unpack + aten::mm float32; triton: the package triton is not installed")
    assert linear(torch.randn(2, 64)).shape == (2, 32)


def test_the_kernel_is_tried_before_it_is_trusted() -> None:
    assert available.missing(torch.device("cpu")) is None


@pytest.mark.parametrize("weights", ["int8", {"name": "int4", "group_size": 32}])
def test_an_engine_runs_on_them_and_says_so(weights: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = EngineConfig.from_dict({"dtype": "fp32", "max_batch_size": 2, "max_model_len": 64, "weights": weights})

    engine = build_engine(tiny_spec(), config)

    assert "triton::w" in str(engine.facts())
    assert len(generate(engine, request("r", 8, 3, ignore_eos=True))["r"]) == 3

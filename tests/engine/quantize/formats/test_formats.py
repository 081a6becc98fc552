"""What every weight format owes, over the registry: a new file is picked up by itself."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from codesign.engine.kernels import packed_matmul, unpack, w8a8
from codesign.engine.kernels.compiled import Missing
from codesign.engine.quantize.format import GridFormat, WeightFormat
from codesign.engine.quantize.linear import Linear, Workspace
from codesign.registry import WEIGHT_FORMATS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
# Relative error of rounding normal weights to nearest, at each format's own group size.
LOSES = {"mixed": 0.12, "int8": 0.01, "w8a8": 0.01, "fp8": 0.03, "int4": 0.12, "nf4": 0.11, "int3": 0.25, "int2": 0.5}
ROWS = [1, 2, 3, 5, 8, 9, 16, 31, 64]


@pytest.fixture(autouse=True, params=["compiled", "aten"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything holds with our compiled kernels, and without them."""
    if request.param == "aten":
        for kernel in (packed_matmul, unpack, w8a8):
            monkeypatch.setattr(kernel, "load", lambda: Missing("switched off by a test"))
    elif isinstance(reason := packed_matmul.load(), Missing):
        pytest.skip(reason.reason)
    yield


def make(name: str) -> Any:
    """The member as it runs on a CPU: where its arithmetic is not a CPU's, emulated."""
    knobs = {"emulated": True} if "emulated" in WEIGHT_FORMATS.knobs(name) else {}
    member: WeightFormat = WEIGHT_FORMATS.create(name, **knobs)
    return member


def dense(num_out: int, num_in: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_out, num_in, generator=generator) * 0.05, torch.randn(num_out, generator=generator)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def plain(linear: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
    """The slow path in float64, from the very weights that the fast one holds."""
    product = linear.rounded(x).double() @ linear.dequantize().double().t()
    return product if bias is None else product + bias.to(x.dtype).double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHT_FORMATS.names())
def test_unrounded_results_are_those_of_forward_before_they_are_rounded(name: str, dtype: torch.dtype) -> None:
    linear = make(name).pack(dense(208, 256)[0], None, dtype=dtype, workspace=Workspace())

    for num_rows in ROWS:
        x = torch.randn(num_rows, 256).to(dtype)
        rounded, wide = linear(x), linear.wide(x)
        exact = plain(linear, x, None)
        assert wide.shape == rounded.shape
        if num_rows:
            assert float((wide.to(dtype) != rounded).double().mean()) < 0.02
            assert relative_error(wide, exact) <= relative_error(rounded, exact) * 1.01 + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHT_FORMATS.names())
@pytest.mark.parametrize("size", [(48, 128), (208, 256), (640, 896)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_fast_path_equals_dequantise_then_multiply(
    name: str, dtype: torch.dtype, size: tuple[int, int], has_bias: bool
) -> None:
    weight, bias = dense(*size)
    linear = make(name).pack(weight, bias if has_bias else None, dtype=dtype, workspace=Workspace())

    for num_rows in ROWS:
        x = torch.randn(num_rows, size[1]).to(dtype)
        found = linear(x)

        assert found.dtype == dtype
        assert found.shape == (num_rows, size[0])
        assert relative_error(found, plain(linear, x, bias if has_bias else None)) < EPS[dtype], (
            num_rows,
            linear.kernel,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_row_count_where_kernels_change_changes_nothing_else(name: str, dtype: torch.dtype) -> None:
    weight, bias = dense(64, 128)
    linear = make(name).pack(weight, bias, dtype=dtype, workspace=Workspace())
    edge: int = linear.kernel_max_rows  # type: ignore[assignment]
    x = torch.randn(edge + 2, 128).to(dtype)

    for num_rows in range(max(edge - 1, 1), edge + 3):
        assert relative_error(linear(x[:num_rows]), plain(linear, x[:num_rows], bias)) < EPS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHT_FORMATS.names())
def test_weights_survive_within_what_the_format_may_lose(name: str, dtype: torch.dtype) -> None:
    weight, _ = dense(96, 256)
    linear = make(name).pack(weight, None, dtype=dtype, workspace=Workspace())

    found = linear.dequantize()

    assert found.dtype == torch.float32
    assert found.shape == weight.shape
    assert relative_error(found, weight.double()) < LOSES.get(name, EPS[dtype])


@pytest.mark.parametrize("name", WEIGHT_FORMATS.names())
def test_no_rows_give_no_rows(name: str) -> None:
    weight, bias = dense(32, 64)
    linear = make(name).pack(weight, bias, dtype=torch.bfloat16, workspace=Workspace())

    assert linear(torch.empty(0, 64, dtype=torch.bfloat16)).shape == (0, 32)


@pytest.mark.parametrize("name", WEIGHT_FORMATS.names())
@pytest.mark.parametrize("num_rows", [1, 40])
def test_views_of_any_offset_and_stride_are_taken(name: str, num_rows: int) -> None:
    """A kernel with aligned loads dies on a view that starts at an odd address, so each is tried."""
    weight, _ = dense(64, 64)
    linear = make(name).pack(weight, None, dtype=torch.bfloat16, workspace=Workspace())
    buffer = torch.randn(num_rows * 64 + 40).bfloat16()

    for offset in range(0, 34):
        x = buffer[offset : offset + num_rows * 64].view(num_rows, 64)
        assert relative_error(linear(x), plain(linear, x, None)) < EPS[torch.bfloat16]
    strided = torch.randn(64, num_rows).bfloat16().t()
    assert relative_error(linear(strided), plain(linear, strided, None)) < EPS[torch.bfloat16]


@pytest.mark.parametrize("name", WEIGHT_FORMATS.names())
def test_layers_of_different_sizes_share_one_workspace(name: str) -> None:
    workspace = Workspace()
    big, small = dense(512, 2048), dense(64, 128, seed=1)
    first = make(name).pack(big[0], None, dtype=torch.float16, workspace=workspace)
    second = make(name).pack(small[0], None, dtype=torch.float16, workspace=workspace)
    x, z = torch.randn(70, 2048).half(), torch.randn(70, 128).half()

    before = first(x)
    second(z)

    assert torch.equal(first(x), before)
    assert workspace.num_bytes <= 512 * 2048 * 4


@pytest.mark.parametrize("name", WEIGHT_FORMATS.names())
def test_the_source_weight_is_left_alone(name: str) -> None:
    weight, bias = dense(64, 64)
    kept, kept_bias = weight.clone(), bias.clone()

    linear = make(name).pack(weight, bias, dtype=torch.bfloat16, workspace=Workspace())
    linear(torch.randn(3, 64).bfloat16())

    assert torch.equal(weight, kept)
    assert torch.equal(bias, kept_bias)


@pytest.mark.parametrize("name", WEIGHT_FORMATS.names())
def test_every_result_names_its_kernels(name: str) -> None:
    weight, _ = dense(64, 64)

    for dtype in DTYPES:
        assert "::" in make(name).pack(weight, None, dtype=dtype, workspace=Workspace()).kernel


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_record_says_whose_kernel_ran_and_why(name: str, request: pytest.FixtureRequest) -> None:
    weight, _ = dense(64, 64)

    kernel = make(name).pack(weight, None, dtype=torch.bfloat16, workspace=Workspace()).kernel

    if "compiled" in request.node.callspec.id:
        assert f"codesign::{name}_matmul" in kernel
    else:
        assert "codesign::" not in kernel
        assert "switched off by a test" in kernel


@pytest.mark.parametrize("name", [name for name in WEIGHT_FORMATS.names() if isinstance(make(name), GridFormat)])
def test_a_linear_comes_back_from_its_buffers(name: str) -> None:
    """What the cache on disk keeps is all there is."""
    weight, bias = dense(64, 128)
    member = make(name)
    linear = member.pack(weight, bias, dtype=torch.bfloat16, workspace=Workspace())
    x = torch.randn(5, 128).bfloat16()

    found = member.restore(dict(linear.named_buffers()), dtype=torch.bfloat16, workspace=Workspace())

    assert torch.equal(found(x), linear(x))
    assert found.num_bytes == linear.num_bytes


@pytest.mark.parametrize("name", WEIGHT_FORMATS.names())
def test_members_are_frozen_knobs(name: str) -> None:
    member = make(name)

    assert dataclasses.is_dataclass(member)
    assert hash(member) == hash(make(name))


@pytest.mark.parametrize("name", sorted(LOSES))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_quantising_refuses_weights_that_are_not_finite(name: str, bad: float) -> None:
    weight, _ = dense(64, 64)
    weight[7, 7] = bad

    with pytest.raises(ValueError, match="not finite"):
        make(name).pack(weight, None, dtype=torch.bfloat16, workspace=Workspace())

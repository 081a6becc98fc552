"""`shadow: true`: a dense copy for many rows, the same function, and its bytes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from codesign.engine.build import build_engine
from codesign.engine.caches import cache_folder
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.quantize.formats.int3 import Int3
from codesign.engine.quantize.formats.int4 import Int4
from codesign.engine.quantize.formats.int8 import Int8
from codesign.engine.quantize.linear import Workspace
from codesign.engine.quantize.packed_linear import PackedFormat, PackedLinear
from codesign.engine.quantize.shadow import ShadowedLinear
from codesign.errors import Unsupported
from codesign.spec.engine_config import Choice, EngineConfig
from tests.engine.driving import generate, request

PLAIN = EngineConfig(max_batch_size=1, max_model_len=64, weights=Choice.of("int4", group_size=32))
SHADOWED = dataclasses.replace(PLAIN, weights=Choice.of("int4", group_size=32, shadow=True))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pack(member: PackedFormat) -> PackedLinear:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(128, 256, generator=generator) * 0.05, torch.randn(128, generator=generator)
    packed = member.pack(weight, bias, dtype=torch.bfloat16, workspace=Workspace())
    assert isinstance(packed, PackedLinear)
    return packed


def needs_kernel(packed: PackedLinear) -> None:
    if packed.few_rows.max_rows_beside_dense == 0:
        pytest.skip(f"no kernel for few rows here: {packed.kernel}")


@pytest.mark.parametrize("member", [Int4(), Int8()])
def test_both_ways_compute_the_same_function(member: PackedFormat) -> None:
    packed = pack(member)
    needs_kernel(packed)
    shadowed = ShadowedLinear(packed, dtype=torch.bfloat16, workspace=Workspace())
    edge = shadowed.max_packed_rows

    for num_rows in (1, edge, edge + 1, edge + 40):
        x = torch.randn(num_rows, 256).bfloat16()
        exact = x.double() @ packed.dequantize().double().t() + packed.bias.double()  # type: ignore[union-attr]
        assert float((shadowed(x).double() - exact).norm() / exact.norm()) < 5e-3


def test_unrounded_results_are_those_of_the_way_taken() -> None:
    packed = pack(Int4())
    needs_kernel(packed)
    shadowed = ShadowedLinear(packed, dtype=torch.bfloat16, workspace=Workspace())
    edge = shadowed.max_packed_rows
    few, many = torch.randn(edge, 256).bfloat16(), torch.randn(edge + 1, 256).bfloat16()

    assert torch.equal(shadowed.wide(few), packed.wide(few))
    assert shadowed.wide(few).dtype == torch.float32
    assert torch.equal(shadowed.wide(many), shadowed.dense.wide(many))


def test_a_dense_copy_is_made_and_counted() -> None:
    needs_kernel(pack(Int4()))
    plain, shadowed = (build_engine(tiny_spec(), config) for config in (PLAIN, SHADOWED))
    linears = [part for layer in plain.parts.model.layers for part in layer.modules() if isinstance(part, PackedLinear)]
    dense_bytes = 2 * sum(linear.in_features * linear.out_features for linear in linears)

    added = shadowed.facts()["bytes"]["weights"] - plain.facts()["bytes"]["weights"]

    assert dense_bytes <= added <= 1.1 * dense_bytes + 4096 * len(linears)  # kernel libraries pad small weights
    assert "on a dense copy" in shadowed.facts()["kernels"]["weights"]


def test_packed_weights_are_kept_once_whether_shadowed_or_not() -> None:
    needs_kernel(pack(Int4()))
    first, second = (build_engine(tiny_spec(), config) for config in (PLAIN, SHADOWED))

    assert second.facts()["resolved"]["weight_cache"] == "found"
    assert len(list(cache_folder("weights").iterdir())) == 1
    assert generate(first, request("one", 10, 8)) == generate(second, request("one", 10, 8))


def test_a_format_without_a_kernel_is_refused_with_what_to_do() -> None:
    packed = pack(Int3())
    if packed.few_rows.max_rows_beside_dense:
        pytest.skip("this device has a kernel for int3")
    config = dataclasses.replace(PLAIN, weights=Choice.of("int3", group_size=32, shadow=True))

    with pytest.raises(Unsupported, match="use shadow: false, or weights native"):
        build_engine(tiny_spec(), config)


@pytest.mark.parametrize("name", ["w8a8", "native"])
def test_formats_that_a_dense_copy_would_change_or_repeat_have_no_such_knob(name: str) -> None:
    knobs: dict[str, Any] = {"shadow": True}
    with pytest.raises(Exception, match="has no knob 'shadow'"):
        dataclasses.replace(PLAIN, weights=Choice.of(name, **knobs)).resolve()

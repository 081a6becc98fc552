"""The part of the GPU campaign that times these kernels, at a size for the interpreter and by a false clock."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from codesign.engine.kernels.triton.configs import Problem, plan
from tests.benchmarks import gpu_weights


def counted(calls: list[int]) -> Callable[[Callable[[Tensor], Tensor], Tensor], list[float]]:
    """A clock by which each thing that is timed is faster than the one before."""

    def timer(multiply: Callable[[Tensor], Tensor], x: Tensor) -> list[float]:
        calls.append(x.shape[0])
        return [10.0 / len(calls)] * 20

    return timer


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return gpu_weights.weights(300.0, device="cpu", shapes=[(32, 128)], rows=[1, 17], timer=counted([]))


def test_every_way_is_checked_and_timed_or_says_why_not(result: dict[str, Any]) -> None:
    timed = {(row["way"], row["rows"]) for row in result["timed"] if "median_ms" in row}
    absent = {row["way"] for row in result["timed"] if "absent" in row}

    for way in ("int8: triton::w8a16", "int4: triton::w4a16", "nf4: triton::nf4", "int3: unpack + aten::mm"):
        assert {(way, 1), (way, 17)} <= timed
    assert not [row for row in result["timed"] if "wrong" in row or "failed" in row]
    assert absent == {"int4: aten::_weight_int4pack_mm", "fp8: aten::_scaled_mm"}


def test_the_fastest_configs_are_in_the_form_that_the_kernels_read(result: dict[str, Any]) -> None:
    tuned = json.loads(json.dumps(result["tuned"]))
    problem = Problem("w4a16", "bf16", 32, 128, 128)
    tried = [trial["config"] for trial in result["trials"] if trial["key"] == problem.key(16)]

    assert tuned["cpu"][problem.key(16)] == tried[-1]
    assert plan(problem, max_rows=64, device_name="cpu", tuned=tuned).note.endswith("; tuned on cpu")


def test_a_wrong_kernel_is_never_timed() -> None:
    linear = gpu_weights.FORMATS["int4"].pack(
        torch.randn(32, 128), None, dtype=torch.bfloat16, workspace=gpu_weights.Workspace()
    )
    doubled = gpu_weights.Way("doubled", lambda x: 2 * linear(x), 1, linear.dequantize().double())

    found = gpu_weights.measure(doubled, torch.randn(3, 128).bfloat16(), counted([]))

    assert found["wrong"].startswith("relative error ")
    assert found["relative_error"] == pytest.approx(1, rel=0.01)
    assert "median_ms" not in found


def test_tuning_leaves_the_linear_as_it_was() -> None:
    linear: Any = gpu_weights.FORMATS["int8"].pack(
        torch.randn(32, 128), None, dtype=torch.bfloat16, workspace=gpu_weights.Workspace()
    )
    before = linear.few_rows

    trials = gpu_weights.tune("int8", linear, torch.randn(1, 128).bfloat16(), 16, counted([]), float("inf"))

    assert len({trial["config"] for trial in trials}) == len(trials) > 5
    assert linear.few_rows is before

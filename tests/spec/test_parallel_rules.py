"""What is not divided over ranks, and how many ranks a machine has room for."""

from typing import Any

import pytest

from codesign.engine.kv.policy import KVPolicy
from codesign.engine.prune.pruner import Pruner
from codesign.engine.quantize.method import Method
from codesign.registry import KV_POLICIES, PRUNERS, WEIGHT_METHODS
from codesign.spec.engine_config import EngineConfig
from codesign.spec.hardware import Hardware
from codesign.spec.parallel_rules import CALIBRATED_METHODS, CALIBRATED_PRUNERS, SHARED_BUDGETS
from codesign.spec.rules import lacking, senseless


def config(**changes: Any) -> EngineConfig:
    return EngineConfig.from_dict(changes).resolve()


TENSOR, PIPELINE = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}


@pytest.mark.parametrize(
    ("changes", "tensor", "pipeline"),
    [
        ({"weights": {"name": "int4", "method": "gptq"}}, "weights.method gptq", "weights.method gptq"),
        ({"weights": {"name": "int8", "method": "awq"}}, "weights.method awq", "weights.method awq"),
        ({"weights": {"name": "int4", "method": "hqq"}}, None, None),
        ({"weights": "mixed"}, "weights mixed", "weights mixed"),
        ({"weights": {"name": "int4", "shadow": True}}, "weights.shadow", None),
        ({"prune": "wanda"}, "prune wanda", "prune wanda"),
        ({"prune": "magnitude"}, "ranked over whole rows or matrices", None),
        ({"kv": {"policy": "ada_kv"}}, "divides a budget among all KV heads", None),
        ({"kv": {"policy": {"name": "dynamic", "under_pressure": "ada_kv"}}}, "divides a budget", None),
        ({"kv": {"policy": "h2o"}}, None, None),
        ({"kv": {"layout": "paged"}, "prefix_cache": True}, None, None),
        ({"speculate": "ngram"}, "speculate ngram", "speculate ngram"),
    ],
)
def test_what_needs_the_whole_model_is_not_divided(
    changes: dict[str, Any], tensor: str | None, pipeline: str | None
) -> None:
    for parallel, reason in ((TENSOR, tensor), (PIPELINE, pipeline), ({}, None)):
        found = senseless(config(**changes, parallel=parallel))
        assert found is None if reason is None else reason in str(found)


def test_members_that_need_the_whole_model_are_all_named() -> None:
    methods: dict[str, Method] = {name: WEIGHT_METHODS.create(name) for name in WEIGHT_METHODS.names()}
    pruners: dict[str, Pruner] = {name: PRUNERS.create(name) for name in PRUNERS.names()}
    policies: dict[str, KVPolicy] = {name: KV_POLICIES.create(name) for name in KV_POLICIES.names()}

    assert {name for name, method in methods.items() if method.needs_inputs} == set(CALIBRATED_METHODS)
    assert {name for name, pruner in pruners.items() if pruner.needs_inputs} == set(CALIBRATED_PRUNERS)
    assert {name for name, policy in policies.items() if policy.head_budgets == "ragged"} == set(SHARED_BUDGETS)


def test_micro_batches_need_stages() -> None:
    assert "nothing to overlap" in str(senseless(config(parallel={"num_micro_batches": 2})))
    assert "nothing to overlap" in str(senseless(config(parallel={"num_micro_batches": 2, **TENSOR})))
    assert senseless(config(parallel={"num_micro_batches": 2, **PIPELINE})) is None


@pytest.mark.parametrize(
    ("hardware", "most", "noun"),
    [
        (Hardware(name="x", device="cpu", cores=4), 4, "cores"),
        (Hardware(name="x", device="cuda", count=2), 2, "devices"),
        (Hardware(name="x", device="cuda"), 1, "devices"),
    ],
)
def test_each_rank_needs_a_device_or_a_core(hardware: Hardware, most: int, noun: str) -> None:
    for tensor, pipeline in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 2)):
        parallel = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
        found = lacking(config(parallel=parallel), hardware)
        if tensor * pipeline <= most:
            assert found is None
        else:
            assert f"above {most}: each rank needs one of the profile's {most} {noun}" in str(found)

"""The same engine on a CUDA device: same logits, allocator bytes, NVML energy. Skipped where there is none."""

import time
from typing import Any

import pytest
import torch

from codesign.engine.build import build_engine
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.quantize.linear import Workspace
from codesign.measure.child_session import ChildSession
from codesign.measure.monitor import MIN_ENERGY_WINDOW_S, Monitor, energy_source, gpus, make_probe
from codesign.measure.nursery import Nursery
from codesign.registry import KV_POLICIES, WEIGHT_FORMATS
from codesign.spec.engine_config import EngineConfig
from codesign.spec.request import Request, SamplingParams
from tests.engine.driving import generate, request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def config(**changes: Any) -> EngineConfig:
    return EngineConfig.from_dict({"dtype": "fp32", "max_batch_size": 4, "max_model_len": 256, **changes})


@pytest.mark.parametrize("policy", KV_POLICIES.names())
def test_greedy_tokens_equal_those_of_the_cpu(policy: str) -> None:
    budget = {} if policy == "full" else {"kv_budget": 64}
    chosen = config(kv={"policy": {"name": policy, **budget}})
    requests = [request(f"r{index}", 40 + 30 * index, 12, ignore_eos=True) for index in range(4)]
    on_cpu = generate(build_engine(tiny_spec(), chosen), *requests)
    on_gpu = generate(build_engine(tiny_spec(), chosen, device="cuda"), *requests)

    assert on_gpu == on_cpu


@pytest.mark.parametrize("weights", ["native", "int8", {"name": "int4", "group_size": 32}, "int3", "int2", "nf4"])
def test_every_weight_format_runs(weights: Any) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    engine = build_engine(tiny_spec(**shape), config(dtype="bf16", weights=weights), device="cuda")

    assert len(generate(engine, request("r", 32, 8, ignore_eos=True))["r"]) == 8


KERNELS = {"int8": "w8a16", "int4": "w4a16", "int3": "w3a16", "int2": "w2a16", "nf4": "nf4"}
EPS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def packed(name: str, size: tuple[int, int], dtype: torch.dtype, **knobs: Any) -> Any:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.05
    member = WEIGHT_FORMATS.create(name, **knobs)
    return member.pack(weight.to("cuda"), torch.ones(size[0], device="cuda"), dtype=dtype, workspace=Workspace())


def relative_error(linear: Any, x: torch.Tensor) -> float:
    expected = x.double() @ linear.dequantize().double().t() + 1
    return float((linear(x).double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size", [(48, 128), (1040, 768), (4096, 4096)])
def test_triton_kernels_equal_the_product_of_the_dequantised_weight(
    name: str, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    linear = packed(name, size, dtype)

    assert linear.kernel.startswith(f"triton::{KERNELS[name]} ")
    for num_rows in (1, 3, 16, 17, 64, 65, 300):
        assert relative_error(linear, torch.randn(num_rows, size[1], device="cuda").to(dtype)) < EPS[dtype], num_rows


@pytest.mark.parametrize("name", ["int4", "int3", "int2"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("symmetric", [True, False])
def test_triton_kernels_hold_for_every_group_size(name: str, group_size: int, symmetric: bool) -> None:
    linear = packed(name, (512, 1024), torch.bfloat16, group_size=group_size, symmetric=symmetric)

    assert relative_error(linear, torch.randn(5, 1024, device="cuda").bfloat16()) < EPS[torch.bfloat16]
    assert relative_error(linear, torch.randn(40, 1024, device="cuda").bfloat16()) < EPS[torch.bfloat16]


@pytest.mark.parametrize("name", KERNELS)
def test_a_product_is_the_same_every_time(name: str) -> None:
    linear = packed(name, (4096, 4096), torch.bfloat16)
    x = torch.randn(4, 4096, device="cuda").bfloat16()
    first = linear(x)

    assert all(torch.equal(linear(x), first) for _ in range(20))


def test_a_session_reports_the_allocators_peak() -> None:
    with Nursery() as nursery, ChildSession(nursery, model=tiny_spec(), device="cuda") as session:
        facts = session.build(config())
        prompt = tuple(range(32))
        session.submit(Request(request_id="r", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=4)))
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not any(event.finish_reason for event in session.poll(1.0)):
            continue
        memory = session.memory()

    assert memory["peak_memory_bytes"] >= facts.bytes["weights"] + facts.bytes["kv"]


def test_the_energy_counter_moves_with_work() -> None:
    assert energy_source("cuda").scope == "gpu board (NVML)"
    [gpu, *_] = gpus()
    work = torch.randn(4096, 4096, device="cuda")
    with Monitor(make_probe("cuda", pid=0)) as watch:
        end = time.monotonic() + MIN_ENERGY_WINDOW_S + 0.5
        while time.monotonic() < end:
            work @ work
            torch.cuda.synchronize()

    assert watch.reading["gpu_uuid"] == gpu["uuid"]
    assert 0 < watch.reading["energy_j"] / MIN_ENERGY_WINDOW_S < 1.2 * watch.reading["power_limit_w"]
    assert watch.reading["sm_mhz_median"] > 0

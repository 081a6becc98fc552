"""The same engine on a CUDA device: same logits, allocator bytes, NVML energy. Skipped where there is none."""

import time
from typing import Any

import pytest
import torch

from codesign.engine.build import build_engine
from codesign.engine.models.tiny import tiny_spec
from codesign.measure.child_session import ChildSession
from codesign.measure.monitor import MIN_ENERGY_WINDOW_S, Monitor, energy_source, gpus, make_probe
from codesign.measure.nursery import Nursery
from codesign.registry import KV_CODECS, KV_POLICIES
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


@pytest.mark.parametrize("codec", KV_CODECS.names())
def test_every_codec_generates_what_it_generates_on_the_cpu(codec: str) -> None:
    """Two greedy tokens may differ where rounding falls the other way; most do not."""
    chosen = config(kv={"codec": codec})
    requests = [request(f"r{index}", 100 + 20 * index, 12, ignore_eos=True) for index in range(4)]
    on_cpu = generate(build_engine(tiny_spec(), chosen), *requests)
    on_gpu = generate(build_engine(tiny_spec(), chosen, device="cuda"), *requests)

    first = [(on_cpu[name][:3], on_gpu[name][:3]) for name in on_cpu]
    assert sum(cpu == gpu for cpu, gpu in first) >= 3


@pytest.mark.parametrize("weights", ["native", "int8", {"name": "int4", "group_size": 32}])
def test_every_weight_format_runs(weights: Any) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    engine = build_engine(tiny_spec(**shape), config(dtype="bf16", weights=weights), device="cuda")

    assert len(generate(engine, request("r", 32, 8, ignore_eos=True))["r"]) == 8


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

"""A script: many engines on several ranks beside one rank, and what they did, as JSON on stdout.

In a process of its own with one thread, so that ranks are forks, as in a trial; a test process has threads, and every
rank would be a new interpreter.
"""

import json
import os
import random
import sys
from typing import Any

import psutil
import torch

from codesign.engine import engine as engine_module
from codesign.engine.build import build_engine
from codesign.engine.models.shape import ARCHITECTURES
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.parallel.runner import RankRunner
from codesign.engine.step import StepPlan
from codesign.errors import CodesignError
from codesign.registry import KV_CODECS, KV_POLICIES, WEIGHT_FORMATS
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from codesign.spec.request import Request, SamplingParams
from tests.engine.parallel.comparing import ONE_MICRO_BATCH, PLANS, Ran, first_difference, kl, run, top1_agreement

# What only one of them has: biases and a vocabulary that does not divide, one KV head, a tied head.
SHAPES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"attention_bias": True, "mlp_bias": True, "vocab_size": 131},
    "MistralForCausalLM": {"num_key_value_heads": 1, "num_hidden_layers": 3},
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": {},
}
# Inputs of `output` and of `down` that every format takes half of, too.
ROOMY = {"head_dim": 32, "intermediate_size": 128, "num_hidden_layers": 4}
BASE = {"dtype": "fp32", "max_batch_size": 4, "max_model_len": 96}
BUDGET = 24


def texts(num_tokens: int) -> list[list[int]]:
    return [random.Random(index).choices(range(128), k=num_tokens) for index in range(4)]


def compared(reference: Ran, found: Ran) -> dict[str, Any]:
    parted = []
    for index, (one, other) in enumerate(zip(reference.tokens, found.tokens, strict=True)):
        place = first_difference(one, other)
        if place is not None:
            parted.append(reference.gaps[index][place])
    return {
        "difference": float((reference.logits - found.logits).abs().max()),
        "kl": kl(reference.logits, found.logits),
        "top1": top1_agreement(reference.logits, found.logits),
        "parted_at_gaps": parted,
        "bytes": found.facts["bytes"],
        "reference_bytes": reference.facts["bytes"],
        "budgets": found.facts["resolved"]["kv_budget_tokens"],
        "reference_budgets": reference.facts["resolved"]["kv_budget_tokens"],
        "num_slots": [ran.facts["resolved"]["num_slots"] for ran in (reference, found)],
        "bytes_per_rank": found.facts["resolved"]["bytes_per_rank"],
        "ranks": found.facts["resolved"]["ranks"],
    }


def cases(model: ModelSpec, config: dict[str, Any], plans: list[str], *, num_greedy: int = 0) -> dict[str, Any]:
    """Plan -> how it compares with one rank, or why it is refused."""
    given, found = texts(48), {}
    reference = run(model, config, "single", given, num_prefill=36, num_greedy=num_greedy)
    for plan in plans:
        try:
            found[plan] = compared(reference, run(model, config, plan, given, num_prefill=36, num_greedy=num_greedy))
        except CodesignError as error:
            found[plan] = {"refused": str(error)}
    return found


def policy(name: str) -> dict[str, Any]:
    budget = {"kv_budget": BUDGET} if "kv_budget" in KV_POLICIES.knobs(name) else {}
    return {"name": name, **budget, **KNOBS.get(name, {})}


KNOBS: dict[str, dict[str, Any]] = {
    **{name: {"window_tokens": 4} for name in ("snapkv", "pyramidkv", "ada_kv")},
    "r_kv": {"window_tokens": 4, "buffer_tokens": 4},
    "dynamic": {"under_pressure": "h2o"},
}


# Room for two of four sequences, of 96 tokens: 2 x 4 layers x 2 KV heads x 32 values x 4 bytes each, and a little more.
_TWO_SLOTS = 2 * 96 * 2 * 4 * 2 * 32 * 4 + 20_000
CACHES: dict[str, dict[str, Any]] = {
    "bounded": {"kv_memory_bytes": _TWO_SLOTS},
    "paged": {"kv": {"layout": "paged"}, "prefix_cache": True},
    "paged, bounded": {"kv": {"layout": "paged"}, "kv_memory_bytes": _TWO_SLOTS},
}


def logged(parallel: dict[str, int], dtype: str = "fp32") -> dict[str, Any]:
    """One prefill and three decoding steps of four sequences: plans, and after each what every rank did."""
    config = EngineConfig.from_dict({**BASE, "dtype": dtype, "parallel": parallel})
    engine = build_engine(tiny_spec(vocab_size=131), config, num_threads=2)
    runner = engine.parts.runner
    assert isinstance(runner, RankRunner)
    runner.logs()  # forgets what building took
    steps: list[dict[str, Any]] = []

    def recording(plan: StepPlan) -> torch.Tensor:
        logits = RankRunner.run(runner, plan)
        shown = {"num_tokens": len(plan.token_ids), "num_rows": len(plan.logits_rows), "slots": list(plan.slots)}
        steps.append({"plan": shown, "logs": runner.logs()})
        return logits

    runner.run = recording  # type: ignore[method-assign]
    for index, text in enumerate(texts(12)):
        sampling = SamplingParams(max_tokens=4, ignore_eos=True)
        engine.submit(Request(request_id=str(index), prompt_token_ids=tuple(text), sampling=sampling))
    while engine.has_work:
        engine.step()
    engine.close()
    return {"steps": steps}


def listeners() -> list[str]:
    """Addresses on which an engine's processes listen."""
    engine = build_engine(tiny_spec(), EngineConfig.from_dict({**BASE, "parallel": PLANS["tp2xpp2"]}), num_threads=2)
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections(kind="all")
        if connection.status == psutil.CONN_LISTEN
    ]
    engine.close()
    return [str(len(processes)), *found]


def device_memory() -> dict[str, int]:
    """The sum over ranks of a figure that each has of its own, and what it should be."""
    original, engine_module.device_memory = (
        engine_module.device_memory,
        lambda device: {"device_peak_bytes": os.getpid()},
    )
    engine = build_engine(tiny_spec(), EngineConfig.from_dict({**BASE, "parallel": PLANS["tp2xpp2"]}), num_threads=2)
    processes = [psutil.Process(), *psutil.Process().children()]  # forks, which see the same
    found = {"sum": engine.device_memory()["device_peak_bytes"], "expected": sum(one.pid for one in processes)}
    engine.close()
    engine_module.device_memory = original
    return {**found, "num_ranks": len(processes)}


def main() -> None:
    torch.set_num_threads(1)
    names = [name for name in PLANS if name != "single"]
    spec = tiny_spec(**ROOMY)
    found = {
        "architectures": {
            name: cases(tiny_spec(name, **SHAPES[name]), BASE, names, num_greedy=12) for name in ARCHITECTURES
        },
        "policies": {
            name: cases(spec, {**BASE, "kv": {"policy": policy(name)}}, ["tp2", "tp2xpp2"])
            for name in KV_POLICIES.names()
        },
        "codecs": {name: cases(spec, {**BASE, "kv": {"codec": name}}, ["tp2xpp2"]) for name in KV_CODECS.names()},
        "caches": {name: cases(spec, {**BASE, **own}, ["tp2xpp2"], num_greedy=6) for name, own in CACHES.items()},
        "formats": {
            name: cases(spec, {**BASE, "weights": weights(name)}, ["tp2xpp2"]) for name in WEIGHT_FORMATS.names()
        },
        "one_micro_batch": {
            name: cases(spec, {**BASE, "dtype": "bf16", "weights": weights(name)}, [ONE_MICRO_BATCH])[ONE_MICRO_BATCH]
            for name in ("native", "int8", "int4")
        },
        "bf16": cases(spec, {**BASE, "dtype": "bf16"}, names),
        "logs": {
            f"{tensor}x{stages}x{count}": logged(
                {"tensor_parallel_size": tensor, "pipeline_parallel_size": stages, "num_micro_batches": count}
            )
            for tensor, stages, count in [(2, 1, 1), (1, 2, 1), (1, 2, 2), (1, 2, 4), (2, 2, 2)]
        },
        "bf16_logs": logged(PLANS["tp2xpp2"], "bf16"),
        "listeners": listeners(),
        "device_memory": device_memory(),
        "children_left": len(psutil.Process().children()),
    }
    json.dump(found, sys.stdout)


def weights(name: str) -> dict[str, Any]:
    knobs = WEIGHT_FORMATS.knobs(name)
    return {
        "name": name,
        **({"group_size": 32} if "group_size" in knobs else {}),
        **({"emulated": True} if "emulated" in knobs else {}),
        **({"method": "rtn"} if "method" in knobs else {}),
    }


if __name__ == "__main__":
    main()

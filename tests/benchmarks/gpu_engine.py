"""The part `engine` of gpu_campaign.py: decode and prefill of whole engines, beside transformers' generation.

A model of the shape of Llama-3.1-8B with random weights (each side draws its own, which no kernel's speed depends on),
bf16 unless a case says otherwise. Every contender in turn generates greedily from the same prompts at each batch size;
a decode figure is the median gap between tokens, `prefill_ms` the time from the first submission to the first token of
every sequence. One generation warms up, then `ROUNDS` are kept. `weight_gb_per_s` is the bytes of the weights over the
time of a decode step: at batch 1, what the step takes of the device's bandwidth. A contender that cannot be built is a
row with the reason.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.errors import CodesignError
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from codesign.spec.request import Request, SamplingParams

PEER = "transformers bf16, sdpa"
BATCHES = (1, 8, 32)
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 64
ROUNDS = 2
_FAST = {"attention": "triton", "kernels": {"fused": True, "graphs": True}}
CASES: dict[str, dict[str, Any]] = {
    "codesign, defaults": {},
    "codesign, triton + fused": {"attention": "triton", "kernels": {"fused": True}},
    "codesign, triton + fused + graphs": _FAST,
    "codesign, triton + fused + graphs, paged": {**_FAST, "kv": {"layout": "paged"}},
    "codesign, triton + fused + graphs, int8": {**_FAST, "weights": "int8"},
    "codesign, triton + fused + graphs, int4": {**_FAST, "weights": {"name": "int4", "group_size": 128}},
    "codesign, triton + fused + graphs, fp8": {**_FAST, "weights": "fp8"},
}

Stamps = tuple[float, list[float]]
"""When it began, and when every sequence had its first, second, ... token."""
Generate = Callable[[list[list[int]], int], Stamps]


def engine(
    seconds: float,
    *,
    architecture: Mapping[str, Any],
    device: str = "cuda",
    batches: tuple[int, ...] = BATCHES,
    prompt_tokens: int = PROMPT_TOKENS,
    output_tokens: int = OUTPUT_TOKENS,
    cases: Mapping[str, Mapping[str, Any]] = CASES,
) -> dict[str, Any]:
    """One row a contender and batch size; what there was no time for says so."""
    deadline_s = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    generator = torch.Generator().manual_seed(0)
    shape = (max(batches), prompt_tokens)
    prompts = torch.randint(0, architecture["vocab_size"], shape, generator=generator).tolist()
    for name, contender in contenders(architecture, device, max(batches), prompt_tokens, output_tokens, cases):
        if time.monotonic() > deadline_s:
            rows.append({"contender": name, "absent": "no time left"})
            continue
        try:
            generate, facts = contender()
        except (CodesignError, torch.OutOfMemoryError) as error:
            rows.append({"contender": name, "absent": f"{type(error).__name__}: {error}"})
            continue
        rows += [
            {"contender": name, "batch_size": batch, **measure(generate, prompts[:batch], output_tokens), **facts}
            for batch in batches
        ]
        del generate
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    for row in rows:
        if "decode_ms" in row:
            row["weight_gb_per_s"] = row["weight_bytes"] / row["decode_ms"] / 1e6
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "rows": rows,
        "decode_beside_peer": beside(rows, "decode_ms"),
        "prefill_beside_peer": beside(rows, "prefill_ms"),
    }


def beside(rows: list[dict[str, Any]], figure: str) -> dict[str, dict[int, float]]:
    """Contender -> batch size -> the peer's time over its own: how many times as fast."""
    peer = {row["batch_size"]: row[figure] for row in rows if row["contender"] == PEER and figure in row}
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if figure in row and row["batch_size"] in peer:
            found.setdefault(row["contender"], {})[row["batch_size"]] = peer[row["batch_size"]] / row[figure]
    return found


def measure(generate: Generate, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
    generate(prompts, num_tokens)
    prefills, gaps, medians = [], list[float](), list[float]()
    for _ in range(ROUNDS):
        started, stamps = generate(prompts, num_tokens)
        own = [(late - early) * 1e3 for early, late in itertools.pairwise(stamps)]
        prefills.append((stamps[0] - started) * 1e3)
        gaps += own
        medians.append(statistics.median(own))
    return {
        "decode_ms": statistics.median(gaps),
        "decode_ms_of_rounds": medians,
        "decode_p90_ms": sorted(gaps)[int(0.9 * len(gaps))],
        "num_gaps": len(gaps),
        "prefill_ms": statistics.median(prefills),
        "prefill_ms_of_rounds": prefills,
    }


def contenders(
    architecture: Mapping[str, Any],
    device: str,
    max_batch_size: int,
    prompt_tokens: int,
    output_tokens: int,
    cases: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[str, Callable[[], tuple[Generate, dict[str, Any]]]]]:
    """Name, and what builds it: the peer first and last, so that a drift of the device shows."""
    yield PEER, lambda: peer(architecture, device)
    for name, changes in cases.items():
        plain = {
            "dtype": "bf16",
            "max_batch_size": max_batch_size,
            "max_model_len": prompt_tokens + output_tokens,
            "max_step_tokens": max_batch_size * prompt_tokens,
            **changes,
        }
        yield name, lambda plain=plain: ours(architecture, device, plain)
    yield f"{PEER}, again", lambda: peer(architecture, device)


def ours(architecture: Mapping[str, Any], device: str, config: Mapping[str, Any]) -> tuple[Generate, dict[str, Any]]:
    model = ModelSpec(name="random", architecture=architecture)
    built: Engine = build_engine(model, EngineConfig.from_dict(config), device=device)

    def generate(prompts: list[list[int]], num_tokens: int) -> Stamps:
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            built.submit(Request(request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling))
        started, stamps = time.perf_counter(), list[float]()
        while built.has_work:
            if len(built.step()) == len(prompts):
                stamps.append(time.perf_counter())
        if len(stamps) != num_tokens:
            raise RuntimeError(f"{len(stamps)} steps gave every sequence a token, expected {num_tokens}")
        return started, stamps

    facts = built.facts()
    return generate, {
        "weight_bytes": facts["bytes"]["weights"],
        "kv_bytes": facts["bytes"]["kv"],
        "kernels": facts["kernels"],
        "phases": facts["phases"],
    }


def peer(architecture: Mapping[str, Any], device: str) -> tuple[Generate, dict[str, Any]]:
    import transformers

    class Clock(transformers.StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
        """Never stops anything; notes when each token was there."""

        def __init__(self) -> None:
            self.stamps: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
            if device == "cuda":
                torch.cuda.synchronize()
            self.stamps.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    config = transformers.LlamaConfig(
        **{**architecture, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}, attn_implementation="sdpa"
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    def generate(prompts: list[list[int]], num_tokens: int) -> Stamps:
        clock, ids = Clock(), torch.tensor(prompts, device=device)
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                do_sample=False,
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )
        return started, clock.stamps

    return generate, {"weight_bytes": sum(own.numel() * own.itemsize for own in model.parameters())}

"""Makes study folders that look like real ones: a cost model with noise instead of an engine, failures of every kind.

The numbers mean nothing; their shapes (missing metrics, ties, broken limits, long tails) are what real studies have.
`python tests/report/recorded.py FOLDER NUM_TRIALS` writes one to look at.
"""

import dataclasses
import hashlib
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from codesign.results.record import (
    MetricValue,
    Outcome,
    OutcomeKind,
    RequestSample,
    Tier,
    TrialRecord,
)

OBJECTIVES = [
    {"metric": "throughput_tokens_per_s", "statistic": "", "direction": "maximize", "unit": "tokens/s"},
    {"metric": "kl_divergence", "statistic": "", "direction": "minimize", "unit": "nat/token"},
    {"metric": "peak_memory_bytes", "statistic": "", "direction": "minimize", "unit": "bytes"},
]
FAILURES: dict[str, str] = {
    "oom": "the child asked for 31.2 GiB and this machine has 23.4 GiB\nstderr: std::bad_alloc",
    "unsupported": "int4 group_size 128 does not divide in_features 320",
    "numerical": "NaN in the logits of layer 3 at step 17",
    "cuda_fatal": "CUDA error: an illegal memory access was encountered",
    "hang": "no step for 60 s in phase warm_up",
    "killed_by_os": "SIGKILL that we did not send; no evidence of memory pressure",
    "crashed": 'Traceback (most recent call last):\n  File "engine/runner.py", line 88, in run\n'
    "RuntimeError: shapes [8, 320] and [256, 320] cannot be multiplied",
    "protocol": "a line of 4 194 304 bytes (at most 1 MiB)",
    "harness": "the nursery died twice",
}
assert set(FAILURES) == set(get_args(OutcomeKind)) - {"ok"}
PROVENANCE: dict[str, Any] = {
    "machine": {"cpu": "AMD EPYC", "isa": ["avx2"], "cores": 2, "memory_bytes": 24 * 2**30, "os": "Linux 6.1"},
    "device": "cpu",
    "versions": {"codesign": "0.1.0", "python": "3.11.2", "torch": "2.13.0+cpu"},
    "code": {"commit": "622b761", "is_dirty": False},
    "model": {"name": "bundled", "digest": "9f2c" * 4},
    "profile": {"name": "cpu", "digest": "3c5a" * 4},
    "seed": 0,
}
# How each choice moves speed (by batch size), bytes, and quality.
WEIGHTS: dict[str, dict[str, Any]] = {
    "native": {"bytes": 1.0, "kl": 0.0, "speed": {1: 1.0, 4: 1.0, 8: 1.0, 32: 1.0}},
    "int8": {"bytes": 0.52, "kl": 0.0018, "speed": {1: 1.45, 4: 1.2, 8: 1.004, 32: 0.9}},
    "int4": {"bytes": 0.31, "kl": 0.031, "speed": {1: 1.7, 4: 1.1, 8: 0.83, 32: 0.65}},
}
POLICIES: dict[str, tuple[float, float]] = {
    "full": (1.0, 0.0),
    "streaming_llm": (1.12, 0.35),
    "h2o": (1.04, 0.11),
    "pyramidkv": (1.08, 0.09),
}


def config(
    weights: str = "native", policy: str = "full", *, batch: int = 8, dtype: str = "bf16", **knobs: Any
) -> dict[str, Any]:
    """A resolved EngineConfig as plain data; `knobs` are group_size and kv_budget."""
    chosen: dict[str, Any] = {"name": weights}
    if weights == "int4":
        chosen["group_size"] = knobs.get("group_size", 64)
    kv: dict[str, Any] = {"name": policy}
    if policy != "full":
        kv |= {"kv_budget": knobs.get("kv_budget", 0.2), "num_sink_tokens": 4}
    return {
        "dtype": dtype,
        "max_batch_size": batch,
        "max_model_len": 1024,
        "kv_memory_bytes": None,
        "max_step_tokens": knobs.get("max_step_tokens", 1024),
        "scheduler": {"name": "continuous"},
        "weights": chosen,
        "kv": {"policy": kv, "codec": {"name": "native"}},
        "attention": {"name": "sdpa"},
    }


def digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def interval(value: float, share: float, unit: str, statistic: str = "", num_samples: int = 38) -> MetricValue:
    return MetricValue(
        value=value,
        unit=unit,
        statistic=statistic,
        num_samples=num_samples,
        low=value * (1 - share),
        high=value * (1 + share),
    )


def ok_record(
    number: int, plain: Mapping[str, Any], rng: random.Random, *, study: str = "recorded", tier: Tier = "screen"
) -> TrialRecord:
    weights, kv = WEIGHTS[plain["weights"]["name"]], plain["kv"]["policy"]
    batch = int(plain["max_batch_size"])
    budget = float(kv.get("kv_budget", 1.0))
    policy_speed, policy_kl = POLICIES[kv["name"]]
    wide = 2.0 if plain["dtype"] == "fp32" else 1.0
    noise = rng.gauss(1, 0.01)
    throughput = 410 * batch**0.6 * weights["speed"][batch] * (policy_speed if budget < 1 else 1) / wide**0.6 * noise
    kl = (weights["kl"] + policy_kl * max(0.0, 1 - budget) ** 2) * rng.uniform(0.97, 1.03)
    weights_bytes = int(17_300_000 * weights["bytes"] * wide)
    kv_bytes = int(6_291_456 * batch / 8 * budget * wide)
    peak = weights_bytes + kv_bytes + int(58e6 * rng.uniform(0.98, 1.02))
    tpot = 1000 * batch / throughput
    requests = tuple(
        RequestSample(
            prompt_tokens=256,
            output_tokens=64,
            finish_reason="length",
            ttft_ms=tpot * 9 * rng.lognormvariate(0, 0.1),
            e2e_ms=tpot * 72 * rng.lognormvariate(0, 0.03),
            tpot_ms=tpot * rng.lognormvariate(0, 0.02),
        )
        for _ in range(38)
    )
    return TrialRecord(
        study=study,
        number=number,
        uid=hashlib.sha256(f"{study}/{number}".encode()).hexdigest()[:32],
        config=plain,
        config_digest=digest(plain),
        resolved={"kv_budget_tokens": [int(1024 * budget)] * 6, "num_slots": batch},
        outcome=Outcome(kind="ok"),
        tier=tier,
        violations={"slo.quality.max_kl": kl / 0.2 - 1, "slo.tpot_ms.p99": tpot * 1.05 / 50 - 1},
        metrics={
            "throughput_tokens_per_s": interval(throughput, 0.012, "tokens/s"),
            "ttft_ms": interval(tpot * 9, 0.03, "ms", "p50"),
            "tpot_ms": interval(tpot, 0.01, "ms", "p50"),
            "e2e_ms": interval(tpot * 72, 0.015, "ms", "p50"),
            "kl_divergence": interval(kl, 0.08, "nat/token", "mean", 64),
            "top1_agreement": MetricValue(value=max(0.0, 1 - kl), unit="", statistic="mean", num_samples=64),
            "perplexity": interval(6.2 * (1 + kl / 2), 0.05, "", "mean", 64),
            "retrieval_accuracy": MetricValue(
                value=max(0.0, 0.97 - (1 - budget) * 0.2), unit="", num_samples=48, low=0.6, high=0.99
            ),
            "peak_memory_bytes": MetricValue(value=peak, unit="bytes"),
            "weights_bytes": MetricValue(value=weights_bytes, unit="bytes"),
            "kv_bytes": MetricValue(value=kv_bytes, unit="bytes"),
        },
        requests=requests,
        bytes={"weights": weights_bytes, "kv": kv_bytes, "kv_staging": 786_432, "workspace": 0, "peak": peak},
        monitor={"source": "psutil", "cpu_percent": 187.0, "rss_bytes": peak},
        phases={
            "spawn": 0.14,
            "build": 0.5,
            "load": 0.06,
            "quantize": 0.4,
            "warm_up": 0.5,
            "measure": 3.1,
            "quality": 0.8,
        },
        kernels={"weights": "aten::mm", "attention": "aten::_scaled_dot_product_flash_attention_for_cpu"},
        trust={"num_blocks": 5, "num_requests": 38, "warmup_settled": True, "percentile_supported": 90.0},
        provenance=PROVENANCE,
        started_at="2026-11-20T09:00:00Z",
        finished_at="2026-11-20T09:00:05Z",
    )


def failed_record(number: int, plain: Mapping[str, Any], kind: str, *, study: str = "recorded") -> TrialRecord:
    return TrialRecord(
        study=study,
        number=number,
        uid=hashlib.sha256(f"{study}/{number}".encode()).hexdigest()[:32],
        config=plain,
        config_digest=digest(plain),
        outcome=Outcome(kind=kind, detail=FAILURES[kind]),  # type: ignore[arg-type]
        phases={"spawn": 0.14, "load": 0.06},
        provenance=PROVENANCE,
        started_at="2026-11-20T09:00:00Z",
        finished_at="2026-11-20T09:00:02Z",
    )


def records(num_trials: int, *, seed: int = 0, study: str = "recorded") -> list[TrialRecord]:
    """Trial 0 is the unmodified configuration; about one in twelve fails, each kind in turn."""
    rng = random.Random(seed)
    made: list[TrialRecord] = []
    kinds = sorted(FAILURES)
    for number in range(num_trials):
        if number == 0:
            plain = config()
        else:
            plain = config(
                rng.choice(list(WEIGHTS)),
                rng.choice(list(POLICIES)),
                batch=rng.choice([1, 4, 8, 8, 32]),
                dtype=rng.choice(["bf16", "bf16", "fp32"]),
                group_size=rng.choice([32, 64, 128]),
                kv_budget=rng.choice([0.05, 0.1, 0.2, 0.4]),
            )
        if number % 12 == 7:
            made.append(failed_record(number, plain, kinds[number // 12 % len(kinds)], study=study))
            continue
        record = ok_record(number, plain, rng, study=study, tier="confirm" if number % 10 == 0 else "screen")
        if number % 17 == 5:
            kept = {name: value for name, value in record.metrics.items() if name != "kl_divergence"}
            record = dataclasses.replace(record, metrics=kept, warnings=("quality was not scored: wall clock reached",))
        made.append(record)
    return made


def inputs(name: str = "recorded", **changes: Any) -> dict[str, Any]:
    return {
        "study": name,
        "profile": {
            "hardware": {"name": "this machine", "device": "cpu", "cores": 2},
            "model": "bundled",
            "workload": {
                "scenario": "offline",
                "prompt_tokens": 256,
                "output_tokens": 64,
                "num_requests": 38,
                "seed": 0,
            },
            "slo": {"tpot_ms": {"p99": 50}, "quality": {"max_kl": 0.2}},
        },
        "space": {"weights": list(WEIGHTS), "kv": {"policy": list(POLICIES)}},
        "objectives": OBJECTIVES,
        "model": "bundled",
        "created_at": "2026-11-20T08:59:00Z",
        **changes,
    }


def write_study(folder: Path, made: list[TrialRecord], plain_inputs: Mapping[str, Any] | None = None) -> Path:
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    for record in made:
        (folder / "trials" / f"{record.uid}.json").write_text(record.to_json())
    (folder / "study.json").write_text(json.dumps(dict(plain_inputs or inputs(folder.name))))
    return folder


if __name__ == "__main__":
    write_study(Path(sys.argv[1]), records(int(sys.argv[2])))

"""What cannot be divided over the ranks of one engine, and how many ranks a machine has room for."""

import os

from codesign.spec.engine_config import EngineConfig
from codesign.spec.hardware import Hardware

# Members that need to see more than one rank's part of the model; tests/spec/test_parallel_rules.py asks the members.
CALIBRATED_METHODS = ("awq", "gptq", "smoothquant")
CALIBRATED_PRUNERS = ("wanda",)
SHARED_BUDGETS = ("ada_kv",)


def undivided(config: EngineConfig) -> str | None:
    """Why what is chosen cannot be divided over ranks, or None."""
    parallel = config.parallel
    if parallel.num_micro_batches > 1 and parallel.pipeline_parallel_size == 1:
        return "parallel.num_micro_batches above 1 with one stage: there is nothing to overlap; use 1"
    if parallel.num_ranks == 1:
        return None
    if config.speculate.name != "none":
        return (
            f"speculate {config.speculate.name} with parallel sizes above 1: drafts are made beside rank 0 alone, "
            "which has not been tried; use speculate none"
        )
    method = config.weights.knob_dict.get("method")
    if method in CALIBRATED_METHODS or config.prune.name in CALIBRATED_PRUNERS or config.weights.name == "mixed":
        chosen = f"weights.method {method}" if method in CALIBRATED_METHODS else f"prune {config.prune.name}"
        return (
            f"{'weights mixed' if config.weights.name == 'mixed' else chosen} with parallel sizes above 1: it looks at "
            "what the whole model sees on calibration text, and a rank has a part of it; use weights.method rtn or hqq "
            "and prune none"
        )
    if parallel.tensor_parallel_size == 1:
        return None
    if config.weights.knob_dict.get("shadow") is True:
        return (
            "weights.shadow with parallel.tensor_parallel_size above 1: sums over ranks need products before they are "
            "rounded, which dense copies do not give; leave it out"
        )
    if config.prune.name != "none":
        return (
            "prune with parallel.tensor_parallel_size above 1: weights are ranked over whole rows or matrices, of "
            "which a rank has a part; use prune none, or pipeline_parallel_size"
        )
    policies = (config.kv.policy.name, config.kv.policy.knob_dict.get("under_pressure"))
    if any(policy in SHARED_BUDGETS for policy in policies):
        return (
            "kv.policy ada_kv with parallel.tensor_parallel_size above 1: it divides a budget among all KV heads of a "
            "layer, and a rank has some of them; use kv.policy snapkv, or pipeline_parallel_size"
        )
    return None


def too_many_ranks(config: EngineConfig, hardware: Hardware) -> str | None:
    """Each rank needs a device of its own, or on a CPU a core."""
    if hardware.device == "cuda":
        found, noun = hardware.count, "devices"
    else:
        found, noun = hardware.cores or os.cpu_count() or 1, "cores"
    if config.parallel.num_ranks <= found:
        return None
    return (
        f"parallel.tensor_parallel_size x pipeline_parallel_size above {found}: each rank needs one of the profile's "
        f"{found} {noun}"
    )

"""Rules that hold whatever a search space says, each with its reason.

senseless   it would compute something else than meant           no search proposes it, and no build makes it
unpaid      it gives up quality for a speed that is not there    no search proposes it
lacking     the profile's hardware cannot run it as meant        no search proposes it
unjudged    an emulation has no speed to judge it by             no search proposes it, and no trial is begun

What is unpaid can be built and measured by hand all the same (`codesign measure --config`, the quality benchmark): a
person who wants to know what 2:4 costs in quality asks a sensible question, a search that offers it for its speed does
not. The search says before its first trial what it leaves out, and why.
"""

import os
from collections.abc import Iterable

from codesign.spec.engine_config import EngineConfig
from codesign.spec.hardware import Hardware
from codesign.spec.metrics import METRICS

_FP8_CAPABILITY = (8, 9)
_MIN_SPARSE_BATCH = 64
# Members that need to see more than one rank's part of the model; tests/spec/test_rules.py asks the members.
CALIBRATED_METHODS = ("awq", "gptq", "smoothquant")
CALIBRATED_PRUNERS = ("wanda",)
SHARED_BUDGETS = ("ada_kv",)


def senseless(config: EngineConfig) -> str | None:
    """Why no engine is built for a resolved configuration, or None."""
    if config.prune.name != "none" and config.weights.knob_dict.get("method") == "gptq":
        return (
            "prune with weights.method gptq: gptq pushes rounding errors into pruned weights, which are zero no "
            "longer; use method rtn, hqq or awq"
        )
    return _undivided(config)


def _undivided(config: EngineConfig) -> str | None:
    """Why what is chosen cannot be divided over ranks, or None."""
    parallel = config.parallel
    if parallel.num_micro_batches > 1 and parallel.pipeline_parallel_size == 1:
        return "parallel.num_micro_batches above 1 with one stage: there is nothing to overlap; use 1"
    if parallel.num_ranks == 1:
        return None
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


def unpaid(config: EngineConfig) -> str | None:
    """Why a resolved configuration cannot gain what it is chosen for, or None.

    2:4 products are slower than dense ones for few rows (pytorch/pytorch#111339: 0.11 times as fast for one row,
    pytorch/ao#1460: faster from about 1280 rows); tests/benchmarks/sparse_24.py measures it.
    """
    if not _is_two_of_four(config):
        return None
    if config.weights.name != "native":
        return (
            "prune.pattern two_of_four with packed weights: no kernel here multiplies weights that are both, so the "
            "zeros save neither time nor bytes; use weights native or prune none"
        )
    if config.max_batch_size < _MIN_SPARSE_BATCH:
        return (
            f"prune.pattern two_of_four with max_batch_size below {_MIN_SPARSE_BATCH}: a decoding step has too few "
            "rows for sparse products to be faster than dense ones; use a larger batch or prune none"
        )
    return None


def _is_two_of_four(config: EngineConfig) -> bool:
    return config.prune.knob_dict.get("pattern") == "two_of_four"


def lacking(config: EngineConfig, hardware: Hardware) -> str | None:
    """What a resolved configuration needs that this hardware does not have, or None; also where that is not known."""
    if _is_two_of_four(config) and hardware.device == "cpu":
        return "prune.pattern two_of_four on a CPU: no kernel there skips the zeros; use prune none"
    if (reason := _too_many_ranks(config, hardware)) is not None:
        return reason
    if config.weights.name == "fp8" and not (hardware.device == "cuda" and hardware.compute_capability is None):
        return fp8_refusal(hardware.compute_capability, is_emulated=config.is_emulated)
    return None


def _too_many_ranks(config: EngineConfig, hardware: Hardware) -> str | None:
    """Each rank needs a device of its own, or on a CPU a core."""
    if hardware.device == "cuda":
        found, noun = hardware.count, "devices"
    else:
        found, noun = hardware.cores or os.cpu_count() or 1, "cores"
    parallel = config.parallel
    if parallel.num_ranks <= found:
        return None
    return (
        f"parallel.tensor_parallel_size {parallel.tensor_parallel_size} x pipeline_parallel_size "
        f"{parallel.pipeline_parallel_size} needs {parallel.num_ranks} {noun}, the profile's hardware has {found}"
    )


def fp8_refusal(capability: str | None, *, is_emulated: bool) -> str | None:
    """Why fp8 does not run on a device, or None.

    Args:
        capability: compute capability of a CUDA device, e.g. "9.0"; None for a CPU.
    """
    has_products = capability is not None and tuple(map(int, capability.split("."))) >= _FP8_CAPABILITY
    if has_products and is_emulated:
        return f"compute capability {capability} multiplies fp8, so `emulated` would only hide it; leave it out"
    if not has_products and not is_emulated:
        least, here = ".".join(map(str, _FP8_CAPABILITY)), "a CPU" if capability is None else f"one of {capability}"
        return (
            f"fp8 is multiplied by CUDA devices of compute capability {least} and above, this is {here}; use w8a8, or "
            "`emulated: true` to judge quality and bytes alone"
        )
    return None


def unjudged(config: EngineConfig, asked: Iterable[str]) -> str | None:
    """Why an emulated configuration cannot be judged by these metrics, or None.

    An emulation computes what another machine would compute and takes any time over it.
    """
    timed = sorted(name for name in asked if METRICS[name].is_timed)
    if not config.is_emulated or not timed:
        return None
    return f"an emulation has quality and bytes but no speed, and the profile asks for {', '.join(timed)}"

"""Rules that hold whatever a search space says, each with its reason.

senseless   it would compute something else than meant           no search proposes it, and no build makes it
unpaid      it gives up quality for a speed that is not there    no search proposes it
lacking     the profile's hardware cannot run it as meant        no search proposes it
undrafted   it asks for a draft model and there is none          no search proposes it
unjudged    an emulation has no speed to judge it by             no search proposes it, and no trial is begun

What is unpaid can be built and measured by hand all the same (`codesign measure --config`, the quality benchmark): a
person who wants to know what 2:4 costs in quality asks a sensible question, a search that offers it for its speed does
not. The search says before its first trial what it leaves out, and why.
"""

from collections.abc import Iterable

from codesign.spec.engine_config import EngineConfig
from codesign.spec.graph_rules import never_replayed, unrecorded
from codesign.spec.hardware import Hardware
from codesign.spec.kv_budget import kv_budget_tokens
from codesign.spec.metrics import METRICS
from codesign.spec.model import ModelSpec
from codesign.spec.parallel_rules import too_many_ranks, undivided

_FP8_CAPABILITY = (8, 9)
_MIN_SPARSE_BATCH = 64


def senseless(config: EngineConfig) -> str | None:
    """Why no engine is built for a resolved configuration, or None."""
    if config.prune.name != "none" and config.weights.knob_dict.get("method") == "gptq":
        return (
            "prune with weights.method gptq: gptq pushes rounding errors into pruned weights, which are zero no "
            "longer; use method rtn, hqq or awq"
        )
    if config.speculate.name != "none" and _evicts(config):
        return (
            f"speculate {config.speculate.name} with kv.policy {config.kv.policy.name}: the tokens verified together "
            "see rows that decoding one by one had evicted by then, so the output would be another one; use kv.policy "
            "full or speculate none"
        )
    chunk = config.scheduler.knob_dict.get("prefill_chunk_tokens")
    if isinstance(chunk, int) and chunk > config.max_step_tokens:
        return (
            f"scheduler.prefill_chunk_tokens {chunk} with max_step_tokens {config.max_step_tokens}: no step has room "
            "for such a chunk, so it bounds nothing; use a smaller one, or leave it out"
        )
    blocks = _not_in_blocks(config) if config.kv.layout.name == "paged" else _only_in_blocks(config)
    return blocks or undivided(config) or never_replayed(config)


def _not_in_blocks(config: EngineConfig) -> str | None:
    kv = config.kv
    if kv.policy.name != "full":
        return (
            f"kv.layout paged with kv.policy {kv.policy.name}: blocks keep every row where it was written, and a "
            "policy that evicts overwrites rows; use kv.policy full, or kv.layout dense"
        )
    if "group_size" in kv.codec.knob_dict:
        return (
            f"kv.layout paged with kv.codec {kv.codec.name}: blocks hold rows that are encoded one by one, and it "
            "encodes groups of tokens; use kv.codec native, int8 or fp8, or kv.layout dense"
        )
    if kv.place.name != "device":
        return f"kv.layout paged with kv.place {kv.place.name}: blocks lie on the device; use kv.layout dense"
    if config.prefix_cache and kv.codec.name != "native":
        return (
            f"prefix_cache with kv.codec {kv.codec.name}: a prompt attends to its own rows in native precision and "
            "would find the shared ones rounded, so that its tokens depended on who came before; use kv.codec native"
        )
    return None


def _only_in_blocks(config: EngineConfig) -> str | None:
    if config.prefix_cache:
        return "prefix_cache with kv.layout dense: sequences can only share blocks; use kv.layout paged"
    return None


def _evicts(config: EngineConfig) -> bool:
    """Whether the KV policy has a budget that a sequence can outgrow."""
    budget = config.kv.policy.knob_dict.get("kv_budget")
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        return config.kv.policy.name != "full"
    return kv_budget_tokens(budget, config.max_model_len) < config.max_model_len


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
    if (reason := too_many_ranks(config, hardware) or unrecorded(config, hardware.device)) is not None:
        return reason
    if config.weights.name == "fp8" and not (hardware.device == "cuda" and hardware.compute_capability is None):
        return fp8_refusal(hardware.compute_capability, is_emulated=config.is_emulated)
    return None


def undrafted(config: EngineConfig, model: ModelSpec) -> str | None:
    """Why a resolved configuration has no draft model to speculate with, or None."""
    if config.speculate.name != "draft_model" or "draft" in config.speculate.knob_dict or model.draft is not None:
        return None
    return (
        f"speculate draft_model: model {model.name!r} names no draft; give `draft:` beside `model:` in the profile, or "
        "a directory as the knob `draft`"
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

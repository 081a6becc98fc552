"""Rules that hold whatever a search space says, each with its reason.

lacking     the profile's hardware cannot multiply it        no search proposes it; a build finds out by itself
unjudged    an emulation has no speed to judge it by         no search proposes it, and no trial is begun
"""

from collections.abc import Iterable

from codesign.spec.engine_config import EngineConfig
from codesign.spec.hardware import Hardware
from codesign.spec.metrics import METRICS

_FP8_CAPABILITY = (8, 9)


def lacking(config: EngineConfig, hardware: Hardware) -> str | None:
    """What a resolved configuration needs that this hardware does not have, or None; also where that is not known."""
    if config.weights.name == "fp8" and not (hardware.device == "cuda" and hardware.compute_capability is None):
        return fp8_refusal(hardware.compute_capability, is_emulated=config.is_emulated)
    return None


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

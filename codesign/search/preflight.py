"""What a profile asks that this machine cannot give, found and said before the first trial.

A wrong device stops the search: numbers from another device would be numbers about something else. An objective that
cannot be measured here is dropped aloud, and the study is a study of the others.
"""

import json
from collections.abc import Callable
from pathlib import Path

import psutil

from codesign.errors import InputError, Unsupported
from codesign.measure.monitor import energy_source, gpus
from codesign.measure.provenance import machine
from codesign.predict.memory import ModelSize, estimate
from codesign.search.misfit import Misfit
from codesign.search.suggest import Points
from codesign.spec.engine_config import EngineConfig
from codesign.spec.metrics import METRICS, Objective
from codesign.spec.model import ModelSpec
from codesign.spec.profile import Profile
from codesign.spec.rules import lacking, undrafted, unjudged
from codesign.units import GIB, format_bytes

_WAYS_ON = (
    "ways on: run it on such a machine; `codesign search profiles/cpu.yaml` studies the CPU that is here, with the "
    "bundled model; `codesign probe` writes the `hardware:` section of the machine it runs on"
)


def check_device(profile: Profile) -> None:
    """Raises Unsupported when the profile's device is not the one that is here."""
    hardware = profile.hardware
    if hardware.device == "cpu":
        return
    found = gpus()
    asked = f"{hardware.count} x {hardware.name}" if hardware.count > 1 else hardware.name
    if not found:
        cpu = machine()
        raise Unsupported(
            f"{profile.path}: asks for a CUDA device ({asked}); here is none, only {cpu['cpu']} with {cpu['cores']} "
            f"cores and {format_bytes(cpu['memory_bytes'])}; {_WAYS_ON}"
        )
    names = sorted({gpu["name"] for gpu in found})
    if len(found) < hardware.count or not any(_same_device(hardware.name, name) for name in names):
        raise Unsupported(f"{profile.path}: asks for {asked}; here is {len(found)} x {' and '.join(names)}; {_WAYS_ON}")


def _same_device(asked: str, found: str) -> bool:
    """Whether every word of the profile's name is in the driver's: `H100 SXM` and `NVIDIA H100 80GB HBM3` share H100.

    Vendors' marketing words (form factor, memory) differ between data sheet and driver, so the model number decides.
    """

    def numbers(text: str) -> set[str]:
        words = text.lower().replace("-", " ").replace("_", " ").split()
        return {
            word
            for word in words
            if any(character.isdigit() for character in word) and not word.endswith(("gb", "gib")) and "hbm" not in word
        }

    return numbers(asked) <= numbers(found) if numbers(asked) else asked.lower() in found.lower()


def usable_objectives(profile: Profile, say: Callable[[str], None]) -> tuple[Objective, ...]:
    """The profile's objectives that can be measured here; each of the others is said with its reason.

    Raises:
        InputError: none is left.
    """
    kept = []
    for objective in profile.objectives:
        reason = _missing(objective, profile)
        if reason is None:
            kept.append(objective)
        else:
            say(f"objective {objective.label} is dropped: {reason}")
    if not kept:
        raise InputError("none of them can be measured here", file=profile.path, key="objectives")
    return tuple(kept)


def _missing(objective: Objective, profile: Profile) -> str | None:
    match METRICS[objective.metric].needs:
        case "energy":
            source = energy_source(profile.device)
            return None if source.scope else source.reason
        case "price":
            return None if profile.hardware.price_per_hour is not None else "the profile has no hardware.price_per_hour"
        case "quality":
            return None if profile.model_spec.has_trained_weights else "the model's weights are random"
        case "slo":
            if not profile.slo.time_limits():
                return "the slo limits no time of a request"
            is_served = objective.metric != "capacity_requests_per_s" or profile.workload.scenario == "server"
            return None if is_served else f"scenario {profile.workload.scenario} has no request rate, only server has"
        case _:
            return None


def study_rules(profile: Profile) -> Callable[[EngineConfig], str | None]:
    """Says of a resolved configuration why no trial of this profile should be spent on it, or None."""

    def refuse(config: EngineConfig) -> str | None:
        return (
            lacking(config, profile.hardware)
            or undrafted(config, profile.model_spec)
            or unjudged(config, profile.asked_metrics)
        )

    return refuse


def say_ruled_out(points: Points, say: Callable[[str], None]) -> None:
    """Says what part of the space no trial will be spent on, reason by reason."""
    looked_at, reasons = points.ruled_out()
    if len(reasons) > 1:
        left = looked_at - sum(reasons.values())
        say(f"allowed: {left} of {looked_at} points; what is drawn beside them is changed until it is one of them")
    whole = "" if looked_at == points.space.size else " drawn at random"
    for reason, count in reasons.items():
        say(f"ruled out, {count} of {looked_at} points{whole}: {reason}")


def memory_check(profile: Profile) -> Callable[[EngineConfig], Misfit | None]:
    """Says of a configuration that it cannot fit into the profile's devices, one for each rank, by its static memory
    estimate. On a CPU ranks share one memory."""
    size = model_size(profile.model_spec)
    draft = None if profile.model_spec.draft is None else model_size(profile.model_spec.draft)
    available = available_bytes(profile)

    def check(config: EngineConfig) -> Misfit | None:
        if size is None or available is None:
            return None
        needed = estimate(size, config, draft)
        has = available if profile.device == "cpu" else available * config.parallel.num_ranks
        detail = needed.misfit(has)
        return None if detail is None else Misfit(detail, needed.total_bytes / has - 1)

    return check


def model_size(model: ModelSpec) -> ModelSize | None:
    """Sizes from the model's config.json; None when it does not say them the usual way (its build will tell)."""
    try:
        plain = json.loads((Path(model.path) / "config.json").read_text()) if model.path else model.architecture
        return ModelSize.of(plain or {})
    except (OSError, ValueError, TypeError, KeyError, ZeroDivisionError):
        return None


def available_bytes(profile: Profile) -> int | None:
    """Memory that a trial can have at the most: the least of what the profile says and what is here."""
    memories = profile.hardware.memory
    if profile.device == "cpu":
        here: int | None = psutil.virtual_memory().total
        said = [memory.gib for memory in memories if memory.name == "host"]
    else:
        here = min((gpu["memory_bytes"] for gpu in gpus()), default=None)
        said = [memory.gib for memory in memories if memory.name != "host"][:1]
    amounts = [amount for amount in (here, *(int(gib * GIB) for gib in said)) if amount is not None]
    return min(amounts, default=None)

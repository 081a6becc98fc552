"""Short names for configurations: what differs from the unmodified one.

weights int4 (group_size 64) · kv.policy h2o (kv_budget 0.2) · parallel tensor 2 · max_batch_size 32
"""

from collections.abc import Iterable, Mapping
from typing import Any

from codesign.report.show import visible
from codesign.spec.engine_config import FAMILIES

_GROUPS = ("kv", "kernels", "parallel")  # keys that hold what is chosen below them
# What a person decides on comes first; other keys follow in alphabetical order.
_ORDER = (
    "weights",
    "prune",
    "kv.policy",
    "kv.codec",
    "kv.place",
    "kv.layout",
    "speculate",
    "parallel.tensor_parallel_size",
    "parallel.pipeline_parallel_size",
    "prefix_cache",
    "dtype",
    "max_batch_size",
)


def parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, a family choice kept whole: {"dtype": "bf16", "kv.policy": {"name": "full"}, ...}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in _GROUPS and isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": own for inner, own in value.items()}
        else:
            flat[key] = value
    return dict(sorted(flat.items(), key=lambda item: (_ORDER.index(item[0]) if item[0] in _ORDER else 99, item[0])))


def plan_name(config: Mapping[str, Any]) -> str:
    """How a configuration is spread: `one rank`, `tensor 2`, `tensor 2 x pipeline 2, 4 micro-batches`."""
    plan = config.get("parallel")
    plan = plan if isinstance(plan, Mapping) else {}
    tensor, stages = plan.get("tensor_parallel_size", 1), plan.get("pipeline_parallel_size", 1)
    degrees = [f"{name} {size}" for name, size in (("tensor", tensor), ("pipeline", stages)) if size != 1]
    micro_batches = plan.get("num_micro_batches", 1)
    parts = [" x ".join(degrees), *([f"{micro_batches} micro-batches"] if stages != 1 and micro_batches != 1 else [])]
    return visible(", ".join(parts)) if degrees else "one rank"


def differing(config: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of `parts` in which two configurations differ, the more interesting first."""
    mine, theirs = parts(config), parts(other)
    return tuple(key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key))


def choice_name(choice: Any) -> str:
    """`{"name": "int4", "group_size": 64}` -> `int4`; a plain value as it is written in YAML."""
    if isinstance(choice, bool):
        return str(choice).lower()
    return visible(choice.get("name", "?") if isinstance(choice, Mapping) else choice)


class Labels:
    """Labels of one study. Knobs are named when they vary between its trials; else numbers are, where there are few."""

    def __init__(self, baseline: Mapping[str, Any] | None, configs: Iterable[Mapping[str, Any]]) -> None:
        self._baseline = baseline
        self._values: dict[tuple[str, str, str], set[str]] = {}
        for config in configs:
            for key, choice in parts(config).items():
                if isinstance(choice, Mapping):
                    for knob, value in choice.items():
                        self._values.setdefault((key, choice_name(choice), knob), set()).add(repr(value))

    def of(self, config: Mapping[str, Any]) -> str:
        """The short label; `unmodified` for the baseline's own configuration."""
        flat = parts(config)
        if self._baseline is None:
            keys = tuple(key for key in flat if key in FAMILIES)
        else:
            keys = differing(config, self._baseline)
        shown = [
            f"parallel {plan_name(config)}"
            if key.startswith("parallel.")
            else f"{visible(key)} {self._value(key, flat.get(key))}"
            for key in keys
        ]
        return " · ".join(dict.fromkeys(shown)) or "unmodified"

    def _value(self, key: str, value: Any) -> str:
        if not isinstance(value, Mapping):
            return choice_name("automatic" if value is None else value)
        knobs = {str(knob): setting for knob, setting in value.items() if knob != "name"}
        name = choice_name(value)
        varying = {knob: v for knob, v in knobs.items() if len(self._values.get((key, name, knob), ())) > 1}
        sizes = {knob: v for knob, v in knobs.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        named = varying or (sizes if len(sizes) <= 2 else {})
        inside = ", ".join(f"{visible(knob)} {visible(setting)}" for knob, setting in named.items())
        return f"{name} ({inside})" if inside else name

"""What happened to the memory of requests during a window, and how its steps were run, from an engine's counters before
and after it."""

from collections.abc import Collection, Mapping
from typing import Any

from codesign.measure.session import TrialFailed
from codesign.results.record import MetricValue, Outcome
from codesign.spec.metrics import METRICS


def memory_events(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, float]:
    """Each only where it could happen: `preemptions`, and `prefix_hit_rate`, the share of prompt tokens that were found
    in the prefix cache instead of being computed.

    Raises:
        TrialFailed: counters that run backwards, or more found than asked for; the engine is not believed.
    """
    grown = {name: count - before.get(name, 0) for name, count in after.items()}
    asked, hits = grown.get("prompt_tokens", 0), grown.get("prefix_hit_tokens", 0)
    found: dict[str, float] = {}
    if "blocks" in after:
        found["preemptions"] = grown.get("preemptions", 0)
    if asked:
        found["prefix_hit_rate"] = hits / asked
    if not 0 <= hits <= asked or any(value < 0 for value in found.values()):
        raise TrialFailed(
            Outcome(kind="protocol", detail=f"counters that cannot be: {dict(before)}, then {dict(after)}")
        )
    return found


def replayed_steps(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Where steps are replayed: `graphs_captured`, `steps_replayed` and `steps_not_replayed` of the window."""
    names = ("graphs_captured", "steps_replayed", "steps_not_replayed")
    return {name: after[name] - before.get(name, 0) for name in names if name in after}


def memory_metrics(found: Mapping[str, Any], *, num_requests: int, asked: Collection[str]) -> dict[str, MetricValue]:
    """The metrics of `memory_events` and, under `kv_use`, of the readings of a paged cache.

    Where memory cannot be taken back or shared, that happened 0 times, which is said only where it is asked for.

    Args:
        asked: metrics that are objectives or limits.
    """
    preemptions = found.get("preemptions")
    totals = {
        "prefix_hit_rate": found.get("prefix_hit_rate"),
        "preemptions_per_request": None if preemptions is None else preemptions / num_requests,
    }
    use = found.get("kv_use", {})
    medians = {f"kv_{key}": use[key]["p50"] for key in ("fragmentation", "shared_bytes") if use}
    return {
        name: MetricValue(value=value or 0.0, unit=METRICS[name].unit, statistic="total", num_samples=num_requests)
        for name, value in totals.items()
        if value is not None or name in asked
    } | {
        name: MetricValue(value=value, unit=METRICS[name].unit, statistic="p50", num_samples=use["num_samples"])
        for name, value in medians.items()
    }

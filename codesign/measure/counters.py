"""What happened to the memory of requests during a window, from an engine's counters before and after it."""

from collections.abc import Mapping

from codesign.measure.session import TrialFailed
from codesign.results.record import Outcome


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

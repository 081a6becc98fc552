"""What a record says of the sending side: how late it was, what it changed in a trace, what its sample can carry."""

from collections.abc import Sequence
from typing import Any

from codesign.measure.load import LoadResult
from codesign.measure.percentiles import percentiles
from codesign.measure.replay import Replay
from codesign.results.measurement import statistic

LATE_SHARE = 0.05  # of the median time to the first token; more of it is said aloud


def client_facts(
    blocks: Sequence[LoadResult], replay: Replay | None, *, confidence: float
) -> tuple[dict[str, Any], list[str]]:
    """(entries of the record's `trust`, warnings) of measured blocks with at least one answer."""
    late_ms = [late for block in blocks for late in block.late_ms]
    samples = [sample for block in blocks for sample in block.samples]
    found: dict[str, Any] = {
        "late_ms": {name: statistic(late_ms, name) for name in ("p50", "p99", "max")},
        "percentiles": percentiles(samples, confidence=confidence),
    }
    warnings = []
    late = found["late_ms"]["p99"]
    if late > LATE_SHARE * statistic([sample.ttft_ms for sample in samples], "p50"):
        warnings.append(f"the client itself sent late (p99 {late:.1f} ms), which is part of every latency here")
    if replay is not None:
        facts = found["trace"] = replay.facts(len(samples))
        changed = {name: count for name, count in facts.items() if count and name not in ("num_requests", "num_used")}
        if changed:
            what = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in changed.items())
            warnings.append(f"of the {facts['num_used']} requests of the trace that were used: {what}")
    return found, warnings

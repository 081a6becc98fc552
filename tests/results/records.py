"""Small real records for the tests of what stands on them."""

from collections.abc import Mapping

from codesign.results.record import MetricValue, Outcome, OutcomeKind, TrialRecord
from codesign.spec.metrics import METRICS


def record(
    number: int,
    metrics: Mapping[str, float] | None = None,
    *,
    outcome: OutcomeKind = "ok",
    violations: Mapping[str, float] | None = None,
    attempt: int = 0,
    uid: str | None = None,
) -> TrialRecord:
    """A record with these metric values in their default statistics."""
    return TrialRecord(
        study="tests",
        number=number,
        uid=uid or f"trial{number}-{attempt}",
        attempt=attempt,
        config={"dtype": "fp32", "weights": {"name": "native"}},
        config_digest="0123456789abcdef",
        outcome=Outcome(kind=outcome),
        violations=violations or {},
        metrics={
            name: MetricValue(value=value, unit=METRICS[name].unit, statistic=METRICS[name].statistic)
            for name, value in (metrics or {}).items()
        },
    )

"""The Pareto front of a study and the few configurations on it that get a name.

a dominates b when a is at least as good in every objective and better in one. Equal points do not dominate each other,
so ties stay on the front together.
"""

import math
from collections.abc import Iterable, Sequence

from codesign.errors import WorkError
from codesign.results.record import TrialRecord
from codesign.spec.metrics import METRICS, Objective

SPEED = (
    *("throughput_tokens_per_s", "goodput_requests_per_s", "capacity_requests_per_s"),
    *("tpot_ms", "itl_ms", "ttft_ms", "e2e_ms"),
)
SIZE = ("peak_memory_bytes", "weights_bytes", "kv_bytes")
QUALITY = tuple(name for name, metric in METRICS.items() if metric.needs == "quality")


def losses(record: TrialRecord, objectives: Sequence[Objective]) -> tuple[float, ...] | None:
    """The record's objective values, each turned so that less is better; None when one was not measured.

    Values are taken to the resolution of their metric, so that rounding of the arithmetic decides no comparison.

    Raises:
        WorkError: the record holds another statistic of a metric than the objective asks for.
    """
    found: list[float] = []
    for objective in objectives:
        value = record.metrics.get(objective.metric)
        if value is None:
            return None
        if objective.statistic and value.statistic != objective.statistic:
            raise WorkError(
                f"trial {record.number} holds {objective.metric} as {value.statistic or 'a single value'}, "
                f"the study asks for {objective.statistic}"
            )
        loss = -value.value if objective.direction == "maximize" else value.value
        step = METRICS[objective.metric].resolution
        found.append(loss - math.remainder(loss, step) if step else loss)
    return tuple(found)


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether losses `a` are nowhere worse than `b` and somewhere better."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def front(records: Iterable[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """The feasible records that no other feasible record dominates, by number. Ties are kept."""
    points = _feasible(records, objectives)
    kept = [record for record, loss in points if not any(dominates(other, loss) for _, other in points)]
    return sorted(kept, key=lambda record: (record.number, record.attempt))


def picks(records: Iterable[TrialRecord], objectives: Sequence[Objective]) -> dict[str, int]:
    """Named configurations -> trial number. A name without a candidate is absent.

    baseline: trial 0, the unmodified configuration, feasible or not, if it was measured.
    fastest, smallest, best_quality: the front's best in the study's first objective of that kind (SPEED, SIZE,
        QUALITY); absent when the study optimises nothing of the kind.
    balanced: the front's point with the least Euclidean distance to the ideal point, after each objective is scaled to
        0 (best on the front) ... 1 (worst on the front): the compromise solution of Zeleny (1973) with p = 2.

    Equals go to the more balanced, then to the lower number.
    """
    records = list(records)
    named: dict[str, int] = {}
    if any(record.number == 0 for record in records):
        named["baseline"] = 0
    points = _feasible(front(records, objectives), objectives)
    if not points:
        return named
    distance = {record.number: _distance(loss, [other for _, other in points]) for record, loss in points}
    for name, kind in (("fastest", SPEED), ("smallest", SIZE), ("best_quality", QUALITY)):
        index = next((i for i, objective in enumerate(objectives) if objective.metric in kind), None)
        if index is not None:
            ranked = [(loss[index], distance[record.number], record.number) for record, loss in points]
            named[name] = min(ranked)[2]
    named["balanced"] = min(distance, key=lambda number: (distance[number], number))
    return named


def _feasible(
    records: Iterable[TrialRecord], objectives: Sequence[Objective]
) -> list[tuple[TrialRecord, tuple[float, ...]]]:
    found = []
    for record in records:
        loss = losses(record, objectives) if record.is_feasible else None
        if loss is not None:
            found.append((record, loss))
    return found


def _distance(loss: Sequence[float], others: Sequence[Sequence[float]]) -> float:
    total = 0.0
    for own, column in zip(loss, zip(*others, strict=True), strict=True):
        low, high = min(column), max(column)
        total += ((own - low) / (high - low)) ** 2 if high > low else 0.0
    return math.sqrt(total)

"""What a trial's record means to the sampler.

    ok, limits kept      values as measured                    constraints <= 0
    ok, a limit broken   values as measured                    constraints > 0
    failed, predicted    finite sentinels, worse than any seen constraints > 0
    harness, a hang      nothing: it says nothing about the configuration, or not yet, and is tried again

Failures are told as completed but infeasible, because TPE ignores failed trials: on a small problem it spent 84 % of
its trials in the out-of-memory region when told "failed", 25 % when told "infeasible". Measured values of a broken
limit are kept, since they are true and rank the neighbours.
"""

import dataclasses
from collections.abc import Sequence

from codesign.results.pareto import losses
from codesign.results.record import TrialRecord
from codesign.search.retry import is_settled
from codesign.spec.metrics import Objective

FAILURE = "failure"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """Attributes:
    values: one per objective, finite, in its unit.
    constraints: name -> amount over the limit; the trial is infeasible when one is above 0.
    is_sentinel: a value in `values` stands for "not measured" and belongs in no front or plot.
    """

    values: tuple[float, ...]
    constraints: dict[str, float]
    is_sentinel: bool


def told(record: TrialRecord, objectives: Sequence[Objective], earlier: Sequence[TrialRecord]) -> Told | None:
    """What to tell for `record`; None when there is nothing to tell, because it is tried again.

    Args:
        earlier: records told before this one; sentinels are worse than anything in them.
    """
    if not is_settled(record):
        return None
    measured = [value_of(record, objective) for objective in objectives]
    values = [
        sentinel(objective, earlier) if value is None else value
        for objective, value in zip(objectives, measured, strict=True)
    ]
    # A result without one of its objectives cannot be compared: as good as a failure.
    failed = None in measured
    return Told(
        values=tuple(values),
        constraints={FAILURE: 1.0 if failed else 0.0, **record.violations},
        is_sentinel=failed,
    )


def sentinel(objective: Objective, earlier: Sequence[TrialRecord]) -> float:
    """A finite value worse than any measured in `earlier`: the worst, moved by half of itself and a margin."""
    seen = [value for record in earlier if (value := value_of(record, objective)) is not None]
    minimize = objective.direction == "minimize"
    worst = (max if minimize else min)(seen, default=0.0)
    step = 0.5 * abs(worst) + 1e-9 if seen else 1.0
    return worst + step if minimize else worst - step


def value_of(record: TrialRecord, objective: Objective) -> float | None:
    """The objective's value as measured; None where the trial failed or did not measure it.

    Raises:
        WorkError: the record holds another statistic than the objective asks for.
    """
    if record.outcome.kind != "ok" or losses(record, (objective,)) is None:
        return None
    return record.metrics[objective.metric].value

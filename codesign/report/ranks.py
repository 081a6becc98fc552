"""Do several ranks help here? The best that was found with each plan, against the best on one rank.

`payoff.py` holds a plan against one rank where nothing else differs; few trials of a search are such pairs. This is the
other question, the one of whoever deploys: is what several ranks can do at their best worth more than what one can?
"""

from codesign.report.compare import change
from codesign.report.labels import differing, plan_name
from codesign.report.show import full, listed, plural, spoken, visible
from codesign.report.study import Study
from codesign.results.pareto import SPEED
from codesign.results.record import TrialRecord
from codesign.spec.metrics import METRICS

ONE = "one rank"


def rank_points(study: Study) -> tuple[str, ...]:
    """One sentence for each plan over several ranks that kept the limits, and one that sums up; none without any."""
    plans: dict[str, list[TrialRecord]] = {}
    metric = next((name for name in SPEED if any(name in record.metrics for record in study.measured)), None)
    if metric is None:
        return ()
    for record in study.measured:
        if record.is_feasible and metric in record.metrics:
            plans.setdefault(plan_name(record.config), []).append(record)
    alone = plans.pop(ONE, [])
    if not alone or not plans:
        return ()
    one, winners, said = _best(alone, metric), [], []
    for plan, members in sorted(plans.items()):
        best = _best(members, metric)
        found = change(best, one, metric, num_compared=sum(map(len, plans.values())))
        if found is None:
            continue
        if found.judgement == "better":
            winners.append(plan)
        memory = change(best, one, "peak_memory_bytes")
        cost = "" if memory is None else f" at {memory.size} its peak memory"
        others = [visible(key) for key in differing(best.config, one.config) if not key.startswith("parallel.")]
        also = f"; it differs in {listed(others)} too" if others else ""
        said.append(
            f"Best of {plural(len(members), 'trial')} with {plan}: #{best.number}, "
            f"{full(best.metrics[metric], best.tier)}, {found.text()} the best on one rank"
            f"{cost}{also}."
        )
    if not said:
        return ()
    end = f"beat it measurably with {listed(winners)}" if winners else "do not beat it measurably with any plan"
    start = f"The best {spoken(metric)} on one rank is #{one.number}, {full(one.metrics[metric], one.tier)}"
    return (f"{start}; several ranks {end}.", *said)


def _best(records: list[TrialRecord], metric: str) -> TrialRecord:
    sign = 1 if METRICS[metric].direction == "maximize" else -1
    return max(records, key=lambda record: (sign * record.metrics[metric].value, -record.number))

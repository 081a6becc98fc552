"""What the study found, in sentences, computed from the records and from nothing else. Ties are called ties."""

import dataclasses
from collections import Counter

from codesign.report.compare import change, luck_of_the_best, outdone, tied_with
from codesign.report.payoff import Payoff, by_choice, summary
from codesign.report.ranks import rank_points
from codesign.report.show import basis, full, listed, number, plural, quantity, spoken, visible
from codesign.report.study import Study
from codesign.report.tables import broken, labels_of
from codesign.results.pareto import QUALITY, SIZE, SPEED
from codesign.results.record import MetricValue, TrialRecord

# The metrics that a named pick can have been picked by; `balanced` is picked by all objectives together.
PICKED_BY = {"fastest": SPEED, "smallest": SIZE, "best_quality": QUALITY}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    headline: str
    points: tuple[str, ...] = ()


def verdict(study: Study, payoffs: list[Payoff]) -> Verdict:
    """One sentence and what stands behind it; says plainly when there is nothing to choose from."""
    if not study.records:
        return Verdict(headline="No trial has finished yet.")
    failures = _failures(study)
    if not study.measured:
        return Verdict(
            headline=f"None of the {plural(len(study.records), 'trial')} could be measured.", points=failures
        )
    feasible = [record for record in study.measured if record.is_feasible]
    if not feasible:
        return Verdict(
            headline=f"None of the {len(study.measured)} measured configurations keeps the limits.",
            points=(*_closest(study), *failures),
        )
    if study.baseline is not None and [record.uid for record in study.measured] == [study.baseline.uid]:
        figures = [full(m, study.baseline.tier) for m in _objective_values(study, study.baseline)]
        return Verdict(
            headline="Only the unmodified configuration has been measured, so there is nothing to choose from yet.",
            points=(f"It gives {listed(figures)}.", *failures) if figures else failures,
        )
    return Verdict(
        headline=_headline(study),
        points=(*_payoff_points(payoffs), *rank_points(study), *_luck(study), *failures),
    )


def _headline(study: Study) -> str:
    names = listed([spoken(objective.metric) for objective in study.objectives])
    if len(study.front) == 1:
        start = f"One configuration is best in {names}"
    else:
        start = f"{len(study.front)} of {len(study.measured)} measured configurations trade {names}"
        weaker = len(outdone(study.front, [objective.metric for objective in study.objectives]))
        if weaker:
            start += f" ({len(study.front) - weaker} stand apart measurably)"
    return f"{start}; {_speed_claim(study)}"


def _speed_claim(study: Study) -> str:
    fastest, baseline = study.picks.get("fastest"), study.baseline
    if baseline is None or baseline.outcome.kind != "ok":
        return "the unmodified configuration could not be measured, so no gain can be stated."
    if fastest is None:
        return "no fastest configuration could be named."
    record = study.trial(fastest)
    if record.uid == baseline.uid:
        return "none of those that keep the limits is faster than the unmodified one."
    compared = study.num_compared
    found = (change(record, baseline, metric, num_compared=compared) for metric in SPEED)
    gain = next((c for c in found if c is not None), None)
    if gain is None or gain.judgement == "unknown":
        return "whether any is faster than the unmodified one cannot be told from these readings."
    if gain.judgement != "better":
        return (
            f"none is measurably faster than the unmodified one (the best of {compared}: {gain.text()} its "
            f"{spoken(gain.metric)})."
        )
    label = labels_of(study).of(record.config)
    return (
        f"the fastest, {label}, gives {gain.text()} the unmodified {spoken(gain.metric)} "
        f"({basis(record.metrics[gain.metric], record.tier)}){_quality_cost(record)}."
    )


def _quality_cost(record: TrialRecord) -> str:
    """Speed is never stated without quality from the same trial."""
    for metric in QUALITY:
        if metric in record.metrics:
            value = record.metrics[metric]
            return f" at {spoken(metric)} {quantity(value.value, value.unit)}"
    return ", quality not measured"


def _objective_values(study: Study, record: TrialRecord) -> list[MetricValue]:
    return [record.metrics[o.metric] for o in study.objectives if o.metric in record.metrics]


def pick_tie(study: Study, pick: str, record: TrialRecord) -> str:
    """`No measurable difference in throughput to #3, #9.`, or "" when the pick stands alone or is by no one metric."""
    metric = next((o.metric for o in study.objectives if o.metric in PICKED_BY.get(pick, ())), None)
    if metric is None or metric not in record.metrics:
        return ""
    tied = tied_with(record, (other for other in study.measured if other.is_feasible), metric)
    if not tied:
        return ""
    shown = [f"#{other.number}" for other in tied[:6]]
    more = [f"{len(tied) - 6} more"] if len(tied) > 6 else []
    return f"No measurable difference in {spoken(metric)} to {listed([*shown, *more])}."


def _payoff_points(payoffs: list[Payoff]) -> tuple[str, ...]:
    """The choices that cost speed somewhere, in isolation: the news that nobody prints."""
    costly = [group for group in by_choice(payoffs) if any(p.is_isolated and p.verdict == "slower" for p in group)]
    return tuple(f"{summary(group)[0].upper()}{summary(group)[1:]}" for group in costly)


def _luck(study: Study) -> tuple[str, ...]:
    """The winner's curse, in the size that it has here."""
    for metric in SPEED:
        luck = luck_of_the_best(study.measured, metric)
        if luck is not None:
            return (
                f"The best of {luck[0]} equal configurations would look up to {number(100 * luck[1])} % better by "
                f"chance alone at the spread seen inside these trials: confirm before deploying.",
            )
    return ()


def _failures(study: Study) -> tuple[str, ...]:
    if not study.failed:
        return ()
    kinds = Counter(record.outcome.kind for record in study.failed)
    told = listed([f"{count} {kind}" for kind, count in kinds.most_common()])
    return (f"{len(study.failed)} of {plural(len(study.records), 'trial')} failed: {told}.",)


def _closest(study: Study) -> tuple[str, ...]:
    record = min(study.measured, key=lambda r: (max(broken(r).values(), default=0.0), r.number))
    excess = listed([f"{visible(name)} by {number(100 * amount)} %" for name, amount in sorted(broken(record).items())])
    return (f"Closest is #{record.number} {labels_of(study).of(record.config)}: it breaks {excess}.",)

"""Does a choice pay here? Each format, policy, codec, plan of ranks and so on against the unmodified one, at each batch
size.

A pair is two trials that differ in this one choice and in nothing else. Where no such pair was measured, the closest
partner is shown and called confounded, with the names of what else differs. Nothing is pooled into one interval: pairs
differ in their other choices, so the range over pairs and how many of them were told apart say more.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import geometric_mean, mean
from typing import Any, Literal

from codesign.report.compare import BY_DIFFERENCE, Change, Judgement, change
from codesign.report.labels import choice_name, parts, plan_name
from codesign.report.show import listed, number, plural, signed, spoken, visible
from codesign.report.study import Study
from codesign.results.pareto import SIZE, SPEED
from codesign.results.record import TrialRecord

CHOICES = (
    "dtype",
    "weights",
    "prune",
    "kv.policy",
    "kv.codec",
    "kv.place",
    "kv.layout",
    "attention",
    "scheduler",
    "speculate",
    "prefix_cache",
    "parallel",
)
SHOWN = (
    "throughput_tokens_per_s",
    "ttft_ms",
    "tpot_ms",
    *SIZE,
    "kl_divergence",
    "retrieval_accuracy",
    "energy_per_token_j",
)

Verdict = Literal["faster", "slower", "no measurable difference", "mixed", "unknown"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A trial with the choice, its partner without, and what else differs between them ("" when nothing does)."""

    trial: TrialRecord
    partner: TrialRecord
    confounders: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """One metric over the pairs of a payoff: the typical effect and its range (one pair: that pair's interval)."""

    metric: str
    typical: float
    changes: tuple[Change, ...]

    @property
    def low(self) -> float | None:
        return self.changes[0].low if len(self.changes) == 1 else min(c.effect for c in self.changes)

    @property
    def high(self) -> float | None:
        return self.changes[0].high if len(self.changes) == 1 else max(c.effect for c in self.changes)

    def count(self, judgement: Judgement) -> int:
        return sum(c.judgement == judgement for c in self.changes)

    def text(self) -> str:
        if len(self.changes) == 1:
            return self.changes[0].text()
        if self.metric in BY_DIFFERENCE:
            return f"{signed(self.typical)} ({signed(self.low or 0)} to {signed(self.high or 0)})"
        return f"{number(self.typical)}× ({number(self.low or 0)} to {number(self.high or 0)})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Payoff:
    """One choice at one batch size.

    Attributes:
        pairs: empty when every trial with the choice failed or nothing comparable was measured.
        num_failed: trials with this choice at this batch size that ended in anything but "ok".
    """

    key: str
    name: str
    unmodified: str
    max_batch_size: str
    pairs: tuple[Pair, ...]
    effects: tuple[Effect, ...]
    num_failed: int

    @property
    def is_isolated(self) -> bool:
        return bool(self.pairs) and not any(pair.confounders for pair in self.pairs)

    @property
    def confounders(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key for pair in self.pairs for key in pair.confounders))

    def effect(self, metric: str) -> Effect | None:
        return next((effect for effect in self.effects if effect.metric == metric), None)

    @property
    def speed(self) -> Effect | None:
        """The first of SPEED that some pair has."""
        return next((effect for metric in SPEED if (effect := self.effect(metric))), None)

    @property
    def verdict(self) -> Verdict:
        speed = self.speed
        if speed is None:
            return "unknown"
        better, worse, unknown = (speed.count(j) for j in ("better", "worse", "unknown"))
        if better and worse:
            return "mixed"
        if better > len(speed.changes) / 2:
            return "faster"
        if worse > len(speed.changes) / 2:
            return "slower"
        return "unknown" if unknown == len(speed.changes) else "no measurable difference"

    @property
    def told(self) -> str:
        """How many pairs stand behind the verdict: `1 pair`, `slower in 3 of 4 pairs`."""
        count = len(self.pairs) if self.speed is None else len(self.speed.changes)
        if self.speed is None or count == 1 or self.verdict not in ("faster", "slower"):
            return plural(count, "pair")
        return (
            f"{self.verdict} in {self.speed.count('better' if self.verdict == 'faster' else 'worse')} of {count} pairs"
        )

    @property
    def caveat(self) -> str:
        """Why the comparison is weak; "" when it is not."""
        if not self.pairs:
            return f"all {plural(self.num_failed, 'trial')} failed" if self.num_failed else "nothing comparable ran"
        return (
            "" if self.is_isolated else f"not isolated: also differs in {listed(list(map(visible, self.confounders)))}"
        )


_SAID: dict[Verdict, str] = {
    "faster": "pays in speed",
    "slower": "does not pay in speed",
    "no measurable difference": "makes no measurable difference to speed",
    "mixed": "is faster in some pairs and slower in others",
    "unknown": "cannot be judged in speed",
}


def summary(payoffs: Sequence[Payoff]) -> str:
    """What a person should take away about one choice over its batch sizes, the bad news included.

    `weights int8 pays in speed at max_batch_size 1 (1.45× [1.38–1.46]); weight bytes 0.52×.`
    """
    isolated = [p for p in payoffs if p.is_isolated]
    name = f"{visible(payoffs[0].key)} {payoffs[0].name}"
    if not isolated:
        reasons = dict.fromkeys(p.caveat for p in payoffs)
        return f"{name}: not settled, no two trials differ in this choice alone ({'; '.join(reasons)})."
    clauses = []
    for verdict, said in _SAID.items():
        places = [f"{p.max_batch_size}{_effect_in_brackets(p)}" for p in isolated if p.verdict == verdict]
        if places:
            clauses.append(f"{said} at max_batch_size {listed(places)}")
    return f"{name} {'; '.join([*clauses, *_other_effects(isolated)])}."


def summaries(found: Sequence[Payoff]) -> list[str]:
    """What to take away, choice by choice; those that no pair of trials settles are named together at the end."""
    groups = by_choice(found)
    open_ones = [
        group
        for group in groups
        if not any(own.is_isolated for own in group) and not all(own.num_failed and not own.pairs for own in group)
    ]
    if len(open_ones) < 2:
        return [summary(group) for group in groups]
    names = listed([f"{visible(group[0].key)} {group[0].name}" for group in open_ones])
    reason = "no two trials differ in one of them alone; the table says in what else"
    return [summary(group) for group in groups if group not in open_ones] + [f"Not settled: {names}: {reason}."]


def _effect_in_brackets(payoff: Payoff) -> str:
    if payoff.speed is None:
        return " (speed not measured)"
    name = "" if payoff.speed.metric == "throughput_tokens_per_s" else f"{payoff.speed.metric} "
    if len(payoff.speed.changes) == 1:
        return f" ({name}{payoff.speed.text()})"
    low, high = number(payoff.speed.low or 0), number(payoff.speed.high or 0)
    return f" ({name}{number(payoff.speed.typical)}×, {low} to {high} in {len(payoff.speed.changes)} pairs)"


def _other_effects(payoffs: Sequence[Payoff]) -> list[str]:
    """Bytes and divergence over all batch sizes: `weight bytes 0.31×`, `KL divergence +0.03 to +0.05`."""
    found = []
    for metric in ("weights_bytes", "kv_bytes", "kl_divergence"):
        effects = [effect for p in payoffs if (effect := p.effect(metric)) is not None]
        values = sorted(c.effect for effect in effects for c in effect.changes)
        if not values or not any(_says_something(effect) for effect in effects):
            continue
        low, high = (signed(v) if metric in BY_DIFFERENCE else f"{number(v)}×" for v in (values[0], values[-1]))
        found.append(f"{spoken(metric)} {low}" + (f" to {high}" if low != high else ""))
    return found


def _says_something(effect: Effect) -> bool:
    return any(abs(c.effect - (1 if c.is_ratio else 0)) > 1e-9 for c in effect.changes)


def payoffs(study: Study) -> list[Payoff]:
    """Every choice that some trial made differently from the baseline, by key, name and batch size."""
    if study.baseline is None:
        return []
    flat = {record.uid: _choices(record.config) for record in study.records}
    usual = flat[study.baseline.uid]
    groups: dict[tuple[str, str, str], list[TrialRecord]] = {}
    for record in study.records:
        for key in CHOICES:
            choice = flat[record.uid].get(key)
            if choice != usual.get(key):
                batch = str(flat[record.uid].get("max_batch_size", "?"))
                groups.setdefault((key, choice_name(choice), batch), []).append(record)
    found = []
    for (key, name, batch), members in groups.items():
        measured = [record for record in members if record.outcome.kind == "ok"]
        partners = [record for record in study.measured if flat[record.uid].get(key) == usual.get(key)]
        pairs = _pairs(flat, key, measured, partners)
        found.append(
            Payoff(
                key=key,
                name=name,
                unmodified=choice_name(usual.get(key)),
                max_batch_size=batch,
                pairs=pairs,
                effects=_effects(pairs),
                num_failed=len(members) - len(measured),
            )
        )
    return sorted(found, key=lambda p: (CHOICES.index(p.key), p.name, len(p.max_batch_size), p.max_batch_size))


def _choices(config: Mapping[str, Any]) -> dict[str, Any]:
    """`parts`, but degrees and micro-batches are one choice: stages without micro-batches mean nothing."""
    flat = {key: value for key, value in parts(config).items() if not key.startswith("parallel.")}
    return {**flat, "parallel": plan_name(config)}


def _pairs(
    flat: Mapping[str, Mapping[str, Any]], key: str, members: Sequence[TrialRecord], partners: Sequence[TrialRecord]
) -> tuple[Pair, ...]:
    """Exact pairs; where there is none, the one closest pair, whose batch size must be the same all the same."""
    candidates = []
    for member in members:
        mine = flat[member.uid]
        for partner in partners:
            theirs = flat[partner.uid]
            others = tuple(k for k in {**mine, **theirs} if k != key and mine.get(k) != theirs.get(k))
            if "max_batch_size" not in others:
                candidates.append(Pair(trial=member, partner=partner, confounders=others))
    exact = tuple(pair for pair in candidates if not pair.confounders)
    if exact or not candidates:
        return exact
    return (min(candidates, key=lambda pair: (len(pair.confounders), pair.trial.number, pair.partner.number)),)


def by_choice(found: Sequence[Payoff]) -> list[list[Payoff]]:
    """The payoffs of one choice together, in order."""
    grouped: dict[tuple[str, str], list[Payoff]] = {}
    for payoff in found:
        grouped.setdefault((payoff.key, payoff.name), []).append(payoff)
    return list(grouped.values())


def _effects(pairs: Sequence[Pair]) -> tuple[Effect, ...]:
    found = []
    for metric in SHOWN:
        changes = tuple(c for pair in pairs if (c := change(pair.trial, pair.partner, metric)) is not None)
        if changes:
            values = [c.effect for c in changes]
            typical = mean(values) if metric in BY_DIFFERENCE else geometric_mean(values)
            found.append(Effect(metric=metric, typical=typical, changes=changes))
    return tuple(found)

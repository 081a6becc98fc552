"""Does a choice pay here? Each weight format, KV policy, codec and dtype against the unmodified choice, at each batch size.

A pair is two trials that differ in this one choice and in nothing else. Where no such pair was measured, the closest
partner is shown and called confounded, with the names of what else differs. Nothing is pooled into one interval: pairs
differ in their other choices, so the range over pairs and how many of them were told apart say more.
"""

import dataclasses
from collections.abc import Sequence
from statistics import geometric_mean, mean
from typing import Literal

from codesign.report.compare import BY_DIFFERENCE, Change, Judgement, change
from codesign.report.labels import choice_name, differing, parts
from codesign.report.show import number, visible
from codesign.report.study import Study
from codesign.results.pareto import SPEED
from codesign.results.record import TrialRecord
from codesign.spec.metrics import METRICS

CHOICES = ("dtype", "weights", "kv.policy", "kv.codec", "attention", "scheduler")
SHOWN = (*SPEED, "peak_memory_bytes", "weights_bytes", "kv_bytes", "kl_divergence", "retrieval_accuracy")

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
            return f"{self.typical:+.3g} ({self.low:+.3g} to {self.high:+.3g})"
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

    def sentence(self) -> str:
        """What a person should take away, the bad news included."""
        where = f"{visible(self.key)} {self.name} at max_batch_size {self.max_batch_size}"
        if not self.pairs:
            tried = f"all {self.num_failed} trials with it failed" if self.num_failed else "nothing comparable ran"
            return f"{where}: cannot be said, {tried}."
        speed = self.speed
        if speed is None:
            return f"{where}: cannot be said, speed was not measured in both trials of any pair."
        measured = f"{METRICS[speed.metric].name} {speed.text()} of {self.unmodified}"
        told = f"{len(speed.changes)} pair" + ("s" if len(speed.changes) > 1 else "")
        if self.verdict in ("faster", "slower"):
            judgement: Judgement = "better" if self.verdict == "faster" else "worse"
            if len(speed.changes) > 1:
                told = f"{self.verdict} in {speed.count(judgement)} of {told}"
        head = {
            "faster": "pays in speed",
            "slower": "does not pay in speed",
            "no measurable difference": "makes no measurable difference to speed",
            "mixed": "is faster in some pairs and slower in others",
            "unknown": "cannot be judged in speed: the readings carry no interval",
        }[self.verdict]
        rest = [
            f"{name} {effect.text()}"
            for name, effect in ((METRICS[e.metric].name, e) for e in self.effects)
            if effect.metric in ("weights_bytes", "kv_bytes", "kl_divergence") and _says_something(effect)
        ]
        tail = f"; {', '.join(rest)}" if rest else ""
        caveat = "" if self.is_isolated else f" Not isolated: {', '.join(map(visible, self.confounders))} differs too."
        return f"{where} {head}: {measured} ({told}){tail}.{caveat}"


def _says_something(effect: Effect) -> bool:
    return any(abs(c.effect - (1 if c.is_ratio else 0)) > 1e-9 for c in effect.changes)


def payoffs(study: Study) -> list[Payoff]:
    """Every choice that some trial made differently from the baseline, by key, name and batch size."""
    if study.baseline is None:
        return []
    usual = parts(study.baseline.config)
    groups: dict[tuple[str, str, str], list[TrialRecord]] = {}
    for record in study.records:
        flat = parts(record.config)
        for key in CHOICES:
            if flat.get(key) != usual.get(key):
                batch = str(flat.get("max_batch_size", "?"))
                groups.setdefault((key, choice_name(flat.get(key)), batch), []).append(record)
    found = []
    for (key, name, batch), members in groups.items():
        pairs = _pairs(study, key, [record for record in members if record.outcome.kind == "ok"])
        found.append(
            Payoff(
                key=key,
                name=name,
                unmodified=choice_name(usual.get(key)),
                max_batch_size=batch,
                pairs=pairs,
                effects=_effects(pairs),
                num_failed=sum(record.outcome.kind != "ok" for record in members),
            )
        )
    return sorted(found, key=lambda p: (CHOICES.index(p.key), p.name, len(p.max_batch_size), p.max_batch_size))


def _pairs(study: Study, key: str, members: Sequence[TrialRecord]) -> tuple[Pair, ...]:
    """Exact pairs; where there is none, the one closest pair, whose batch size must be the same all the same."""
    assert study.baseline is not None
    usual = parts(study.baseline.config).get(key)
    partners = [record for record in study.measured if parts(record.config).get(key) == usual]
    candidates = [
        Pair(trial=member, partner=partner, confounders=others)
        for member in members
        for partner in partners
        if "max_batch_size" not in (others := _others(member, partner, key))
    ]
    exact = tuple(pair for pair in candidates if not pair.confounders)
    if exact or not candidates:
        return exact
    return (min(candidates, key=lambda pair: (len(pair.confounders), pair.trial.number, pair.partner.number)),)


def _others(member: TrialRecord, partner: TrialRecord, key: str) -> tuple[str, ...]:
    return tuple(other for other in differing(member.config, partner.config) if other != key)


def _effects(pairs: Sequence[Pair]) -> tuple[Effect, ...]:
    found = []
    for metric in SHOWN:
        changes = tuple(c for pair in pairs if (c := change(pair.trial, pair.partner, metric)) is not None)
        if changes:
            values = [c.effect for c in changes]
            typical = mean(values) if metric in BY_DIFFERENCE else geometric_mean(values)
            found.append(Effect(metric=metric, typical=typical, changes=changes))
    return tuple(found)

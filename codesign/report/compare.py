"""How two measurements differ, and whether the sample can tell.

A ratio's 95 % interval comes from the two intervals by variance recovery (MOVER: Zou and Donner, Statistics in
Medicine 2008) on the logarithms: with x = ln(value), [l, u] = ln(interval),

    lower = (x1 - x2) - sqrt((x1 - l1)^2 + (u2 - x2)^2)        upper = (x1 - x2) + sqrt((u1 - x1)^2 + (x2 - l2)^2)

Shares and divergences can be zero, so they are compared by difference with the same formula without logarithms.

The intervals see what varies inside a trial, not what varies between processes and hours. So a timing counts as better
only when its interval excludes "equal" *and* the effect is larger than FLOOR of the weaker tier; everything else that
has an interval is a tie, and is called one.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import Literal

from codesign.report.show import interval, number, signed
from codesign.results.record import MetricValue, Tier, TrialRecord
from codesign.spec.metrics import METRICS

Judgement = Literal["better", "worse", "tie", "unknown"]

# Smallest relative effect that a tier may call a difference. Windows of 3 s in one process differ by a few percent on
# a shared machine; identical configurations have been seen 20 % apart where nobody controlled for it.
FLOOR: dict[Tier, float] = {"screen": 0.05, "confirm": 0.02, "publish": 0.01}
# Sums of storages: the same configuration gives the same number, so any difference is real.
EXACT = frozenset({"weights_bytes", "kv_bytes"})
# Zero is a possible and meaningful value: compared by difference, and the same text in every trial, so no floor.
BY_DIFFERENCE = frozenset({"kl_divergence", "top1_agreement", "retrieval_accuracy"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One metric of a trial against the same metric of another.

    Attributes:
        effect: ratio, or difference for metrics in BY_DIFFERENCE.
        low, high: 95 % interval of the effect; None where one of the two has none.
        judgement: "unknown" where the two readings carry no interval to tell by.
    """

    metric: str
    effect: float
    low: float | None
    high: float | None
    judgement: Judgement

    @property
    def is_ratio(self) -> bool:
        return self.metric not in BY_DIFFERENCE

    @property
    def size(self) -> str:
        """The effect alone: `1.42×` or `+0.031`."""
        return f"{number(self.effect)}×" if self.is_ratio else signed(self.effect)

    @property
    def spread(self) -> str:
        """Its interval: `[1.38–1.46]` or `[+0.028, +0.034]`; "" where there is none."""
        if self.is_ratio or self.low is None or self.high is None:
            return interval(self.low, self.high)
        return f"[{signed(self.low)}, {signed(self.high)}]"

    def text(self) -> str:
        """`1.42× [1.38–1.46]` or `+0.031 [+0.028, +0.034]`."""
        return f"{self.size} {self.spread}".strip()


def change(record: TrialRecord, other: TrialRecord, metric: str, *, num_compared: int = 1) -> Change | None:
    """`record` against `other`.

    Args:
        num_compared: how many trials `record` was picked from. The best of many looks good by luck, so the interval is
            widened until all of them together keep 95 % (Bonferroni).

    Returns:
        None where either lacks the metric or a ratio has no meaning (a value <= 0).
    """
    widen = NormalDist().inv_cdf(1 - 0.025 / max(1, num_compared)) / NormalDist().inv_cdf(0.975)
    mine, theirs = record.metrics.get(metric), other.metrics.get(metric)
    if mine is None or theirs is None or metric not in METRICS:
        return None
    if metric in BY_DIFFERENCE:
        bounds = _recover(_bounds(mine), _bounds(theirs), widen)
        effect, equal, floor = mine.value - theirs.value, 0.0, 0.0
    else:
        if mine.value <= 0 or theirs.value <= 0:
            return None
        logs = _recover(_log_bounds(mine), _log_bounds(theirs), widen)
        bounds = None if logs is None else (_exp(logs[0]), _exp(logs[1]))
        floor = 0.0 if metric in EXACT else max(FLOOR[record.tier], FLOOR[other.tier])
        effect, equal = mine.value / theirs.value, 1.0
    low, high = bounds if bounds is not None else (None, None)
    judgement = _judge(metric, effect, low, high, equal=equal, floor=floor)
    return Change(metric=metric, effect=effect, low=low, high=high, judgement=judgement)


def _judge(
    metric: str, effect: float, low: float | None, high: float | None, *, equal: float, floor: float
) -> Judgement:
    if low is None or high is None:
        if METRICS[metric].unit != "bytes":
            return "unknown"
        low = high = effect  # one reading of memory repeats to far better than the floor
    over = low > equal and effect > equal + floor
    under = high < equal and effect < equal / (1 + floor)
    if not over and not under:
        return "tie"
    return "better" if over == (METRICS[metric].direction == "maximize") else "worse"


def _exp(log: float) -> float:
    return math.exp(log) if log < 700 else math.inf


_Bounds = tuple[float, float, float]


def _bounds(metric: MetricValue) -> _Bounds | None:
    if metric.low is None or metric.high is None:
        return None
    return metric.low, metric.value, metric.high


def _log_bounds(metric: MetricValue) -> _Bounds | None:
    if metric.low is None or metric.high is None or metric.value <= 0:
        return None
    low = math.log(metric.low) if metric.low > 0 else -math.inf  # so few samples that zero is not excluded
    return low, math.log(metric.value), math.log(metric.high)


def _recover(mine: _Bounds | None, theirs: _Bounds | None, widen: float) -> tuple[float, float] | None:
    if mine is None or theirs is None:
        return None
    (l1, x1, u1), (l2, x2, u2) = mine, theirs
    return x1 - x2 - widen * math.hypot(x1 - l1, u2 - x2), x1 - x2 + widen * math.hypot(u1 - x1, x2 - l2)


def tied_with(record: TrialRecord, others: Iterable[TrialRecord], metric: str) -> list[TrialRecord]:
    """Those of `others` that this sample cannot tell from `record` in `metric`."""
    found = []
    for other in others:
        against = change(other, record, metric) if other.uid != record.uid else None
        if against is not None and against.judgement == "tie":
            found.append(other)
    return found


def outdone(front: Sequence[TrialRecord], metrics: Sequence[str]) -> dict[str, TrialRecord]:
    """Members of a front that are on it by noise, as far as the intervals tell.

    Returns:
        uid -> a member over which this one has no measurable advantage in any metric, while that one has an advantage
        or (all ties) the lower number.
    """
    found: dict[str, TrialRecord] = {}
    for mine in front:
        for other in front:
            changes = [change(mine, other, metric) for metric in metrics] if mine.uid != other.uid else []
            judgements = {c.judgement if c else "unknown" for c in changes}
            if judgements and judgements <= {"worse", "tie"} and ("worse" in judgements or other.number < mine.number):
                found.setdefault(mine.uid, other)
    return found


def luck_of_the_best(records: Iterable[TrialRecord], metric: str) -> tuple[int, float] | None:
    """(N, relative gain) that the best of N configurations *of equal worth* would show by chance alone.

    Expected maximum of N normal deviates (Blom: Phi^-1((N - 3/8) / (N + 1/4))) times the median standard error of the
    trials' logarithms, taken from the upper half of their intervals as if those were normal: with few blocks too
    large, so this is an upper figure. None with fewer than two intervals.
    """
    errors = sorted(
        (bounds[2] - bounds[1]) / 1.96
        for record in records
        if metric in record.metrics and (bounds := _log_bounds(record.metrics[metric])) is not None
    )
    if len(errors) < 2:
        return None
    count = len(errors)
    return count, math.expm1(NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) * errors[count // 2])

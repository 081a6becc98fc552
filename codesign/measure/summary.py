"""From raw readings of one trial to its metrics: every number with its unit, sample count and spread.

Times come from requests, throughput from blocks (repetitions of the workload's request set), quality from sequences.
What was not measured is absent.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from codesign.measure.capacity import Capacity
from codesign.measure.counters import memory_metrics
from codesign.measure.load import LoadResult
from codesign.measure.percentiles import TIMES, request_values
from codesign.results.measurement import median_interval, percentile_interval, percentile_upper, statistic
from codesign.results.record import MetricValue, RequestSample
from codesign.spec.metrics import METRICS, Objective
from codesign.spec.profile import Profile
from codesign.spec.slo import Limit, Slo

# 97.5 % quantiles of Student's t for 1..30 degrees of freedom; beyond, the normal's 1.96 is within 4 %.
_T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readings:
    """What one measured trial left behind.

    Attributes:
        blocks: the measured repetitions of the load.
        bytes: part -> bytes, with `peak`.
        quality: what `measure.quality` returned, or None.
        monitor: the device monitor's reading over all blocks.
        capacity: what the search for it found; None where it was not asked for, or found no time for one probe.
        cache: `preemptions`, `prefix_hit_rate` and `kv_use` as in the record's `trust`, each only where it can happen.
    """

    blocks: tuple[LoadResult, ...]
    bytes: Mapping[str, int]
    quality: Mapping[str, Any] | None
    monitor: Mapping[str, Any]
    capacity: Capacity | None = None
    cache: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def samples(self) -> tuple[RequestSample, ...]:
        return tuple(sample for block in self.blocks for sample in block.samples)

    @property
    def wall_s(self) -> float:
        return sum(block.wall_s for block in self.blocks)

    @property
    def output_tokens(self) -> int:
        return sum(block.output_tokens for block in self.blocks)


def metrics(readings: Readings, profile: Profile) -> dict[str, MetricValue]:
    """Metric name -> value. A metric that is an objective carries the objective's statistic, else its default one."""
    statistics = {objective.metric: objective.statistic for objective in profile.objectives}
    found: dict[str, MetricValue] = {}
    for name in TIMES:
        values = request_values(readings.samples, name)
        if values:
            found[name] = _over_requests(name, values, statistics.get(name) or METRICS[name].statistic)
    found |= _rates(readings, profile)
    found |= _device(readings, profile)
    found |= memory_metrics(readings.cache, num_requests=len(readings.samples), asked=profile.asked_metrics)
    if readings.quality is not None:
        found |= _quality(readings.quality)
    if readings.capacity is not None:
        found["capacity_requests_per_s"] = _capacity(readings.capacity)
    return found


def violations(readings: Readings, values: Mapping[str, MetricValue], slo: Slo, *, careful: bool) -> dict[str, float]:
    """Limit key -> how far over it, as a share of the bound (> 0 breaks it); absent for what was not measured.

    Args:
        careful: decide percentiles by their upper bound at 95 % instead of the empirical value, where the sample
            supports one.
    """
    found = {}
    for limit in slo.limits():
        value = _limited_value(readings, values, limit, careful=careful)
        if value is not None:
            found[limit.key] = limit.violation(value)
    return found


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t; None below three values."""
    count = len(values)
    if count < 3:
        return None
    mean = math.fsum(values) / count
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = _t975(count) * deviation / math.sqrt(count)
    return mean - half, mean + half


def _t975(count: int) -> float:
    """Student's t for a two-sided 95 % interval from `count` values."""
    return _T975[count - 2] if count - 2 < len(_T975) else 1.96


def ratio_interval(counts: Sequence[float], seconds: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of sum(counts) / sum(seconds) over blocks, by the ratio estimator; None below three blocks.

    Cochran, Sampling Techniques, 1977, section 6.3. It holds the ratio, as an interval of the mean of the blocks' rates
    need not: slow blocks last longer.
    """
    count = len(counts)
    if count < 3:
        return None
    ratio = math.fsum(counts) / math.fsum(seconds)
    squares = math.fsum((own - ratio * wall) ** 2 for own, wall in zip(counts, seconds, strict=True))
    half = _t975(count) * math.sqrt(squares / (count - 1) / count) / (math.fsum(seconds) / count)
    return ratio - half, ratio + half


def share_interval(successes: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    z = 1.96
    share, spread = successes / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def _over_requests(name: str, values: Sequence[float], chosen: str) -> MetricValue:
    interval = None
    if chosen == "p50":
        interval = median_interval(values)
    elif chosen == "mean":
        interval = mean_interval(values)
    elif chosen.startswith("p"):
        interval = percentile_interval(values, float(chosen[1:]))
    low, high = interval or (None, None)
    return MetricValue(
        value=statistic(values, chosen),
        unit=METRICS[name].unit,
        statistic=chosen,
        num_samples=len(values),
        low=low,
        high=high,
    )


def _rates(readings: Readings, profile: Profile) -> dict[str, MetricValue]:
    def rate(name: str, counts: Sequence[float]) -> MetricValue:
        low, high = ratio_interval(counts, [block.wall_s for block in readings.blocks]) or (None, None)
        return MetricValue(
            value=sum(counts) / readings.wall_s,
            unit=METRICS[name].unit,
            statistic="total",
            num_samples=len(counts),
            low=None if low is None else max(0.0, low),
            high=high,
        )

    found = {
        "throughput_tokens_per_s": rate("throughput_tokens_per_s", [block.output_tokens for block in readings.blocks])
    }
    limits = profile.slo.time_limits()
    if limits:
        good = [sum(_keeps(sample, limits) for sample in block.samples) for block in readings.blocks]
        found["goodput_requests_per_s"] = rate("goodput_requests_per_s", good)
    return found


def _capacity(capacity: Capacity) -> MetricValue:
    """Its interval is the search's: the rate that passed and the one that failed; none where no rate failed."""
    failed = capacity.failed_per_s
    return MetricValue(
        value=capacity.rate_per_s,
        unit=METRICS["capacity_requests_per_s"].unit,
        num_samples=len(capacity.probes),
        low=None if failed is None else capacity.rate_per_s,
        high=failed,
    )


def _keeps(sample: RequestSample, limits: Sequence[Limit]) -> bool:
    """Whether one request is within every time limit; a single token has no gap that could break one."""
    return all(value <= limit.bound for limit in limits for value in request_values([sample], limit.metric))


def _device(readings: Readings, profile: Profile) -> dict[str, MetricValue]:
    def one(name: str, value: float) -> tuple[str, MetricValue]:
        return name, MetricValue(value=value, unit=METRICS[name].unit)

    found = dict(
        [
            one("peak_memory_bytes", readings.bytes["peak"]),
            one("weights_bytes", readings.bytes["weights"] + readings.bytes.get("draft_weights", 0)),
            one("kv_bytes", readings.bytes["kv"] + readings.bytes.get("draft_kv", 0)),
        ]
    )
    energy_j = readings.monitor.get("energy_j")
    if energy_j is not None:
        found |= dict([one("energy_per_token_j", energy_j / readings.output_tokens)])
        found |= dict([one("power_w", energy_j / readings.monitor["window_s"])])
    price = profile.hardware.price_per_hour
    if price is not None:
        found |= dict([one("cost_per_mtok", price / 3600 * readings.wall_s / readings.output_tokens * 1e6)])
    return found


def _quality(scores: Mapping[str, Any]) -> dict[str, MetricValue]:
    found = {}
    tokens = scores["num_tokens"]

    def over_sequences(name: str, per_sequence: Sequence[float], most: float = math.inf) -> MetricValue:
        low, high = mean_interval(per_sequence) or (None, None)
        value = math.fsum(v * n for v, n in zip(per_sequence, tokens, strict=True)) / sum(tokens)
        return MetricValue(
            value=value,
            unit=METRICS[name].unit,
            statistic="mean",
            num_samples=len(per_sequence),
            low=None if low is None else max(0.0, low),
            high=None if high is None else min(most, high),
        )

    if "kl" in scores:
        found["kl_divergence"] = over_sequences("kl_divergence", scores["kl"])
        found["top1_agreement"] = over_sequences("top1_agreement", scores["top1"], most=1.0)
    if scores["is_text"]:
        nll = over_sequences("perplexity", scores["nll"])
        found["perplexity"] = dataclasses.replace(
            nll,
            value=math.exp(nll.value),
            statistic="",
            low=None if nll.low is None else math.exp(nll.low),
            high=None if nll.high is None else math.exp(nll.high),
        )
    if scores["retrieved"]:
        retrieved = scores["retrieved"]
        low, high = share_interval(sum(retrieved), len(retrieved))
        found["retrieval_accuracy"] = MetricValue(
            value=sum(retrieved) / len(retrieved),
            unit="",
            statistic="mean",
            num_samples=len(retrieved),
            low=low,
            high=high,
        )
    return found


def _limited_value(
    readings: Readings, values: Mapping[str, MetricValue], limit: Limit, *, careful: bool
) -> float | None:
    if limit.metric not in TIMES:
        return values[limit.metric].value if limit.metric in values else None
    requests = request_values(readings.samples, limit.metric)
    if not requests:
        return None
    if careful and limit.statistic.startswith("p"):
        upper = percentile_upper(requests, float(limit.statistic[1:]), confidence=0.95)
        if upper is not None:
            return upper
    return statistic(requests, limit.statistic)


def unsupported_objectives(objectives: Sequence[Objective], percentile_supported: float | None) -> list[str]:
    """Labels of objectives whose percentile this many requests cannot support."""
    return [
        objective.label
        for objective in objectives
        if objective.statistic.startswith("p") and float(objective.statistic[1:]) > (percentile_supported or 50.0)
    ]

"""Capacity: the highest request rate that an endpoint serves within its SLO, by a bounded search while it is warm.

    rate   1 ok   2 ok   4 ok   8 broke   5.7 ok   6.7 broke   6.2 ok   6.4 broke, again broke  -> 6.2, broken at 6.4

The rate is doubled (or halved) until one passes and one fails, then bisected on its logarithm. Each probe sends fresh
requests, as the workload has them, with their arrivals stretched to exactly the probe's rate.

What noise does to it: a rate passes only when the careful upper bound of each percentile keeps its limit, so a lucky
sample is no pass; the failure that the answer rests on is tried twice, so one hiccup is no end. A rate must also be
sustained: the backlog after the last arrival may not have grown by more than BACKLOG_SHARE of the time, else a limit on
the time per token alone would pass at any rate. A probe lasts ten times the longest limit, and longer where there is
time for it, since a queue that grows slowly breaks a limit late.

How far it is off: one server, Poisson arrivals, a p90 limit of four service times, 30 seeds in virtual time, against
Lindley's recursion: 0.55 to 1.15 of the true capacity with 60 s (median 0.97, the search ends before it has settled),
0.85 to 1.10 with 300 s, 0.93 to 1.06 with 3,000 s. A backlog alone lets up to 1.13 of what can be sustained pass.

The server rule of MLPerf Inference (loadgen), with its early stopping; the search is ours.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from codesign.measure.load import Load, LoadResult, drive
from codesign.measure.percentiles import request_values
from codesign.measure.session import Endpoint
from codesign.results.measurement import min_requests, percentile, percentile_upper, statistic
from codesign.spec.slo import Limit

BACKLOG_SHARE = 0.05
_SUSTAIN = 10  # a probe's length in units of the longest limit
_PROBES_PER_BUDGET = 6  # no probe's arrivals take more than this part of the seconds
_NUM_OVER = 5  # slow requests with which a bound must still hold; with one, the slowest of all would decide
_NO_OVERLAP = 0.25  # requests under way on average
_MIN_REQUESTS, _MAX_REQUESTS = 16, 5_000

MakeLoad = Callable[[int, int], Load]  # (probe, number of requests) -> requests nobody has sent before, with arrivals


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Attributes:
    max_probes, max_s: where the search ends at the latest; the probe that is running is finished.
    resolution: it ends when the failing rate is within this share of the passing one.
    confidence: of the upper bounds by which a rate passes.
    """

    max_probes: int = 16
    max_s: float = 60.0
    resolution: float = 0.05
    confidence: float = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """One rate that was tried.

    Attributes:
        broke: key of the limit that was broken most, "backlog" or "rejected"; "" when the rate passed.
        values: limit key, and "backlog", -> what it was judged by, in the limit's unit; absent where a request without
            an answer decided.
        num_unanswered: requests that were rejected, or not done long after the last arrival; they count as endless.
        unbounded: limits judged by the measured statistic, for which there were too few requests to bound it.
        late_p99_ms: how late this side sent; when it is not small beside the limits, the client is what broke.
    """

    rate_per_s: float
    num_requests: int
    seconds: float
    broke: str
    values: dict[str, float]
    unbounded: tuple[str, ...]
    num_unanswered: int
    late_p99_ms: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """Attributes:
    rate_per_s: the highest rate that passed; 0 when none did.
    failed_per_s: the lowest rate above it that failed; None when none did: the capacity is then at least `rate_per_s`.
    broke: what broke at `failed_per_s`.
    stopped: why the search ended: "resolved", no more "probes" or "seconds", or "floor": requests no longer overlap at
        the lowest rate that failed, so no lower one would do better.
    alone_s: what one request takes that has the endpoint to itself.
    """

    rate_per_s: float
    failed_per_s: float | None
    broke: str
    stopped: Literal["resolved", "probes", "seconds", "floor"]
    alone_s: float
    probes: tuple[Probe, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it reads back from JSON."""
        probes = [{**dataclasses.asdict(probe), "unbounded": list(probe.unbounded)} for probe in self.probes]
        return {**dataclasses.asdict(self), "probes": probes}

    @property
    def verdict(self) -> str:
        """In a sentence."""
        if not self.probes:
            return "too few seconds for a single probe"
        ended = f"; the search ran out of {self.stopped} first" if self.stopped in ("probes", "seconds") else ""
        if self.failed_per_s is None:
            return f"at least {self.rate_per_s:.3g} requests/s{ended}"
        if not self.rate_per_s:
            return f"below {self.failed_per_s:.3g} requests/s, where {self.broke} breaks{ended}"
        return f"{self.rate_per_s:.3g} requests/s, {self.broke} breaks at {self.failed_per_s:.3g}{ended}"


def find_capacity(
    endpoint: Endpoint,
    make_load: MakeLoad,
    limits: Sequence[Limit],
    *,
    start_per_s: float,
    bounds: Bounds,
    clock: Callable[[], float] = time.perf_counter,
    on_probe: Callable[[Probe], None] = lambda probe: None,
) -> Capacity:
    """Searches from `start_per_s`, best a rate that the endpoint has just served.

    Args:
        limits: on times of requests, at least one.

    Raises:
        TrialFailed: what the endpoint raises.
    """
    return _Search(endpoint, make_load, limits, bounds, clock, on_probe).run(start_per_s)


class _Search:
    def __init__(
        self,
        endpoint: Endpoint,
        make_load: MakeLoad,
        limits: Sequence[Limit],
        bounds: Bounds,
        clock: Callable[[], float],
        on_probe: Callable[[Probe], None],
    ) -> None:
        if not limits:
            raise ValueError("a capacity needs a limit on a time")
        self._endpoint, self._make_load, self._limits, self._bounds = endpoint, make_load, limits, bounds
        self._clock, self._on_probe = clock, on_probe
        self._longest_s = max(limit.bound for limit in limits) / 1e3
        self._start_s = clock()
        self._alone_s = 0.0
        self._probes: list[Probe] = []

    def run(self, start_per_s: float) -> Capacity:
        self._alone_s = self._drive(self._make_load(0, 1).at_once, math.inf).wall_s
        rate, stopped = start_per_s, self._stopped(start_per_s)
        while stopped is None:
            self._probe(rate)
            rate = self._next_rate()
            stopped = self._stopped(rate)
        passed, failed = self._passed(), self._failed()
        return Capacity(
            rate_per_s=passed,
            failed_per_s=None if failed is None else failed.rate_per_s,
            broke="" if failed is None else failed.broke,
            stopped=stopped,
            alone_s=self._alone_s,
            probes=tuple(self._probes),
        )

    def _passed(self) -> float:
        """The highest rate that passed, 0 for none."""
        return max((probe.rate_per_s for probe in self._probes if not probe.broke), default=0.0)

    def _failed(self) -> Probe | None:
        """The lowest failure above what passed."""
        above = [probe for probe in self._probes if probe.broke and probe.rate_per_s > self._passed()]
        return min(above, key=lambda probe: probe.rate_per_s, default=None)

    def _next_rate(self) -> float:
        passed, failed = self._passed(), self._failed()
        if failed is None:
            return 2 * passed
        if self._settled() is not None:
            return failed.rate_per_s  # again
        return math.sqrt(passed * failed.rate_per_s) if passed else failed.rate_per_s / 2

    def _settled(self) -> Literal["resolved", "floor"] | None:
        """Whether the lowest failure, if it is one, is the answer."""
        passed, failed = self._passed(), self._failed()
        if failed is None:
            return None
        if not passed:
            return "floor" if failed.rate_per_s * self._alone_s < _NO_OVERLAP else None
        return "resolved" if failed.rate_per_s <= passed * (1 + self._bounds.resolution) else None

    def _stopped(self, rate: float) -> Literal["resolved", "probes", "seconds", "floor"] | None:
        """Why `rate` is not tried any more; None: it is."""
        settled = self._settled()
        if settled is not None and sum(probe.rate_per_s == rate for probe in self._probes) > 1:
            return settled
        if len(self._probes) >= self._bounds.max_probes:
            return "probes"
        spent_s = self._clock() - self._start_s
        return "seconds" if spent_s + self._num_requests(rate) / rate > self._bounds.max_s else None

    def _num_requests(self, rate: float) -> int:
        """Enough for the bound of each percentile and for a queue to show, as far as the seconds allow."""
        shares = [float(limit.statistic[1:]) / 100 for limit in self._limits if limit.statistic.startswith("p")]
        confidence = self._bounds.confidence
        needed = max((min_requests(_NUM_OVER, share=share, confidence=confidence) for share in shares), default=0)
        wanted_s = max(_SUSTAIN * self._longest_s, needed / rate, self._bounds.max_s / self._bounds.max_probes)
        seconds = min(wanted_s, self._bounds.max_s / _PROBES_PER_BUDGET)
        return min(_MAX_REQUESTS, max(_MIN_REQUESTS, math.ceil(rate * seconds)))

    def _probe(self, rate: float) -> Probe:
        load = at_rate(self._make_load(len(self._probes) + 1, self._num_requests(rate)), rate)
        assert load.arrivals_s is not None
        span_s = load.arrivals_s[-1]
        started_s = self._clock()
        # Whoever is not done as long again after the last arrival will not be judged kindly anyway.
        result = self._drive(load, 2 * span_s + 2 * self._longest_s + 4 * self._alone_s)
        num_unanswered = result.num_rejected + result.num_unfinished
        values, unbounded, over = self._judge(result, num_unanswered, span_s)
        worst = max(over, key=lambda key: over[key])
        probe = Probe(
            rate_per_s=rate,
            num_requests=len(load.requests),
            seconds=self._clock() - started_s,
            broke=worst if over[worst] > 0 else "",
            values=values,
            unbounded=unbounded,
            num_unanswered=num_unanswered,
            late_p99_ms=percentile(result.late_ms, 99),
        )
        self._probes.append(probe)
        self._on_probe(probe)
        return probe

    def _drive(self, load: Load, deadline_s: float) -> LoadResult:
        return drive(self._endpoint, load, clock=self._clock, deadline_s=deadline_s)

    def _judge(
        self, result: LoadResult, num_unanswered: int, span_s: float
    ) -> tuple[dict[str, float], tuple[str, ...], dict[str, float]]:
        """(values, unbounded limits, key -> share over the limit) of a probe."""
        values: dict[str, float] = {}
        unbounded: list[str] = []
        over = {"rejected": math.inf if result.num_rejected else 0.0}
        for limit in self._limits:
            times = [*request_values(result.samples, limit.metric), *[math.inf] * num_unanswered]
            if not times:
                continue  # single tokens have no time per token
            upper = None
            if limit.statistic.startswith("p"):
                quantile = float(limit.statistic[1:])
                upper = percentile_upper(times, quantile, confidence=self._bounds.confidence)
                unbounded += [limit.key] if upper is None else []
            value = statistic(times, limit.statistic) if upper is None else upper
            over[limit.key] = limit.violation(value)
            if math.isfinite(value):
                values[limit.key] = value
        values["backlog"] = _backlog(result, span_s)
        over["backlog"] = values["backlog"] - BACKLOG_SHARE
        return values, tuple(unbounded), over


def at_rate(load: Load, rate_per_s: float) -> Load:
    """The load with its arrivals stretched so that they come at exactly this mean rate; evenly if all came at once."""
    if load.arrivals_s is None:
        raise ValueError("a rate needs requests that arrive on a schedule")
    last = len(load.requests) - 1
    times = load.arrivals_s if load.arrivals_s[-1] > 0 else tuple(map(float, range(last + 1)))
    stretch = last / rate_per_s / times[-1]
    return dataclasses.replace(load, arrivals_s=tuple(time_s * stretch for time_s in times))


def _backlog(result: LoadResult, span_s: float) -> float:
    """By how much the endpoint fell behind, as a share of the time in which requests came: from the last arrival to
    the last answer, less what the slowest request of the first quarter took."""
    early = [sample.e2e_ms / 1e3 for sample in result.samples[: max(1, len(result.samples) // 4)]]
    return max(0.0, result.wall_s - span_s - max(early, default=0.0)) / span_s

"""What a sample of request times can say: percentiles, their careful upper bounds, and how many requests each needs.

One percentile definition serves the whole code base: the nearest rank, `sorted[ceil(q n / 100) - 1]`, the smallest
measured value that at least q percent of the sample do not exceed. It is always a value that was measured.

The bound is MLPerf's early stopping (mlcommons/inference, loadgen/early_stopping.cc and the appendix of the rules): if
the true share of requests within a latency were only p, then at most t of n would be over it with probability

    P(Binomial(n, 1 - p) <= t) = I_p(n - t, t + 1)          (regularised incomplete beta)

so when that is at most 1 - c, the latency holds for the share p with confidence c. Independent requests are assumed:
pass the number of effectively independent ones where they are correlated.
"""

import math
from collections.abc import Iterator, Sequence

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 < q <= 100) by nearest rank, in the unit of the values.

    Raises:
        ValueError: no values, or q out of bounds.
    """
    if not values:
        raise ValueError("a percentile needs at least one value")
    if not 0 < q <= 100:
        raise ValueError(f"q must be in (0, 100], got {q}")
    # In hundredths of a percent and whole numbers: 0.07 * 100 is 7.000000000000001 in binary.
    rank = max(1, -(-round(q * 100) * len(values) // 10_000))
    return sorted(values)[rank - 1]


def statistic(values: Sequence[float], name: str) -> float:
    """`p50`, `p99.9`, `mean` or `max` of the values (`spec.metrics.STATISTIC`)."""
    if name == "mean":
        return math.fsum(values) / len(values)
    if name == "max":
        return max(values)
    return percentile(values, float(name.removeprefix("p")))


def share_probability(num_over: int, num_requests: int, *, share: float) -> float:
    """P(Binomial(num_requests, 1 - share) <= num_over), the I_p(h, t + 1) above."""
    return min(1.0, math.fsum(_terms(num_over, num_requests, share)))


def passes(num_over: int, num_requests: int, *, share: float, confidence: float) -> bool:
    """Whether a latency that `num_over` of the requests exceeded holds for `share` of them, at this confidence."""
    return share_probability(num_over, num_requests, share=share) <= 1 - confidence


def min_requests(num_over: int, *, share: float, confidence: float) -> int:
    """The fewest requests with which a run of `num_over` slow ones still passes, e.g. 662 for 1, 0.99, 0.99."""
    low, high = num_over, max(2 * num_over, 2)
    while not passes(num_over, high, share=share, confidence=confidence):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if passes(num_over, middle, share=share, confidence=confidence):
            high = middle
        else:
            low = middle
    return high


def percentile_upper(values: Sequence[float], q: float, *, confidence: float) -> float | None:
    """LoadGen's conservative estimate of a percentile: at or above the true one at least at this confidence.

    With t the largest number of slow requests that still passes, the t - 1 largest values are dropped and the largest
    of the rest is reported. Call it `p99_upper_c99`, never plain p99. None when the sample is too small (t < 1).
    """
    num_over = _most_over(len(values), share=q / 100, confidence=confidence)
    return None if num_over < 1 else sorted(values)[len(values) - num_over]


def percentile_supported(num_requests: int, *, confidence: float) -> float | None:
    """The highest of PERCENTILES whose upper bound this many independent requests can give, or None for too few."""
    supported = [q for q in PERCENTILES if _most_over(num_requests, share=q / 100, confidence=confidence) >= 1]
    return max(supported, default=None)


def percentile_interval(values: Sequence[float], q: float) -> tuple[float, float] | None:
    """An interval for the q-th percentile at 95 % or more that assumes no shape; None where a rank does not exist.

    The number of values at or below the true percentile is binomial: the ranks leave out at most 2.5 % of it on either
    side (David and Nagaraja, Order Statistics, section 7.1).
    """
    count = len(values)
    total, low, high = 0.0, 0, 0
    for below, probability in enumerate(_terms(count, count, 1 - q / 100)):  # P(`below` of them lie below it)
        total += probability
        if total <= 0.025:
            low = below + 1
        if total >= 0.975:
            high = below + 1
            break
    if low < 1 or not 1 <= high <= count:
        return None
    ordered = sorted(values)
    return ordered[low - 1], ordered[high - 1]


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """An interval for the median at 95 % that assumes no shape; None below eight values.

    Ranks floor(n/2 - 0.98 sqrt(n)) and ceil(n/2 + 1 + 0.98 sqrt(n)) of the sorted sample (Le Boudec, Performance
    Evaluation of Computer and Communication Systems, theorem 2.1; CONFIRM, OSDI 2018).
    """
    count = len(values)
    low = math.floor(count / 2 - 0.98 * math.sqrt(count))
    high = math.ceil(count / 2 + 1 + 0.98 * math.sqrt(count))
    if low < 1 or high > count:
        return None
    ordered = sorted(values)
    return ordered[low - 1], ordered[high - 1]


def _most_over(num_requests: int, *, share: float, confidence: float) -> int:
    """The most slow requests with which a run of this length passes; -1 when not even none would do."""
    total, num_over = 0.0, -1
    for term in _terms(num_requests, num_requests, share):
        total += term
        if total > 1 - confidence:
            break
        num_over += 1
    return num_over


def _terms(num_over: int, num_requests: int, share: float) -> Iterator[float]:
    """P(Binomial(n, 1 - share) = k) for k = 0 ... num_over, by logarithms since 0.9^100000 underflows."""
    odds = math.log1p(-share) - math.log(share)
    log_term = num_requests * math.log(share)
    for k in range(min(num_over, num_requests) + 1):
        yield math.exp(log_term)
        if k < num_requests:
            log_term += math.log((num_requests - k) / (k + 1)) + odds

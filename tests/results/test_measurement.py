import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codesign.results.measurement import (
    median_interval,
    min_requests,
    passes,
    percentile,
    percentile_interval,
    percentile_supported,
    percentile_upper,
    share_probability,
    statistic,
)

VALUES = st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=60)

# Requests needed with 0 / 1 / 2 / 5 / 10 slow ones, at p50, p90, p95, p99, p99.9. 64, 459 and 662 are LoadGen's own.
TABLE = {
    0.99: (
        "7/11/14/22/35",
        "44/64/81/127/197",
        "90/130/165/259/398",
        "459/662/838/1307/2010",
        "4603/6636/8403/13105/20140",
    ),
    0.95: (
        "5/8/11/18/30",
        "29/46/61/103/167",
        "59/93/124/208/336",
        "299/473/628/1049/1693",
        "2995/4742/6294/10511/16959",
    ),
    0.90: ("4/7/9/17/28", "22/38/52/91/152", "45/77/105/184/306", "230/388/531/926/1538", "2302/3889/5321/9273/15404"),
}


@pytest.mark.parametrize("confidence", TABLE)
def test_requests_needed_equal_the_published_table(confidence: float) -> None:
    for share, row in zip((0.5, 0.9, 0.95, 0.99, 0.999), TABLE[confidence], strict=True):
        found = [min_requests(slow, share=share, confidence=confidence) for slow in (0, 1, 2, 5, 10)]
        assert "/".join(map(str, found)) == row


@given(st.integers(0, 12), st.integers(1, 60), st.sampled_from([0.5, 0.9, 0.99]))
def test_the_probability_equals_exact_fractions(slow: int, count: int, share: float) -> None:
    exact = sum(
        math.comb(count, k) * (1 - Fraction(share)) ** k * Fraction(share) ** (count - k)
        for k in range(min(slow, count) + 1)
    )

    assert share_probability(slow, count, share=share) == pytest.approx(float(exact), rel=1e-9)


def test_a_large_sample_does_not_underflow() -> None:
    assert passes(900, 1_000_000, share=0.999, confidence=0.99)
    assert not passes(1_000, 1_000_000, share=0.999, confidence=0.99)


@pytest.mark.parametrize(
    ("count", "confidence", "highest"),
    [
        (6, 0.9, None),
        (7, 0.9, 50.0),
        (37, 0.9, 50.0),
        (38, 0.9, 90.0),
        (93, 0.95, 95.0),
        (472, 0.95, 95.0),
        (473, 0.95, 99.0),
        (661, 0.99, 95.0),
        (662, 0.99, 99.0),
        (6636, 0.99, 99.9),
        (0, 0.9, None),
        (1, 0.5, None),
    ],
)
def test_no_percentile_is_claimed_that_the_sample_cannot_support(
    count: int, confidence: float, highest: float | None
) -> None:
    assert percentile_supported(count, confidence=confidence) == highest


def test_a_percentile_is_the_nearest_rank() -> None:
    values = [40.0, 10.0, 30.0, 20.0]

    assert [percentile(values, q) for q in (1, 25, 26, 50, 75, 99, 100)] == [10, 10, 20, 20, 30, 40, 40]


def test_a_percentile_is_not_moved_by_binary_fractions() -> None:
    assert percentile([float(i) for i in range(1, 101)], 7) == 7
    assert percentile([float(i) for i in range(1, 1001)], 99.9) == 999


@given(VALUES, st.floats(0.01, 100))
def test_a_percentile_is_a_measured_value_that_enough_values_do_not_exceed(values: list[float], q: float) -> None:
    found = percentile(values, q)

    assert found in values
    assert sum(value <= found for value in values) * 100 >= round(q, 2) * len(values) - 1e-6
    assert sum(value < found for value in values) * 100 < max(round(q, 2), 0.01) * len(values) + 1e-6


@given(VALUES, st.randoms(use_true_random=False))
def test_order_does_not_matter(values: list[float], rng: random.Random) -> None:
    shuffled = rng.sample(values, len(values))

    assert percentile(shuffled, 90) == percentile(values, 90)
    assert percentile_upper(shuffled, 50, confidence=0.9) == percentile_upper(values, 50, confidence=0.9)


@pytest.mark.parametrize("q", [0, -1, 100.1, math.nan])
def test_a_percentile_out_of_bounds_is_refused(q: float) -> None:
    with pytest.raises(ValueError):
        percentile([1.0], q)


def test_a_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)


@pytest.mark.parametrize(("name", "value"), [("p50", 2.0), ("p99.9", 10.0), ("mean", 4.25), ("max", 10.0)])
def test_statistics_go_by_their_names(name: str, value: float) -> None:
    assert statistic([10.0, 1.0, 2.0, 4.0], name) == value


def test_the_upper_bound_is_a_rank_above_the_percentile() -> None:
    values = [float(i) for i in range(662)]

    assert percentile_upper(values, 99, confidence=0.99) == 661  # one slow request is allowed: the maximum
    assert percentile(values, 99) == 655
    assert percentile_upper(values[:661], 99, confidence=0.99) is None
    assert percentile_upper(values[:459], 99, confidence=0.99) is None


@pytest.mark.parametrize("shape", ["exponential", "log-normal", "bimodal"])
def test_the_upper_bound_is_rarely_below_the_true_percentile(shape: str) -> None:
    """662 requests, p99 at 0.99: LoadGen's rank covers at least 99 % of runs, the plain percentile well under 60 %."""
    rng = random.Random(1)
    draw, true = {
        "exponential": (lambda: rng.expovariate(1.0), -math.log(0.01)),
        "log-normal": (lambda: rng.lognormvariate(0.0, 1.0), math.exp(2.3263478740408408)),
        "bimodal": (lambda: rng.uniform(0, 1) if rng.random() < 0.98 else rng.uniform(10, 11), 10.5),
    }[shape]
    covered = plain = 0
    runs = 600
    for _ in range(runs):
        values = [draw() for _ in range(662)]
        upper = percentile_upper(values, 99, confidence=0.99)
        assert upper is not None
        covered += upper >= true
        plain += percentile(values, 99) >= true

    assert covered / runs >= 0.99
    assert plain / runs < 0.65


def test_the_median_interval_covers_at_its_confidence() -> None:
    rng = random.Random(2)
    covered = 0
    for _ in range(2000):
        interval = median_interval([rng.expovariate(1.0) for _ in range(25)])
        assert interval is not None
        covered += interval[0] <= math.log(2) <= interval[1]

    assert 0.93 <= covered / 2000 <= 0.99


def test_a_median_interval_needs_eight_values() -> None:
    assert median_interval([float(i) for i in range(7)]) is None
    assert median_interval([float(i) for i in range(8)]) == (0.0, 7.0)


@pytest.mark.parametrize(("q", "count"), [(50.0, 30), (90.0, 60), (99.0, 500)])
def test_a_percentile_interval_covers_at_its_confidence(q: float, count: int) -> None:
    rng = random.Random(3)
    true = -math.log(1 - q / 100)
    covered = 0
    for _ in range(1000):
        interval = percentile_interval([rng.expovariate(1.0) for _ in range(count)], q)
        assert interval is not None
        covered += interval[0] <= true <= interval[1]

    assert 0.94 <= covered / 1000 <= 0.995


@given(VALUES, st.sampled_from([50.0, 90.0, 95.0, 99.0, 99.9]))
def test_a_percentile_interval_holds_the_percentile(values: list[float], q: float) -> None:
    interval = percentile_interval(values, q)

    assert interval is None or interval[0] <= percentile(values, q) <= interval[1]


def test_a_p99_interval_needs_368_values() -> None:
    """0.99 to the power of the count must fall below 2.5 %."""
    values = [float(i) for i in range(368)]

    assert percentile_interval(values[:-1], 99) is None
    assert percentile_interval(values, 99) is not None

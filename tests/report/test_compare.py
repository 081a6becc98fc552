import dataclasses
import math
import random
import statistics

import pytest

from codesign.report.compare import change, luck_of_the_best, outdone, tied_with
from codesign.results.record import MetricValue, Tier, TrialRecord
from tests.report.recorded import config, ok_record


def with_metric(
    name: str, value: float, low: float | None, high: float | None, *, number: int = 1, tier: Tier = "confirm"
) -> TrialRecord:
    record = ok_record(number, config("int8"), random.Random(0), tier=tier)
    metric = MetricValue(value=value, unit=record.metrics[name].unit, low=low, high=high, num_samples=40)
    return dataclasses.replace(record, metrics={name: metric})


def test_a_ratio_and_its_interval_follow_the_formula() -> None:
    mine = with_metric("throughput_tokens_per_s", 140, 133, 147)
    theirs = with_metric("throughput_tokens_per_s", 100, 96, 104)

    found = change(mine, theirs, "throughput_tokens_per_s")

    assert found is not None
    x = math.log(1.4)
    assert found.effect == pytest.approx(1.4)
    assert found.low == pytest.approx(math.exp(x - math.hypot(math.log(140 / 133), math.log(104 / 100))))
    assert found.high == pytest.approx(math.exp(x + math.hypot(math.log(147 / 140), math.log(100 / 96))))
    assert found.judgement == "better"


@pytest.mark.parametrize(
    ("metric", "value", "judgement"),
    [
        ("throughput_tokens_per_s", 120, "better"),
        ("throughput_tokens_per_s", 80, "worse"),
        ("throughput_tokens_per_s", 101, "tie"),
        ("tpot_ms", 120, "worse"),
        ("tpot_ms", 80, "better"),
        ("kl_divergence", 110, "worse"),
        ("top1_agreement", 110, "better"),
    ],
)
def test_better_follows_the_direction_of_the_metric(metric: str, value: float, judgement: str) -> None:
    mine = with_metric(metric, value, value - 2, value + 2)
    theirs = with_metric(metric, 100, 98, 102)

    found = change(mine, theirs, metric)

    assert found is not None
    assert found.judgement == judgement


@pytest.mark.parametrize(("tier", "judgement"), [("screen", "tie"), ("confirm", "better"), ("publish", "better")])
def test_a_gain_below_the_floor_of_its_tier_is_a_tie(tier: Tier, judgement: str) -> None:
    mine = with_metric("throughput_tokens_per_s", 103, 102.9, 103.1, tier=tier)
    theirs = with_metric("throughput_tokens_per_s", 100, 99.9, 100.1, tier="publish")

    found = change(mine, theirs, "throughput_tokens_per_s")

    assert found is not None
    assert found.judgement == judgement


def test_single_readings_of_time_cannot_be_judged() -> None:
    found = change(
        with_metric("throughput_tokens_per_s", 200, None, None),
        with_metric("throughput_tokens_per_s", 100, 99, 101),
        "throughput_tokens_per_s",
    )

    assert found is not None
    assert (found.judgement, found.low, found.high) == ("unknown", None, None)


def test_bytes_are_exact_and_peak_memory_needs_more_than_the_floor() -> None:
    def judged(metric: str) -> str:
        found = change(with_metric(metric, 99, None, None), with_metric(metric, 100, None, None), metric)
        assert found is not None
        return found.judgement

    assert judged("weights_bytes") == "better"
    assert judged("peak_memory_bytes") == "tie"


def test_divergence_from_zero_is_a_difference_not_a_ratio() -> None:
    found = change(
        with_metric("kl_divergence", 0.031, 0.028, 0.034), with_metric("kl_divergence", 0, 0, 0), "kl_divergence"
    )

    assert found is not None
    assert (found.effect, found.low, found.high) == pytest.approx((0.031, 0.028, 0.034))
    assert found.text() == "+0.031 [+0.028, +0.034]"


def test_an_interval_that_reaches_zero_leaves_the_ratio_open() -> None:
    """Three noisy blocks can give an interval from 0: that is a tie, never an error."""
    found = change(
        with_metric("throughput_tokens_per_s", 100, 98, 102),
        with_metric("throughput_tokens_per_s", 60, 0, 140),
        "throughput_tokens_per_s",
    )

    assert found is not None
    assert found.judgement == "tie"
    assert found.high == math.inf
    assert "∞" in found.text()


@pytest.mark.parametrize("missing", ["mine", "theirs"])
def test_what_was_not_measured_is_not_compared(missing: str) -> None:
    full, empty = with_metric("tpot_ms", 1, 1, 1), dataclasses.replace(with_metric("tpot_ms", 1, 1, 1), metrics={})
    mine, theirs = (empty, full) if missing == "mine" else (full, empty)

    assert change(mine, theirs, "tpot_ms") is None


def test_intervals_of_the_ratio_cover_the_truth_about_as_often_as_they_say() -> None:
    rng, hits, runs = random.Random(1), 0, 1500
    for _ in range(runs):
        made = []
        for mean in (140.0, 100.0):
            sample = [rng.gauss(mean, 5) for _ in range(40)]
            centre, half = statistics.mean(sample), 2.02 * statistics.stdev(sample) / math.sqrt(40)
            made.append(with_metric_values(centre, centre - half, centre + half))
        found = change(made[0], made[1], "throughput_tokens_per_s")
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 1.4 <= found.high

    assert 0.93 <= hits / runs <= 0.97


_PLAIN = ok_record(1, config("int8"), random.Random(0))


def with_metric_values(value: float, low: float, high: float) -> TrialRecord:
    metric = MetricValue(value=value, unit="tokens/s", low=low, high=high)
    return dataclasses.replace(_PLAIN, metrics={"throughput_tokens_per_s": metric})


def test_trials_that_the_sample_cannot_tell_apart_are_tied() -> None:
    best = with_metric("throughput_tokens_per_s", 100, 96, 104, number=1)
    near = dataclasses.replace(with_metric("throughput_tokens_per_s", 98, 94, 102, number=2), uid="near")
    far = dataclasses.replace(with_metric("throughput_tokens_per_s", 70, 68, 72, number=3), uid="far")

    assert [record.uid for record in tied_with(best, [best, near, far], "throughput_tokens_per_s")] == ["near"]


def test_a_front_member_without_a_measurable_advantage_is_found() -> None:
    def member(number: int, speed: float, kl: float) -> TrialRecord:
        metrics = {
            "throughput_tokens_per_s": MetricValue(value=speed, unit="tokens/s", low=speed * 0.98, high=speed * 1.02),
            "kl_divergence": MetricValue(value=kl, unit="nat/token", low=kl - 0.005, high=kl + 0.005),
        }
        return dataclasses.replace(_PLAIN, number=number, uid=f"m{number}", tier="confirm", metrics=metrics)

    fast, lucky, clean = member(1, 200, 0.05), member(2, 200.5, 0.09), member(3, 100, 0.01)

    found = outdone([fast, lucky, clean], ["throughput_tokens_per_s", "kl_divergence"])

    assert {uid: other.uid for uid, other in found.items()} == {"m2": "m1"}


def test_of_equal_front_members_one_stays() -> None:
    twins = [
        dataclasses.replace(with_metric("throughput_tokens_per_s", 100, 98, 102, number=n), uid=f"t{n}") for n in (4, 5)
    ]

    assert set(outdone(twins, ["throughput_tokens_per_s"])) == {"t5"}


def test_the_luck_of_the_best_agrees_with_simulation() -> None:
    """reliability: best of 100 equal configurations with 2 % noise gains about 5 % by luck."""
    made = [with_metric_values(100, 100 * (1 - 1.96 * 0.02), 100 * (1 + 1.96 * 0.02)) for _ in range(100)]
    rng = random.Random(0)
    simulated = statistics.mean(max(rng.gauss(0, 0.02) for _ in range(100)) for _ in range(2000))

    luck = luck_of_the_best(made, "throughput_tokens_per_s")

    assert luck is not None
    assert luck[0] == 100
    assert luck[1] == pytest.approx(simulated, rel=0.06)

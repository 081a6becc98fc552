"""From readings to metrics: definitions, intervals, and what must be absent."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codesign.measure.capacity import Capacity
from codesign.measure.load import LoadResult
from codesign.measure.summary import (
    Readings,
    mean_interval,
    metrics,
    ratio_interval,
    share_interval,
    unsupported_objectives,
    violations,
)
from codesign.results.record import RequestSample
from codesign.spec.hardware import Hardware
from codesign.spec.metrics import Objective
from codesign.spec.model import ModelSpec
from codesign.spec.profile import Profile
from codesign.spec.slo import Slo
from codesign.spec.workload import Workload


def sample(*, ttft_ms: float = 20.0, gap_ms: float = 5.0, tokens: int = 5) -> RequestSample:
    return RequestSample(
        prompt_tokens=8,
        output_tokens=tokens,
        finish_reason="length",
        ttft_ms=ttft_ms,
        e2e_ms=ttft_ms + gap_ms * (tokens - 1),
        tpot_ms=gap_ms if tokens > 1 else None,
        itl_ms=(gap_ms,) * (tokens - 1),
    )


def readings(blocks: list[list[RequestSample]], *, wall_s: float = 1.0, **changes: Any) -> Readings:
    results = tuple(LoadResult(samples=tuple(samples), wall_s=wall_s, tokens={}) for samples in blocks)
    fields: dict[str, Any] = {
        "blocks": results,
        "bytes": {"peak": 300, "weights": 200, "kv": 100},
        "quality": None,
        "monitor": {"source": "psutil", "wall_s": wall_s * len(blocks)},
    }
    return Readings(**{**fields, **changes})


def profile(*objectives: Objective, **changes: Any) -> Profile:
    plain = {"scenario": "offline", "prompt_tokens": 8, "output_tokens": 5, "num_requests": 4}
    fields: dict[str, Any] = {
        "path": Path("here.yaml"),
        "hardware": Hardware(name="here", device="cpu"),
        "model_spec": ModelSpec(name="m", architecture={}),
        "workload": Workload.model_validate(plain),
        "slo": Slo(),
        "objectives": objectives,
        "search_space": None,
        "sections": {},
    }
    return Profile(**{**fields, **changes})


def test_bytes_of_a_draft_count_as_weights_and_cache() -> None:
    plain = metrics(readings([[sample(tokens=5)]]), profile())
    sizes = {"peak": 300, "weights": 200, "kv": 100, "draft_weights": 20, "draft_kv": 10}
    drafting = metrics(readings([[sample(tokens=5)]], bytes=sizes), profile())

    assert [plain[name].value for name in ("weights_bytes", "kv_bytes")] == [200, 100]
    assert [drafting[name].value for name in ("weights_bytes", "kv_bytes")] == [220, 110]


def test_throughput_is_all_output_tokens_over_all_wall_time() -> None:
    found = metrics(readings([[sample()] * 4] * 3, wall_s=2.0), profile())["throughput_tokens_per_s"]

    assert found.value == pytest.approx(3 * 4 * 5 / 6.0)
    assert found.num_samples == 3
    assert found.low == pytest.approx(found.value)


def test_an_objective_brings_its_own_statistic() -> None:
    samples = [sample(ttft_ms=float(value)) for value in range(1, 101)]
    found = metrics(readings([samples]), profile(Objective.of("ttft_ms", "p90")))["ttft_ms"]

    assert (found.value, found.statistic, found.num_samples) == (90.0, "p90", 100)


def test_what_was_not_measured_is_absent() -> None:
    found = metrics(readings([[sample(tokens=1)]]), profile())

    assert not {
        "tpot_ms",
        "itl_ms",
        "kl_divergence",
        "energy_per_token_j",
        "cost_per_mtok",
        "goodput_requests_per_s",
        "capacity_requests_per_s",
    } & set(found)


def test_energy_and_power_come_from_the_counter() -> None:
    monitor = {"source": "nvml", "energy_j": 50.0, "window_s": 12.5}
    found = metrics(readings([[sample()] * 2], wall_s=10.0, monitor=monitor), profile())

    assert found["energy_per_token_j"].value == pytest.approx(5.0)
    assert found["power_w"].value == pytest.approx(4.0)


def test_cost_follows_price_and_speed() -> None:
    hardware = Hardware(name="here", device="cpu", price_per_hour=3.6)
    found = metrics(readings([[sample()] * 2], wall_s=10.0), profile(hardware=hardware))

    assert found["cost_per_mtok"].value == pytest.approx(0.001 * 10 / 10 * 1e6)


def test_goodput_counts_requests_that_meet_every_limit() -> None:
    slo = Slo.model_validate({"ttft_ms": {"p50": 30}, "tpot_ms": {"p99": 6}})
    samples = [sample(), sample(ttft_ms=31), sample(gap_ms=7), sample(tokens=1)]
    found = metrics(readings([samples], wall_s=2.0), profile(slo=slo))

    assert found["goodput_requests_per_s"].value == pytest.approx(2 / 2.0)


SAMPLES = st.lists(
    st.builds(
        sample,
        ttft_ms=st.floats(0.1, 100),
        gap_ms=st.floats(0.1, 100),
        tokens=st.integers(1, 6),
    ),
    min_size=1,
    max_size=30,
)
BOUNDS = st.dictionaries(
    st.sampled_from(["ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"]), st.floats(0.1, 500), min_size=1, max_size=4
)


@given(SAMPLES, BOUNDS, st.sampled_from(["p50", "p99", "mean", "max"]))
def test_goodput_is_the_rate_of_requests_that_break_no_limit_whatever(
    samples: list[RequestSample], bounds: dict[str, float], name: str
) -> None:
    """The statistic of a limit is over requests; a single request just keeps the bound or does not."""
    slo = Slo.model_validate({metric: {name: bound} for metric, bound in bounds.items()})
    found = metrics(readings([samples], wall_s=2.0), profile(slo=slo))["goodput_requests_per_s"]

    def keeps(one: RequestSample) -> bool:
        gaps = sorted(one.itl_ms)
        times = {"ttft_ms": one.ttft_ms, "e2e_ms": one.e2e_ms, "tpot_ms": one.tpot_ms}
        times["itl_ms"] = gaps[(len(gaps) - 1) // 2] if gaps else None
        return not any(times[metric] is not None and times[metric] > bound for metric, bound in bounds.items())

    assert found.value == pytest.approx(sum(map(keeps, samples)) / 2.0)
    assert found.value <= len(samples) / 2.0


@given(SAMPLES, BOUNDS, st.sampled_from(["ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"]), st.floats(0.1, 500))
def test_another_limit_never_raises_goodput(
    samples: list[RequestSample], bounds: dict[str, float], metric: str, bound: float
) -> None:
    more = {**bounds, metric: min(bound, bounds.get(metric, math.inf))}

    def goodput(limits: dict[str, float]) -> float:
        slo = Slo.model_validate({key: {"p99": value} for key, value in limits.items()})
        return metrics(readings([samples]), profile(slo=slo))["goodput_requests_per_s"].value

    assert goodput(more) <= goodput(bounds)


def test_a_percentile_that_is_an_objective_has_an_interval() -> None:
    samples = [sample(ttft_ms=float(value)) for value in range(1, 101)]
    found = metrics(readings([samples]), profile(Objective.of("ttft_ms", "p90")))["ttft_ms"]

    assert found.low is not None and found.high is not None
    assert found.low < 90 < found.high


def capacity(**changes: Any) -> Capacity:
    fields: dict[str, Any] = {
        "rate_per_s": 4.0,
        "failed_per_s": 4.2,
        "broke": "slo.ttft_ms.p99",
        "stopped": "resolved",
        "alone_s": 0.1,
        "probes": (),
    }
    return Capacity(**{**fields, **changes})


def test_a_capacity_lies_between_what_passed_and_what_failed() -> None:
    found = metrics(readings([[sample()]], capacity=capacity()), profile())["capacity_requests_per_s"]

    assert (found.value, found.low, found.high, found.unit) == (4.0, 4.0, 4.2, "requests/s")


def test_a_capacity_that_no_rate_broke_has_no_interval() -> None:
    data = readings([[sample()]], capacity=capacity(failed_per_s=None, broke="", stopped="probes"))
    found = metrics(data, profile())["capacity_requests_per_s"]

    assert (found.value, found.low, found.high) == (4.0, None, None)


def test_a_broken_limit_is_a_share_of_its_bound() -> None:
    slo = Slo.model_validate({"ttft_ms": {"p50": 10}, "quality": {"max_kl": 0.1}})
    data = readings([[sample(ttft_ms=12.0)]])
    found = violations(data, metrics(data, profile(slo=slo)), slo, careful=False)

    assert found == {"slo.ttft_ms.p50": pytest.approx(0.2)}


def test_a_careful_decision_uses_the_upper_bound_of_a_percentile() -> None:
    """One slow request of 100: the empirical p90 is fine, but 100 requests cannot promise p95 below the slow one."""
    slo = Slo.model_validate({"ttft_ms": {"p95": 25}})
    samples = [sample()] * 95 + [sample(ttft_ms=50.0)] * 5
    data = readings([samples])
    values = metrics(data, profile(slo=slo))

    assert violations(data, values, slo, careful=False)["slo.ttft_ms.p95"] <= 0
    assert violations(data, values, slo, careful=True)["slo.ttft_ms.p95"] > 0


def test_the_interval_of_a_share_ends_at_1() -> None:
    quality = {"is_text": False, "num_tokens": [10] * 3, "kl": [0.0] * 3, "top1": [1.0, 1.0, 0.9], "retrieved": []}
    found = metrics(readings([[sample()]], quality=quality), profile())["top1_agreement"]

    assert found.low is not None and found.low < found.value < 1.0 == found.high


def test_quality_is_weighted_by_tokens_and_perplexity_is_of_the_mean() -> None:
    quality = {
        "is_text": True,
        "num_tokens": [100, 300],
        "kl": [0.4, 0.0],
        "top1": [0.5, 0.9],
        "nll": [1.0, 2.0],
        "retrieved": [True, True, False, True],
    }
    found = metrics(readings([[sample()]], quality=quality), profile())

    assert found["kl_divergence"].value == pytest.approx(0.1)
    assert found["top1_agreement"].value == pytest.approx(0.8)
    assert found["top1_agreement"].high is None, "two sequences give no interval"
    assert found["perplexity"].value == pytest.approx(math.exp(1.75))
    assert found["retrieval_accuracy"].value == pytest.approx(0.75)
    assert found["retrieval_accuracy"].num_samples == 4


def test_random_tokens_say_nothing_about_text() -> None:
    quality = {"is_text": False, "num_tokens": [10], "kl": [0.1], "top1": [1.0], "nll": [5.0], "retrieved": []}
    found = metrics(readings([[sample()]], quality=quality), profile())

    assert "kl_divergence" in found
    assert not {"perplexity", "retrieval_accuracy"} & set(found)


def test_the_mean_interval_covers_what_it_says() -> None:
    rng = random.Random(1)
    covered = 0
    for _ in range(2000):
        interval = mean_interval([rng.gauss(3.0, 1.0) for _ in range(5)])
        assert interval is not None
        covered += interval[0] <= 3.0 <= interval[1]

    assert 0.935 < covered / 2000 < 0.965


def test_two_values_support_no_interval() -> None:
    assert mean_interval([1.0, 2.0]) is None


def test_a_share_of_one_still_has_a_lower_bound_below_one() -> None:
    low, high = share_interval(12, 12)

    assert low == pytest.approx(0.757, abs=0.005)
    assert high == 1.0


def test_an_unsupported_percentile_is_named() -> None:
    objectives = (Objective.of("ttft_ms", "p99"), Objective.of("tpot_ms"), Objective.of("kl_divergence"))

    assert unsupported_objectives(objectives, 90.0) == ["ttft_ms p99"]


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.1, 10)), min_size=3, max_size=30))
def test_the_interval_of_a_rate_holds_the_rate(blocks: list[tuple[float, float]]) -> None:
    """Slow blocks last longer, so the mean of the blocks' rates lies above what was really reached."""
    counts, seconds = [count for count, _ in blocks], [wall for _, wall in blocks]

    low, high = ratio_interval(counts, seconds) or (1.0, 0.0)

    assert low <= sum(counts) / sum(seconds) * (1 + 1e-9) + 1e-12
    assert high >= sum(counts) / sum(seconds) * (1 - 1e-9) - 1e-12


def test_the_interval_of_a_rate_covers_the_true_rate_about_as_often_as_it_says() -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(400):
        seconds = [rng.uniform(0.5, 1.5) * rng.choice([1, 1, 1, 3]) for _ in range(12)]
        counts = [30.0 * wall * rng.gauss(1, 0.1) for wall in seconds]
        low, high = ratio_interval(counts, seconds) or (0.0, 0.0)
        covered += low <= 30 <= high

    assert 0.90 <= covered / 400 <= 0.99

"""What a sample says about its percentiles, and what it cannot."""

from codesign.measure.percentiles import percentiles
from codesign.results.measurement import percentile_interval, percentile_upper
from tests.measure.test_summary import sample


def test_each_percentile_has_its_bound_and_interval() -> None:
    samples = [sample(ttft_ms=float(value)) for value in range(1, 1001)]
    found = percentiles(samples, confidence=0.95)["ttft_ms"]

    values = [float(value) for value in range(1, 1001)]
    assert set(found) == {"p50", "p90", "p95", "p99"}
    assert found["p99"]["value"] == 990
    assert found["p99"]["upper_c95"] == percentile_upper(values, 99, confidence=0.95)
    assert (found["p90"]["low"], found["p90"]["high"]) == percentile_interval(values, 90)


def test_what_the_sample_cannot_bound_is_absent() -> None:
    samples = [sample(tokens=1)] * 40

    assert set(percentiles(samples, confidence=0.9)) == {"ttft_ms", "e2e_ms"}
    assert set(percentiles(samples, confidence=0.9)["ttft_ms"]) == {"p50", "p90"}
    assert percentiles(samples[:2], confidence=0.9) == {}

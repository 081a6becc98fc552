import pytest

from codesign.errors import InputError
from codesign.spec.metrics import METRICS, STATISTIC, Objective


def test_an_objective_takes_the_metrics_direction_unit_and_default_statistic() -> None:
    assert Objective.of("tpot_ms") == Objective(metric="tpot_ms", statistic="p50", direction="minimize", unit="ms")
    assert Objective.of("throughput_tokens_per_s").direction == "maximize"
    assert Objective.of("kv_bytes").statistic == ""


def test_another_statistic_can_be_named() -> None:
    assert Objective.of("tpot_ms", "p99.9").label == "tpot_ms p99.9"


@pytest.mark.parametrize("name", ["p50", "p1", "p99", "p99.9", "p99.99", "p0.1", "mean", "max"])
def test_known_statistics(name: str) -> None:
    assert STATISTIC.fullmatch(name)


@pytest.mark.parametrize("name", ["", "p", "p0", "p0.0", "p00", "p100", "p-1", "P50", "50", "median", "p9.999", "p٥٠"])
def test_unknown_statistics(name: str) -> None:
    assert not STATISTIC.fullmatch(name)


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'tpot_ms'"):
        Objective.of("tpot")


def test_a_single_number_takes_no_statistic() -> None:
    with pytest.raises(InputError, match="one number per trial"):
        Objective.of("kv_bytes", "p50")


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_well_formed(name: str) -> None:
    metric = METRICS[name]

    assert metric.name == name and metric.title
    assert metric.statistic == "" or STATISTIC.fullmatch(metric.statistic)

"""What a record means to the sampler."""

import dataclasses
import math

import pytest

from codesign.errors import WorkError
from codesign.results.record import MetricValue, TrialIdentity
from codesign.search.objective import FAILURE, sentinel, told
from codesign.spec.engine_config import EngineConfig
from codesign.spec.metrics import Objective
from tests.search.fake_measure import OBJECTIVES, record_of


def identity(number: int) -> TrialIdentity:
    return TrialIdentity(study="s", number=number, uid=f"u{number}")


GOOD = record_of(identity(0), EngineConfig())
FAILED = record_of(identity(1), EngineConfig(), "oom", "it was too much")


def test_a_good_trial_is_told_as_measured() -> None:
    result = told(GOOD, OBJECTIVES, [])

    assert result is not None
    assert result.values == tuple(GOOD.metrics[objective.metric].value for objective in OBJECTIVES)
    assert result.constraints == {FAILURE: 0.0}
    assert not result.is_sentinel


def test_a_failure_of_infrastructure_is_not_told() -> None:
    assert told(record_of(identity(0), EngineConfig(), "harness"), OBJECTIVES, []) is None


def test_a_hang_is_told_only_when_it_hung_again() -> None:
    again = dataclasses.replace(identity(0), attempt=1)

    assert told(record_of(identity(0), EngineConfig(), "hang"), OBJECTIVES, []) is None
    result = told(record_of(again, EngineConfig(), "hang"), OBJECTIVES, [])
    assert result is not None and result.is_sentinel


def test_a_failed_trial_is_told_worse_than_the_worst_and_finite() -> None:
    result = told(FAILED, OBJECTIVES, [GOOD])

    assert result is not None and result.is_sentinel
    throughput, memory = result.values
    assert throughput < GOOD.metrics["throughput_tokens_per_s"].value
    assert memory >= 1.5 * GOOD.metrics["peak_memory_bytes"].value
    assert result.constraints[FAILURE] > 0


def test_the_first_trial_may_fail_too() -> None:
    result = told(FAILED, OBJECTIVES, [])

    assert result is not None
    assert all(math.isfinite(value) for value in result.values)


@pytest.mark.parametrize("value", [0.0, -5.0, 1e300, 1e-300])
@pytest.mark.parametrize("metric", ["kl_divergence", "throughput_tokens_per_s"])
def test_a_sentinel_is_strictly_worse_whatever_was_seen(metric: str, value: float) -> None:
    objective = Objective.of(metric)
    record = dataclasses.replace(GOOD, metrics={metric: MetricValue(value=value, unit="")})
    worse = sentinel(objective, [record])

    assert math.isfinite(worse)
    assert worse > value if objective.direction == "minimize" else worse < value


def test_a_good_trial_without_one_of_the_objectives_is_infeasible() -> None:
    partly = dataclasses.replace(GOOD, metrics={"peak_memory_bytes": GOOD.metrics["peak_memory_bytes"]})
    result = told(partly, OBJECTIVES, [GOOD])

    assert result is not None and result.is_sentinel
    assert result.constraints[FAILURE] > 0
    assert result.values[1] == GOOD.metrics["peak_memory_bytes"].value


def test_another_statistic_than_the_objective_asks_for_is_an_error() -> None:
    record = dataclasses.replace(GOOD, metrics={"tpot_ms": MetricValue(value=1, unit="ms", statistic="p50")})

    with pytest.raises(WorkError, match="p90"):
        told(record, (Objective.of("tpot_ms", "p90"),), [])

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codesign.errors import WorkError
from codesign.results.pareto import dominates, front, losses, picks
from codesign.results.record import TrialRecord
from codesign.spec.metrics import Objective
from tests.results.records import record

SPEED, KL, BYTES = (Objective.of(name) for name in ("throughput_tokens_per_s", "kl_divergence", "kv_bytes"))
OBJECTIVES = (SPEED, KL, BYTES)

# Few distinct values, so that ties and equal points are common.
POINTS = st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=25)


def trials(points: list[tuple[int, int, int]]) -> list[TrialRecord]:
    return [
        record(number, {"throughput_tokens_per_s": speed, "kl_divergence": kl, "kv_bytes": size})
        for number, (speed, kl, size) in enumerate(points)
    ]


def loss(item: TrialRecord) -> tuple[float, ...]:
    found = losses(item, OBJECTIVES)
    assert found is not None
    return found


@given(POINTS)
def test_no_member_of_the_front_is_dominated(points: list[tuple[int, int, int]]) -> None:
    records = trials(points)
    members = front(records, OBJECTIVES)

    assert not any(dominates(loss(other), loss(member)) for member in members for other in records)


@given(POINTS)
def test_everything_off_the_front_is_dominated_by_a_member(points: list[tuple[int, int, int]]) -> None:
    records = trials(points)
    members = front(records, OBJECTIVES)

    for item in records:
        assert item in members or any(dominates(loss(member), loss(item)) for member in members)


@given(POINTS, st.randoms(use_true_random=False))
def test_the_order_of_records_changes_nothing(points: list[tuple[int, int, int]], rng: random.Random) -> None:
    records = trials(points)
    shuffled = rng.sample(records, len(records))

    assert front(shuffled, OBJECTIVES) == front(records, OBJECTIVES)
    assert picks(shuffled, OBJECTIVES) == picks(records, OBJECTIVES)


@given(POINTS)
def test_picks_other_than_the_baseline_are_on_the_front(points: list[tuple[int, int, int]]) -> None:
    records = trials(points)
    numbers = {member.number for member in front(records, OBJECTIVES)}
    named = picks(records, OBJECTIVES)

    assert {number for name, number in named.items() if name != "baseline"} <= numbers
    assert set(named) == ({"baseline", "fastest", "smallest", "best_quality", "balanced"} if points else set())


def test_equal_points_stay_on_the_front_together() -> None:
    assert [member.number for member in front(trials([(2, 1, 1), (1, 1, 1), (2, 1, 1)]), OBJECTIVES)] == [0, 2]


def test_rounding_of_the_arithmetic_decides_nothing() -> None:
    """A slower engine is not kept for a divergence of 1e-15 less than another's."""
    records = [
        record(0, {"throughput_tokens_per_s": 9, "kl_divergence": 8.4e-15, "peak_memory_bytes": 130_000_000}),
        record(1, {"throughput_tokens_per_s": 5, "kl_divergence": 7.9e-15, "peak_memory_bytes": 129_900_000}),
    ]
    objectives = [SPEED, KL, Objective.of("peak_memory_bytes")]

    assert [member.number for member in front(records, objectives)] == [0]


def test_directions_are_respected() -> None:
    members = front(trials([(9, 0, 0), (1, 0, 0)]), OBJECTIVES)

    assert [member.number for member in members] == [0]


def test_what_is_not_feasible_is_never_on_the_front() -> None:
    values = {"throughput_tokens_per_s": 9, "kl_divergence": 0, "kv_bytes": 0}
    records = [
        record(0, values, violations={"slo.tpot_ms.p99": 0.1}),
        record(1, values, outcome="oom"),
        record(2, {**values, "throughput_tokens_per_s": 1}, violations={"slo.tpot_ms.p99": -0.1}),
    ]

    assert [member.number for member in front(records, OBJECTIVES)] == [2]


def test_a_record_without_one_of_the_objectives_is_left_out() -> None:
    records = [record(0, {"throughput_tokens_per_s": 9}), *trials([(1, 1, 1)])[:0], record(1, {"kl_divergence": 0})]

    assert front(records, [SPEED]) == [records[0]]


def test_another_statistic_than_asked_for_is_said_and_not_mixed() -> None:
    with pytest.raises(WorkError, match=r"trial 3 holds tpot_ms as p50, the study asks for p99"):
        front([record(3, {"tpot_ms": 5.0})], [Objective.of("tpot_ms", "p99")])


def test_an_infeasible_baseline_keeps_its_name() -> None:
    assert picks([record(0, outcome="oom")], OBJECTIVES) == {"baseline": 0}


def test_names_without_an_objective_of_their_kind_are_absent() -> None:
    assert set(picks(trials([(1, 1, 1)]), [KL])) == {"baseline", "best_quality", "balanced"}


def test_balanced_is_the_point_nearest_to_the_ideal_after_scaling() -> None:
    named = picks(trials([(0, 0, 0), (100, 100, 100), (80, 20, 20), (20, 1, 1)]), OBJECTIVES)

    assert named == {"baseline": 0, "fastest": 1, "smallest": 0, "best_quality": 0, "balanced": 2}


def test_an_objective_that_does_not_vary_does_not_weigh() -> None:
    named = picks(trials([(0, 0, 7), (10, 10, 7), (9, 2, 7)]), OBJECTIVES)

    assert named["balanced"] == 2


def test_equally_fast_configurations_are_decided_by_balance() -> None:
    named = picks(trials([(5, 9, 0), (5, 1, 1), (1, 0, 2)]), OBJECTIVES)

    assert named["fastest"] == 1

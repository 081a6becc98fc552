from hypothesis import given
from hypothesis import strategies as st

from codesign.engine.parallel.plan_ints import from_ints, to_ints
from codesign.engine.step import StepPlan
from tests.engine.parallel.plans import plans


@given(plans())
def test_a_plan_comes_back_from_its_integers(plan: StepPlan) -> None:
    numbers = to_ints(plan)

    assert from_ints(numbers) == plan
    assert all(type(number) is int for number in numbers)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4))
def test_a_plan_without_sequences_comes_back(commits: list[tuple[int, int]]) -> None:
    plan = StepPlan(commits=tuple(commits), frees=(3,))

    assert from_ints(to_ints(plan)) == plan

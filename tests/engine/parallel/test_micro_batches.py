import dataclasses
import itertools

from hypothesis import given
from hypothesis import strategies as st

from codesign.engine.parallel.micro_batches import micro_batches
from codesign.engine.step import StepPlan, decode_plan
from tests.engine.parallel.plans import plans


@given(plans(), st.integers(1, 8))
def test_micro_batches_one_after_the_other_are_the_plan(plan: StepPlan, count: int) -> None:
    found = micro_batches(plan, count)

    assert len(found) == min(count, len(plan.slots))
    for name in ("slots", "query_lens", "token_ids", "positions", "is_prompt", "is_prompt_end", "blocks", "num_cached"):
        assert tuple(itertools.chain(*(getattr(own, name) for own in found))) == getattr(plan, name)
    starts = itertools.accumulate((len(own.token_ids) for own in found), initial=0)
    rows = [start + row for own, start in zip(found, starts, strict=False) for row in own.logits_rows]
    assert tuple(rows) == plan.logits_rows
    first, *rest = found
    assert (first.commits, first.truncates, first.frees) == (plan.commits, plan.truncates, plan.frees)
    assert not any(own.commits or own.truncates or own.frees for own in rest)


@given(st.integers(1, 20), st.integers(1, 8))
def test_equal_sequences_are_spread_evenly(num_sequences: int, count: int) -> None:
    plan = decode_plan(range(num_sequences), [0] * num_sequences, [5] * num_sequences)

    sizes = [len(own.slots) for own in micro_batches(plan, count)]

    assert max(sizes) - min(sizes) <= 1


def test_a_long_prompt_is_a_micro_batch_of_its_own() -> None:
    lens = (100, 1, 1, 1)
    plan = dataclasses.replace(decode_plan(range(4), [0] * 4, [0] * 4))
    plan = StepPlan(
        slots=plan.slots,
        query_lens=lens,
        token_ids=(0,) * 103,
        positions=(0,) * 103,
        is_prompt=(True, False, False, False),
        is_prompt_end=(True, False, False, False),
    )

    assert [own.query_lens for own in micro_batches(plan, 2)] == [(100,), (1, 1, 1)]

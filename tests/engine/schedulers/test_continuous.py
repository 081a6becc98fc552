"""The scheduler alone, against a model of what a cache would accept: no engine, thousands of steps."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codesign.engine.schedulers.continuous import Continuous
from codesign.engine.sequence import Sequence
from codesign.engine.step import StepPlan
from codesign.spec.request import Request, SamplingParams


@dataclasses.dataclass
class Slot:
    """What the cache knows: whose rows, how many committed, how many pending."""

    num_rows: int = 0
    num_pending: int = 0


class CheckedCache:
    """Replays plans and asserts the contract of StepPlan."""

    def __init__(self, num_slots: int, max_step_tokens: int) -> None:
        self.slots = {slot: Slot() for slot in range(num_slots)}
        self.max_step_tokens = max_step_tokens

    def run(self, plan: StepPlan) -> None:
        assert 0 < len(plan.token_ids) <= self.max_step_tokens
        for slot, count in plan.commits:
            assert slot not in plan.frees
            assert 1 <= count <= self.slots[slot].num_pending
            self.slots[slot].num_rows += count
            self.slots[slot].num_pending = 0
        assert len({slot for slot, _ in plan.commits}) == len(plan.commits)
        for slot in plan.frees:
            self.slots[slot] = Slot()
        assert list(plan.is_prompt) == sorted(plan.is_prompt), "outputs come before prompt chunks"
        decoding = [slot for slot, is_prompt in zip(plan.slots, plan.is_prompt, strict=True) if not is_prompt]
        assert decoding == sorted(decoding)
        starts, rows = plan.query_starts, []
        for index, slot in enumerate(plan.slots):
            held, length = self.slots[slot], plan.query_lens[index]
            assert held.num_pending == 0, "queried with pending rows that nobody committed"
            positions = plan.positions[starts[index] : starts[index + 1]]
            assert positions == tuple(range(held.num_rows, held.num_rows + length))
            if plan.is_prompt[index]:
                held.num_rows += length
            else:
                assert not plan.is_prompt_end[index]
                held.num_pending = length
                rows += range(starts[index], starts[index + 1])
            if plan.is_prompt_end[index]:
                rows.append(starts[index + 1] - 1)
        assert plan.logits_rows == tuple(rows)


def sequence(name: str, num_prompt: int, max_tokens: int) -> Sequence:
    prompt = tuple(random.Random(name).choices(range(1000), k=num_prompt))
    return Sequence(Request(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens)))


@settings(max_examples=150, deadline=None)
@given(
    num_slots=st.integers(1, 5),
    spare=st.integers(0, 20),
    events=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 40), st.integers(1, 12)),
            st.tuples(st.just("abort"), st.integers(0, 30), st.just(0)),
            st.tuples(st.just("step"), st.integers(1, 8), st.just(0)),
        ),
        max_size=60,
    ),
    seed=st.integers(0, 999),
)
def test_any_mix_of_arrivals_aborts_and_drafts_keeps_the_contract_and_finishes(
    num_slots: int, spare: int, events: list[tuple[str, int, int]], seed: int
) -> None:
    rng = random.Random(seed)
    scheduler = Continuous().start(num_slots=num_slots, max_step_tokens=num_slots + spare)
    cache = CheckedCache(num_slots, num_slots + spare)
    live: dict[str, Sequence] = {}
    order: list[str] = []
    started: list[str] = []
    num_added = 0

    def step() -> None:
        drafts = {own.request_id: rng.choices(range(9), k=rng.randrange(5)) for own in scheduler.decoding()}
        plan, sampled = scheduler.plan(drafts)
        if not plan.slots:
            assert not live
            return
        for own, length, start in zip(sampled, plan.query_lens, plan.query_starts, strict=False):
            if not own.is_prefilling:
                taken = list(plan.token_ids[start + 1 : start + length])
                assert taken == drafts[own.request_id][: len(taken)], "the first drafts, in order"
                assert len(taken) < own.num_left
        cache.run(plan)
        started.extend(s.request_id for s in sampled if s.request_id not in started)
        for output in scheduler.commit(sampled, [[7] * rng.randint(1, count) for count in plan.num_logits]):
            if output.finish_reason:
                done = live.pop(output.request_id)
                assert len(done.token_ids) == done.num_prompt + done.sampling.max_tokens

    for kind, first, second in events:
        if kind == "add":
            added = sequence(f"r{num_added}", first, second)
            live[added.request_id] = added
            order.append(added.request_id)
            scheduler.add(added)
            num_added += 1
        elif kind == "abort":
            name = f"r{first}"
            assert scheduler.abort(name) == (name in live)
            if live.pop(name, None):
                order.remove(name)
        else:
            for _ in range(first):
                step()
    steps = 0
    while scheduler.has_work:
        step()
        steps += 1
        assert steps < 5000
    assert not live
    assert [name for name in started if name in order] == [name for name in order if name in started], "not FCFS"


def test_everything_is_done_with_one_token_per_step() -> None:
    scheduler = Continuous().start(num_slots=1, max_step_tokens=1)
    scheduler.add(sequence("a", 5, 3))
    lengths = []
    while scheduler.has_work:
        plan, sampled = scheduler.plan()
        lengths.append(len(plan.token_ids))
        scheduler.commit(sampled, [[0]] * len(sampled))

    assert lengths == [1] * 7


def test_step_too_small_for_the_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="max_step_tokens 3 cannot hold one token of each of 4"):
        Continuous().start(num_slots=4, max_step_tokens=3)


def test_freed_slot_is_listed_before_it_is_used_again_in_the_same_plan() -> None:
    scheduler = Continuous().start(num_slots=1, max_step_tokens=64)
    scheduler.add(sequence("a", 5, 1))
    scheduler.add(sequence("b", 6, 1))
    _, sampled = scheduler.plan()
    scheduler.commit(sampled, [[0]])

    plan, _ = scheduler.plan()

    assert plan.frees == (0,) and plan.slots == (0,) and plan.query_lens == (6,)

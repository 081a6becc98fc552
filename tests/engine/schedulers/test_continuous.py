"""What `continuous` alone does: iteration-level admission, chunks, preemption, fairness.

That its steps keep the contract and its tokens are right is shown for every scheduler in test_schedulers.py.
"""

import pytest

from codesign.engine.schedulers.continuous import Continuous, ContinuousScheduler
from codesign.engine.sequence import Sequence
from codesign.engine.step import BLOCK_TOKENS, StepPlan
from tests.engine.schedulers.fake_model import FakeModel, allocator, alone, sequence


def start(num_slots: int, max_step_tokens: int, num_blocks: int = 0, *, shares: bool = False) -> ContinuousScheduler:
    return Continuous().start(
        num_slots=num_slots, max_step_tokens=max_step_tokens, allocator=allocator(num_blocks, shares=shares)
    )


class Driver:
    """Runs steps on a model that checks them; keeps who finished, in order, and all plans."""

    def __init__(self, scheduler: ContinuousScheduler, num_slots: int, max_step_tokens: int, num_blocks: int) -> None:
        self.scheduler, self.model = scheduler, FakeModel(num_slots, max_step_tokens, num_blocks)
        self.finished: list[str] = []
        self.plans: list[StepPlan] = []

    def step(self, drafts: dict[str, list[int]] | None = None) -> None:
        plan, sampled = self.scheduler.plan(drafts or {})
        self.plans.append(plan)
        rows, tokens = iter(self.model.run(plan)), []
        for count in plan.num_logits:
            tokens.append([next(rows) for _ in range(count)][:1])  # a draft is never kept
        outputs = self.scheduler.commit(sampled, tokens)
        self.finished += [output.request_id for output in outputs if output.finish_reason]

    def finish(self) -> None:
        while self.scheduler.has_work:
            self.step()


def test_everything_is_done_with_one_token_per_step() -> None:
    scheduler = start(1, 1)
    scheduler.add(sequence("a", 5, 3))
    lengths = []
    while scheduler.has_work:
        plan, sampled = scheduler.plan()
        lengths.append(len(plan.token_ids))
        scheduler.commit(sampled, [[0]] * len(sampled))

    assert lengths == [1] * 7


def test_freed_slot_is_listed_before_it_is_used_again_in_the_same_plan() -> None:
    scheduler = start(1, 64)
    scheduler.add(sequence("a", 5, 1))
    scheduler.add(sequence("b", 6, 1))
    _, sampled = scheduler.plan()
    scheduler.commit(sampled, [[0]])

    plan, _ = scheduler.plan()

    assert plan.frees == (0,) and plan.slots == (0,) and plan.query_lens == (6,)


def test_prompt_chunks_are_bounded_while_outputs_are_not() -> None:
    scheduler = Continuous(prefill_chunk_tokens=10).start(num_slots=4, max_step_tokens=64)
    driver = Driver(scheduler, 4, 64, 0)
    for name in "abc":
        scheduler.add(sequence(name, 15, 4))
    driver.finish()

    prompts = [
        sum(length for length, is_prompt in zip(plan.query_lens, plan.is_prompt, strict=True) if is_prompt)
        for plan in driver.plans
    ]
    assert prompts[:5] == [10, 10, 10, 10, 5] and not any(prompts[5:])


@pytest.mark.parametrize("value", [0, -1, True, 2.5])
def test_a_chunk_that_is_no_number_of_tokens_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="prefill_chunk_tokens must be a whole number from 1"):
        Continuous(prefill_chunk_tokens=value)  # type: ignore[arg-type]


def test_the_youngest_gives_way_and_goes_on_as_if_nothing_had_happened() -> None:
    """Two of 2 blocks each grow into a third; there are five."""
    driver = Driver(start(2, 128, 5), 2, 128, 5)
    old, young = sequence("old", 60, 30), sequence("young", 60, 30)
    for own in (old, young):
        driver.scheduler.add(own)
    driver.finish()

    assert driver.scheduler.stats()["preemptions"] == young.num_preemptions == 1
    assert driver.finished == ["old", "young"]
    for own in (old, young):
        assert own.token_ids[60:] == alone(own.token_ids[:60], 30)


def test_a_preempted_output_is_prefilled_with_its_prompt_and_found_where_prefixes_are_kept() -> None:
    computed = {}
    for shares in (False, True):
        driver = Driver(start(2, 256, 5, shares=shares), 2, 256, 5)
        driver.scheduler.add(sequence("old", 60, 30))
        driver.scheduler.add(young := sequence("young", 60, 40))
        driver.finish()
        assert young.num_preemptions == 1 and young.num_prefill > young.num_prompt
        resumed = next(plan for plan in driver.plans if any(plan.is_prompt) and plan.positions[-1] >= 64)
        assert resumed.is_prompt_end[-1] and resumed.logits_rows[-1] == len(resumed.token_ids) - 1
        computed[shares] = resumed.query_lens[-1]

    assert computed[False] == young.num_prefill
    assert computed[True] < computed[False], "its own blocks are still there"


def test_drafts_are_dropped_before_anybody_is_preempted() -> None:
    """Two of 2 blocks each, and one more that the first takes for its drafts."""
    driver = Driver(start(2, 128, 5), 2, 128, 5)
    for name in "ab":
        driver.scheduler.add(sequence(name, 60, 20))
    driver.step()

    for _ in range(4):
        driver.step({name: [-1] * 8 for name in "ab"})

    assert [plan.query_lens for plan in driver.plans[1:]] == [(9, 4), (9, 3), (9, 2), (9, 1)]
    assert driver.scheduler.stats()["preemptions"] == 0
    driver.step()
    assert driver.scheduler.stats()["preemptions"] == 1


def test_nobody_is_admitted_where_those_who_run_need_the_blocks_next() -> None:
    """One block for each that runs stays free, so that admission does not lead to preemption at once."""
    driver = Driver(start(3, 256, 6), 3, 256, 6)
    for name in "abc":
        driver.scheduler.add(sequence(name, 2 * BLOCK_TOKENS, 20))
    driver.step()

    assert driver.plans[0].slots == (0, 1), "two of two blocks each, and one for each to grow into"
    driver.finish()
    assert driver.scheduler.stats()["preemptions"] == 0


def test_equal_prompts_admitted_together_compute_themselves_and_later_ones_share() -> None:
    driver = Driver(start(4, 256, 30, shares=True), 4, 256, 30)
    prompt = sequence("a", 70, 8).token_ids
    for name in "ab":
        driver.scheduler.add(sequence(name, 70, 8, prefix=prompt))
    driver.step()
    driver.scheduler.add(sequence("c", 70, 8, prefix=prompt))
    driver.scheduler.add(sequence("d", 70, 8, prefix=prompt))
    driver.step()

    first, second = driver.plans
    assert first.query_lens == (70, 70) and first.num_cached == ()
    assert second.query_lens == (1, 1, 6, 6) and second.num_cached == (0, 0, 64, 64)
    assert driver.scheduler.stats()["blocks_shared"] == 2
    driver.finish()
    stats = driver.scheduler.stats()
    assert (stats["prefix_hit_tokens"], stats["prompt_tokens"], stats["blocks_used"]) == (128, 280, 0)


def test_the_next_turn_of_a_conversation_finds_the_output_of_the_last() -> None:
    driver = Driver(start(1, 256, 30, shares=True), 1, 256, 30)
    first = sequence("first", 40, 60)
    driver.scheduler.add(first)
    driver.finish()
    driver.scheduler.add(sequence("second", 130, 4, prefix=first.token_ids))
    driver.finish()

    # 99 of its 100 tokens were computed: the last came out and nobody asked what follows it.
    assert driver.scheduler.stats()["prefix_hit_tokens"] == 96


def test_short_requests_do_not_starve_a_long_one() -> None:
    """It needs every block, and short ones never stop coming."""
    driver = Driver(start(4, 64, 8), 4, 64, 8)
    for number in range(8):
        driver.scheduler.add(sequence(f"early {number}", 20, 10))
    driver.scheduler.add(sequence("long", 8 * BLOCK_TOKENS - 40, 40))
    for number in range(200):
        driver.scheduler.add(sequence(f"late {number}", 20, 10))
        driver.step()

    assert "long" in driver.finished
    assert driver.finished.index("long") == 8, "all that came before it, and nobody else"


def test_long_requests_do_not_starve_a_short_one() -> None:
    driver = Driver(start(4, 64, 10), 4, 64, 10)
    for number in range(3):
        driver.scheduler.add(sequence(f"early {number}", 100, 100))
    driver.scheduler.add(sequence("short", 5, 5))
    for number in range(300):
        driver.scheduler.add(sequence(f"late {number}", 100, 100))
        driver.step()

    assert set(driver.finished[:4]) == {"early 0", "early 1", "early 2", "short"}


def test_the_oldest_is_never_preempted() -> None:
    driver = Driver(start(5, 64, 12), 5, 64, 12)
    waiting: list[Sequence] = [sequence(str(number), 30, 200) for number in range(8)]
    for own in waiting:
        driver.scheduler.add(own)
    while driver.scheduler.has_work:
        oldest = next(own for own in waiting if not own.finish_reason)
        before = oldest.num_preemptions
        driver.step()
        assert oldest.num_preemptions == before

    assert driver.finished == [own.request_id for own in waiting]
    assert driver.scheduler.stats()["preemptions"] > 3

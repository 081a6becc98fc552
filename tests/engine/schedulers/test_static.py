"""What `static` alone does; that its steps keep the contract is shown for every scheduler in test_schedulers.py."""

import pytest

from codesign.engine.schedulers.static import Static, StaticScheduler
from codesign.engine.sequence import StepOutput
from codesign.engine.step import StepPlan
from tests.engine.driving import generate, recorded_plans, request, tiny_engine
from tests.engine.schedulers.fake_model import FakeModel, allocator, sequence


def start(num_slots: int, num_blocks: int = 0) -> tuple[StaticScheduler, FakeModel]:
    scheduler = Static().start(num_slots=num_slots, max_step_tokens=64, allocator=allocator(num_blocks, shares=False))
    return scheduler, FakeModel(num_slots, 64, num_blocks)


def step(scheduler: StaticScheduler, model: FakeModel) -> tuple[StepPlan, list[StepOutput]]:
    plan, sampled = scheduler.plan()
    return plan, scheduler.commit(sampled, [[token] for token in model.run(plan)])


def test_a_batch_is_padded_to_its_longest_output_and_nobody_enters_before_that() -> None:
    scheduler, model = start(2)
    for name, max_tokens in (("short", 2), ("long", 6), ("next", 1)):
        scheduler.add(sequence(name, 5, max_tokens))
    plans = []
    outputs = []
    while scheduler.has_work:
        plan, own = step(scheduler, model)
        plans.append(plan)
        outputs += own

    assert [plan.slots for plan in plans] == [(0, 1)] * 6 + [(0,)]
    assert [plan.num_logits for plan in plans] == [(1, 1), (1, 1), (1,), (1,), (1,), (1,), (1,)]
    assert [plan.positions[0] for plan in plans] == [0, 5, 6, 6, 6, 6, 0], "padding grows nothing"
    assert [plan.commits for plan in plans[1:5]] == [(), ((0, 1), (1, 1)), ((0, 0), (1, 1)), ((0, 0), (1, 1))]
    assert plans[6].frees == (0, 1)
    assert [own.request_id for own in outputs if own.finish_reason] == ["short", "long", "next"]


def test_all_prompts_come_before_the_first_output_goes_on() -> None:
    scheduler, model = start(3)
    for name in "abc":
        scheduler.add(sequence(name, 40, 3))

    plans = [step(scheduler, model)[0] for _ in range(4)]

    assert [plan.query_lens for plan in plans] == [(40, 24), (16, 40), (1, 1, 1), (1, 1, 1)]


def test_memory_is_set_aside_for_the_longest_output_of_each() -> None:
    scheduler, model = start(4, num_blocks=5)
    for name in "abc":
        scheduler.add(sequence(name, 10, 50))

    plan, _ = step(scheduler, model)

    assert plan.slots == (0, 1) and plan.blocks == ((0, 1), (2, 3))


def test_an_aborted_request_leaves_at_once_and_the_batch_ends_with_the_last() -> None:
    scheduler, model = start(2)
    for name, max_tokens in (("short", 2), ("long", 60), ("next", 1)):
        scheduler.add(sequence(name, 5, max_tokens))
    for _ in range(4):
        step(scheduler, model)

    assert not scheduler.abort("short"), "it has all its output"
    assert scheduler.abort("long")
    plan, outputs = step(scheduler, model)

    assert plan.frees == (1, 0) and [own.request_id for own in outputs] == ["next"]


@pytest.mark.parametrize("policy", ["full", "h2o", "streaming_llm"])
def test_through_the_engine_it_gives_the_tokens_of_continuous_in_more_steps(policy: str) -> None:
    load = [request(str(number), 20 + number, 3 + 9 * (number % 3), temperature=number % 2) for number in range(9)]
    tokens, num_queries = {}, {}
    for name in ("continuous", "static"):
        engine = tiny_engine(scheduler=name, kv={"policy": policy})
        plans = recorded_plans(engine)
        tokens[name] = generate(engine, *load)
        num_queries[name] = sum(len(plan.token_ids) for plan in plans)

    assert tokens["static"] == tokens["continuous"]
    assert num_queries["static"] > num_queries["continuous"]

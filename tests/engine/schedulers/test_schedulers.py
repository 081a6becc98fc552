"""Every scheduler, alone, against a model in plain integers: no engine, thousands of steps.

Lossless: whatever the neighbours, chunks, drafts, aborts, shared blocks and preemptions, a request's tokens are those
that it gets alone.
"""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codesign.engine.sequence import Sequence
from codesign.engine.step import BLOCK_TOKENS
from codesign.registry import SCHEDULERS
from tests.engine.schedulers.fake_model import FakeModel, allocator, alone, sequence

PREFIXES = [random.Random(f"prefix {length}").choices(range(1000), k=length) for length in (0, 31, 64, 100)]


class Run:
    """One scheduler on one model, and what must have come out of it."""

    def __init__(
        self, name: str, num_slots: int, spare: int, num_blocks: int, *, shares: bool, seed: int, **knobs: Any
    ) -> None:
        self.rng = random.Random(seed)
        self.blocks = allocator(num_blocks, shares=shares)
        self.scheduler = SCHEDULERS.create(name, **knobs).start(
            num_slots=num_slots, max_step_tokens=num_slots + spare, allocator=self.blocks
        )
        self.model = FakeModel(num_slots, num_slots + spare, num_blocks)
        self.live: dict[str, tuple[Sequence, list[int]]] = {}  # request id -> it, and its tokens when alone
        self.order: list[str] = []
        self.started: list[str] = []
        self.num_added = self.num_steps = 0

    def add(self, num_prompt: int, max_tokens: int, prefix: int = 0) -> None:
        shared = PREFIXES[prefix]
        expected_stop = self.rng.random() < 0.2
        name = f"r{self.num_added}"
        plain = sequence(name, num_prompt + len(shared), max_tokens, prefix=shared)
        expected = alone(plain.token_ids, max_tokens)
        if expected_stop:
            stop = self.rng.choice(expected)
            expected = alone(plain.token_ids, max_tokens, stop)
            plain = sequence(name, num_prompt + len(shared), max_tokens, prefix=shared, stop_token_ids=(stop,))
        self.live[name] = plain, expected
        self.order.append(name)
        self.scheduler.add(plain)
        self.num_added += 1

    def abort(self, number: int) -> None:
        name = f"r{number}"
        assert self.scheduler.abort(name) == (name in self.live)
        if self.live.pop(name, None):
            self.order.remove(name)

    def step(self) -> None:
        self.num_steps += 1
        drafts = {own.request_id: self._draft(own) for own in self.scheduler.decoding()}
        plan, sampled = self.scheduler.plan(drafts)
        if not plan.slots:
            assert not self.live
            return
        starts = dict(zip(plan.slots, plan.query_starts, strict=False))
        for own, count in zip(sampled, plan.num_logits, strict=True):
            if not own.is_prefilling:
                first = starts[own.slot] + 1
                taken = list(plan.token_ids[first : first + count - 1])
                assert taken == drafts[own.request_id][: len(taken)], "the first drafts, in order"
                assert len(taken) < own.num_left
        predicted = iter(self.model.run(plan))
        self.started += [own.request_id for own in sampled if own.request_id not in self.started]
        tokens = []
        for own, count in zip(sampled, plan.num_logits, strict=True):
            rows, first = [next(predicted) for _ in range(count)], starts[own.slot] + 1
            draft = plan.token_ids[first : first + count - 1]
            kept = next((i for i in range(count - 1) if draft[i] != rows[i]), count - 1)
            tokens.append(rows[: kept + 1])
        for output in self.scheduler.commit(sampled, tokens):
            if output.finish_reason:
                own, expected = self.live.pop(output.request_id)
                assert own.token_ids[own.num_prompt :] == expected

    def _draft(self, own: Sequence) -> list[int]:
        """Up to four tokens, right ones first and perhaps a wrong one at the end."""
        _, expected = self.live[own.request_id]
        first = len(own.token_ids) - own.num_prompt
        right = expected[first : first + self.rng.choice([0, 0, 1, 4])]
        return [*right, *self.rng.choices(range(1000), k=self.rng.randrange(2))]

    def finish(self) -> None:
        while self.scheduler.has_work:
            self.step()
            assert self.num_steps < 20000
        assert not self.live
        survivors = [name for name in self.started if name in self.order]
        assert survivors == [name for name in self.order if name in self.started], "not first come, first served"


def any_load(run: Run, num_requests: int, *, aborts: float = 0.1) -> None:
    """Requests that come in bursts, some of which are aborted; then all is finished."""
    rng = run.rng
    for _ in range(num_requests):
        run.add(rng.randint(1, 40), rng.randint(1, 180), rng.randrange(4))
        if rng.random() < aborts:
            run.abort(rng.randrange(run.num_added + 1))
        for _ in range(rng.choice([0, 0, 0, 1, 25])):
            run.step()
    run.finish()


@pytest.mark.parametrize("name", SCHEDULERS.names())
@settings(max_examples=150, deadline=None)
@given(
    num_slots=st.integers(1, 7),
    spare=st.integers(0, 90),
    num_blocks=st.sampled_from([0, 10, 11, 12, 16, 40]),
    shares=st.booleans(),
    num_requests=st.integers(1, 15),
    seed=st.integers(0, 9999),
)
def test_every_request_gets_the_tokens_that_it_gets_alone(
    name: str, num_slots: int, spare: int, num_blocks: int, shares: bool, num_requests: int, seed: int
) -> None:
    knobs = {"prefill_chunk_tokens": 1 + seed % 50} if name == "continuous" and seed % 3 == 0 else {}
    run = Run(name, num_slots, spare, num_blocks, shares=shares, seed=seed, **knobs)

    any_load(run, num_requests)

    if num_blocks:
        stats = run.scheduler.stats()
        assert stats["blocks_used"] == stats["blocks_shared"] == 0, "blocks are left behind"


def test_those_loads_preempt_and_share_and_evict() -> None:
    """Else the test above would show little."""
    found = {"preemptions": 0, "prefix_hit_tokens": 0, "prefix_evictions": 0}
    for seed in range(10):
        run = Run("continuous", 5, 60, 12, shares=True, seed=seed)
        any_load(run, 12)
        found = {key: count + run.scheduler.stats()[key] for key, count in found.items()}

    assert found["preemptions"] > 20 and found["prefix_hit_tokens"] > 2000 and found["prefix_evictions"] > 100


@pytest.mark.parametrize("name", SCHEDULERS.names())
def test_step_too_small_for_the_slots_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="max_step_tokens 3 cannot hold one token of each of 4"):
        SCHEDULERS.create(name).start(num_slots=4, max_step_tokens=3)


@pytest.mark.parametrize("name", SCHEDULERS.names())
def test_a_sequence_that_never_has_room_is_refused_when_it_comes(name: str) -> None:
    scheduler = SCHEDULERS.create(name).start(num_slots=1, max_step_tokens=8, allocator=allocator(2, shares=False))

    scheduler.add(sequence("fits", 60, 4))
    with pytest.raises(ValueError, match="'long': needs 3 blocks, there are 2"):
        scheduler.add(sequence("long", 60, 5))


@pytest.mark.parametrize("name", SCHEDULERS.names())
def test_prompts_with_a_common_beginning_find_it_from_the_step_after_it_was_computed(name: str) -> None:
    run = Run(name, 1, 200, 12, shares=True, seed=1)
    for _ in range(3):
        run.add(5, 1, prefix=2)
        run.finish()

    stats = run.scheduler.stats()
    assert (stats["prefix_lookups"], stats["prompt_tokens"]) == (3, 3 * 69)
    assert stats["prefix_hit_tokens"] == 2 * 2 * BLOCK_TOKENS

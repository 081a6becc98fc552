"""Requests of a workload: the same for every configuration, different from block to block."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codesign.measure.load import Load
from codesign.measure.requests import make_load
from codesign.measure.tokens import RandomTokens, TextTokens
from codesign.spec.workload import Workload

TEXT = TextTokens([list(range(1000)), list(range(1000, 3000))])


def workload(**changes: object) -> Workload:
    plain = {"scenario": "offline", "prompt_tokens": 32, "output_tokens": {"uniform": [4, 9]}, "num_requests": 20}
    return Workload.model_validate({**plain, **changes})


def test_the_seed_fixes_content_lengths_and_order() -> None:
    assert make_load(workload(), TEXT, block=0) == make_load(workload(), TEXT, block=0)
    assert make_load(workload(seed=1), TEXT, block=0) != make_load(workload(), TEXT, block=0)


def test_blocks_share_no_prompt() -> None:
    prompts = [r.prompt_token_ids for block in range(4) for r in make_load(workload(), TEXT, block=block).requests]

    assert len(set(prompts)) == len(prompts)


def test_lengths_are_the_drawn_ones() -> None:
    load = make_load(workload(), TEXT, block=0)

    assert {len(request.prompt_token_ids) for request in load.requests} == {32}
    assert {request.sampling.max_tokens for request in load.requests} <= set(range(4, 10))


@pytest.mark.parametrize(
    ("changes", "concurrency"),
    [
        ({"scenario": "offline"}, 20),
        ({"scenario": "single_stream"}, 1),
        ({"scenario": "interactive", "concurrency": 5}, 5),
    ],
)
def test_closed_loops_have_the_concurrency_of_their_scenario(changes: dict[str, object], concurrency: int) -> None:
    load = make_load(workload(**changes), TEXT, block=0)

    assert load.concurrency == concurrency
    assert load.arrivals_s is None


def test_a_server_workload_arrives_at_its_mean_rate() -> None:
    arrival = {"process": "poisson", "rate_per_s": 50.0}
    load = make_load(workload(scenario="server", arrival=arrival, num_requests=2000), TEXT, block=0)

    assert load.arrivals_s is not None
    assert list(load.arrivals_s) == sorted(load.arrivals_s)
    assert load.arrivals_s[-1] == pytest.approx(2000 / 50, rel=0.1)


def test_prompts_longer_than_the_text_wrap_around() -> None:
    taken = TextTokens([[1, 2, 3]]).take(random.Random(0), 8)

    assert len(taken) == 8
    assert set(taken) == {1, 2, 3}


def test_random_tokens_stay_inside_the_vocabulary() -> None:
    assert set(RandomTokens(7).take(random.Random(0), 500)) == set(range(7))


def prompts(load: Load) -> list[tuple[int, ...]]:
    return [request.prompt_token_ids for request in load.requests]


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens with which both begin."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("shared", [{"tokens": 20}, {"share": 0.625}])
def test_prompts_of_a_group_begin_alike_and_end_apart(shared: dict[str, float]) -> None:
    made = prompts(make_load(workload(shared_prefix={"num_groups": 3, **shared}), RandomTokens(10**6), block=0))
    groups = {prompt[:20] for prompt in made}

    assert len(groups) == 3
    assert all(common(a, b) == (20 if a[:20] == b[:20] else 0) for a in made for b in made if a is not b)
    assert {len(prompt) for prompt in made} == {32}


def test_a_group_keeps_its_prefix_for_the_whole_trial_and_not_for_another_seed() -> None:
    shared = {"num_groups": 1, "share": 0.5}
    blocks = [prompts(make_load(workload(shared_prefix=shared), TEXT, block=block))[0][:16] for block in (-1, 0, 7)]
    other = prompts(make_load(workload(shared_prefix=shared, seed=1), TEXT, block=0))[0][:16]

    assert len(set(blocks)) == 1
    assert other != blocks[0]


@given(
    share=st.floats(0, 1),
    length=st.integers(1, 60),
    num_groups=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_a_shared_prefix_changes_no_length(share: float, length: int, num_groups: int, seed: int) -> None:
    shared = {"num_groups": num_groups, "share": share}
    asked = workload(prompt_tokens={"uniform": [1, length]}, shared_prefix=shared, seed=seed, num_requests=5)
    plain = workload(prompt_tokens={"uniform": [1, length]}, seed=seed, num_requests=5)

    lengths = [[len(prompt) for prompt in prompts(make_load(w, TEXT, block=2))] for w in (asked, plain)]
    assert lengths[0] == lengths[1]


CHAT = {"turns": 3, "user_tokens": {"uniform": [2, 5]}, "think_time_s": 0.5}
SEEDED: dict[str, dict[str, object]] = {
    "shared prefixes": {"shared_prefix": {"num_groups": 2, "tokens": 8}},
    "conversations": {"scenario": "interactive", "concurrency": 2, "conversation": CHAT},
    "poisson": {"scenario": "server", "arrival": {"process": "poisson", "rate_per_s": 5}},
    "gamma": {"scenario": "server", "arrival": {"process": "gamma", "rate_per_s": 5, "burstiness": 3}},
    "observed lengths": {"prompt_tokens": {"empirical": [5, 9, 20]}},
}


@pytest.mark.parametrize("name", SEEDED)
def test_a_seed_fixes_everything_and_another_changes_it(name: str) -> None:
    one, again, other = (make_load(workload(seed=seed, **SEEDED[name]), TEXT, block=0) for seed in (3, 3, 4))

    assert one == again
    assert prompts(one) != prompts(other)
    assert one.arrivals_s is None or one.arrivals_s != other.arrivals_s
    assert not one.think_s or one.think_s != other.think_s


def test_later_turns_of_a_conversation_hold_only_what_is_new() -> None:
    load = make_load(workload(scenario="interactive", concurrency=2, conversation=CHAT), TEXT, block=0)
    lengths = [len(prompt) for prompt in prompts(load)]

    assert load.turns == 3
    assert set(lengths[::3]) == {32}
    assert all(2 <= length <= 5 for index, length in enumerate(lengths) if index % 3)
    assert sum(load.think_s) / len(load.think_s) == pytest.approx(0.5, rel=0.6)


def test_observed_lengths_in_order_go_on_from_block_to_block_in_pairs() -> None:
    asked = workload(
        prompt_tokens={"empirical": {"lengths": [5, 9, 20], "in_order": True}},
        output_tokens={"empirical": {"lengths": [1, 2, 3], "in_order": True}},
        num_requests=2,
    )
    made = [request for block in range(2) for request in make_load(asked, TEXT, block=block).requests]

    assert [(len(r.prompt_token_ids), r.sampling.max_tokens) for r in made] == [(5, 1), (9, 2), (20, 3), (5, 1)]

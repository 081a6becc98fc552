"""Requests of a workload: the same for every configuration, different from block to block."""

import random

import pytest

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

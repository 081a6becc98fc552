"""Common beginnings that are computed before anybody asks."""

import random

import pytest

from codesign.engine.engine import Engine
from codesign.errors import InputError, Unsupported
from codesign.spec.request import Request, SamplingParams
from tests.engine.driving import finish, generate, recorded_plans, request, tiny_engine

PREFIX = random.Random(0).choices(range(128), k=100)
ASKED = Request(
    request_id="a", prompt_token_ids=(*PREFIX, 1, 2, 3), sampling=SamplingParams(max_tokens=9, temperature=0.7, seed=3)
)


@pytest.fixture
def engine() -> Engine:
    return tiny_engine(kv={"layout": "paged"}, prefix_cache=True, max_step_tokens=40)


def test_a_warm_prefix_is_not_computed_again_and_changes_no_token(engine: Engine) -> None:
    assert engine.warm_prefix(PREFIX) == 96
    assert not engine.has_work and engine.step() == []
    plans = recorded_plans(engine)

    tokens = generate(engine, ASKED)

    assert plans[0].query_lens == (7,) and plans[0].num_cached == (96,)
    assert engine.stats()["prefix_hit_tokens"] == 96
    assert tokens == generate(tiny_engine(), ASKED)


def test_warming_needs_a_prefix_cache_to_keep_it() -> None:
    for config in ({}, {"kv": {"layout": "paged"}}):
        with pytest.raises(Unsupported, match="prefix_cache: true"):
            tiny_engine(**config).warm_prefix(PREFIX)


@pytest.mark.parametrize(
    ("tokens", "said"), [([], "1 to 255 tokens"), ([1] * 256, "got 256"), ([1, 128], "token 128 is outside")]
)
def test_a_prefix_that_no_prompt_can_begin_with_is_refused(engine: Engine, tokens: list[int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        engine.warm_prefix(tokens)


def test_a_prefix_is_not_warmed_among_requests(engine: Engine) -> None:
    engine.submit(request("running", 5, 5))

    with pytest.raises(ValueError, match="still has requests"):
        engine.warm_prefix(PREFIX)
    assert len(finish(engine)["running"]) == 5

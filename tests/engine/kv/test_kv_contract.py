"""Every registered policy, codec and backend replays random traffic beside the slow oracle, and agrees."""

from typing import Any

import pytest
from random_plans import random_plans
from replay import MAX_MODEL_LEN, MAX_QUERY_LEN, NUM_SLOTS, make_attention, make_oracle, replay

from codesign.registry import KV_CODECS, KV_POLICIES
from tests.engine.usable_backends import USABLE_BACKENDS

# Knobs that make small traffic evict; a policy that is not listed runs with a budget of 16 where it has one.
KNOBS: dict[str, list[dict[str, Any]]] = {
    "full": [{}],
    "streaming_llm": [{"kv_budget": 9, "num_sink_tokens": 4}, {"kv_budget": 0.25, "num_sink_tokens": 0}],
    "h2o": [
        {"kv_budget": 12, "num_sink_tokens": 2},
        {"kv_budget": 0.3, "recent_fraction": 0.2, "num_sink_tokens": 0, "score_norm": "query_count"},
    ],
    "pyramidkv": [
        {"kv_budget": 16, "window_tokens": 4, "num_sink_tokens": 2, "kernel_size": 3, "beta": 4},
        {"kv_budget": 0.5, "window_tokens": 7, "num_sink_tokens": 0, "kernel_size": 5, "beta": 1},
    ],
}
CASES = [
    pytest.param(policy, knobs, codec, backend, id=f"{policy}{index}-{codec}-{backend}")
    for policy in KV_POLICIES.names()
    for index, knobs in enumerate(
        KNOBS.get(policy, [{"kv_budget": 16} if "kv_budget" in KV_POLICIES.knobs(policy) else {}])
    )
    for codec in KV_CODECS.names()
    for backend in USABLE_BACKENDS
]


@pytest.mark.parametrize(("name", "knobs", "codec", "backend"), CASES)
def test_random_traffic_agrees_with_a_dictionary_of_rows(
    name: str, knobs: dict[str, Any], codec: str, backend: str
) -> None:
    policy = KV_POLICIES.create(name, **knobs)
    num_evicted = 0
    for seed in range(2):
        plans = random_plans(
            seed, num_steps=50, num_slots=NUM_SLOTS, max_model_len=MAX_MODEL_LEN, max_query_len=MAX_QUERY_LEN
        )
        attention = make_attention(policy, codec=codec, backend=backend)
        num_evicted += replay(attention, make_oracle(policy, name), plans, seed=seed)

    is_bounded = min(attention.kv_budget_tokens) < MAX_MODEL_LEN
    assert (num_evicted > 50) == is_bounded, "the traffic must reach the budget, or it shows nothing"


@pytest.mark.parametrize("name", [name for name in KNOBS if name != "full"])
def test_a_policy_without_a_law_of_its_own_is_held_to_the_general_one(name: str) -> None:
    """What a new file meets before anybody has written its oracle: the member itself, asked in float64."""
    policy = KV_POLICIES.create(name, **KNOBS[name][0])
    plans = random_plans(3, num_steps=40, num_slots=NUM_SLOTS, max_model_len=MAX_MODEL_LEN, max_query_len=MAX_QUERY_LEN)

    assert replay(make_attention(policy), make_oracle(policy, "a policy nobody has described"), plans) > 20

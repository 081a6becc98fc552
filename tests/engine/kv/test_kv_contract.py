"""Every registered policy, codec and backend replays random traffic beside the slow oracle, and agrees."""

from typing import Any

import pytest
from random_plans import random_plans
from replay import MAX_MODEL_LEN, MAX_QUERY_LEN, NUM_SLOTS, make_attention, make_oracle, replay, replay_classes

from codesign.engine.attention.switched import SwitchedAttention
from codesign.engine.kv.place import ON_DEVICE, KVPlace
from codesign.engine.kv.policy import KVPolicy
from codesign.errors import Unsupported
from codesign.registry import KV_CODECS, KV_PLACES, KV_POLICIES
from tests.engine.usable_backends import USABLE_BACKENDS

# Knobs that make small traffic evict; a policy that is not listed runs with a budget of 16 where it has one.
KNOBS: dict[str, list[dict[str, Any]]] = {
    "full": [{}],
    "streaming_llm": [{"kv_budget": 9, "num_sink_tokens": 4}, {"kv_budget": 0.25, "num_sink_tokens": 0}],
    "h2o": [
        {"kv_budget": 12, "num_sink_tokens": 2},
        {"kv_budget": 0.3, "recent_fraction": 0.2, "num_sink_tokens": 0, "score_norm": "query_count"},
        {"kv_budget": 14, "num_sink_tokens": 2, "score_norm": "decayed", "decay": 0.7},
    ],
    "r_kv": [
        {"kv_budget": 16, "buffer_tokens": 5, "window_tokens": 3, "num_sink_tokens": 2, "kernel_size": 3},
        {
            "kv_budget": 0.3,
            "buffer_tokens": 128,
            "window_tokens": 5,
            "num_sink_tokens": 0,
            "importance_weight": 0.7,
            "similarity_threshold": 0.2,
        },
    ],
    "ada_kv": [
        {"kv_budget": 16, "window_tokens": 4, "num_sink_tokens": 2, "kernel_size": 3},
        {"kv_budget": 0.3, "window_tokens": 5, "num_sink_tokens": 0, "kernel_size": 1, "floor_fraction": 0.0},
    ],
    "dynamic": [
        {"kv_budget": 16, "full_share": 0.5, "under_pressure": "h2o"},
        {"kv_budget": 0.3, "full_share": 0.3, "under_pressure": "streaming_llm"},
    ],
    "snapkv": [{"kv_budget": 16, "window_tokens": 4, "num_sink_tokens": 2, "kernel_size": 3}],
    "pyramidkv": [
        {"kv_budget": 16, "window_tokens": 4, "num_sink_tokens": 2, "kernel_size": 3, "beta": 4},
        {"kv_budget": 0.5, "window_tokens": 7, "num_sink_tokens": 0, "kernel_size": 5, "beta": 1},
    ],
}
MUTABLE = [name for name in KV_CODECS.names() if KV_CODECS.create(name).rows_mutable]
CASES = [
    pytest.param(policy, knobs, codec, backend, id=f"{policy}{index}-{codec}-{backend}")
    for policy in KV_POLICIES.names()
    for index, knobs in enumerate(
        KNOBS.get(policy, [{"kv_budget": 16} if "kv_budget" in KV_POLICIES.knobs(policy) else {}])
    )
    for codec in (KV_CODECS.names() if policy == "full" else MUTABLE)
    for backend in USABLE_BACKENDS
]
SWITCHING = {name for name in KNOBS if len(KV_POLICIES.create(name, **KNOBS[name][0]).slot_policies(NUM_SLOTS)) > 1}


@pytest.mark.parametrize(("name", "knobs", "codec", "backend"), CASES)
def test_random_traffic_agrees_with_a_dictionary_of_rows(
    name: str, knobs: dict[str, Any], codec: str, backend: str
) -> None:
    policy = KV_POLICIES.create(name, **knobs)
    if name in SWITCHING:
        check_switching(policy, codec, backend)
        return
    num_evicted, num_seeds = 0, 2 if codec == "native" else 1  # encoded rows are read and checked one by one: slow
    for seed in range(num_seeds):
        plans = random_plans(
            seed, num_steps=50, num_slots=NUM_SLOTS, max_model_len=MAX_MODEL_LEN, max_query_len=MAX_QUERY_LEN
        )
        attention = make_attention(policy, codec=codec, backend=backend)
        num_evicted += replay(attention, make_oracle(policy, name), plans, seed=seed)

    is_bounded = min(attention.kv_budget_tokens) < MAX_MODEL_LEN
    assert (num_evicted > 25 * num_seeds) == is_bounded, "the traffic must reach the budget, or it shows nothing"


@pytest.mark.parametrize("backend", USABLE_BACKENDS)
@pytest.mark.parametrize("knobs", KNOBS["h2o"], ids=str)
def test_scores_that_move_at_once_agree_when_one_token_comes_at_a_time(knobs: dict[str, Any], backend: str) -> None:
    policy = KV_POLICIES.create("h2o", **knobs)
    plans = random_plans(
        4, num_steps=60, num_slots=NUM_SLOTS, max_model_len=MAX_MODEL_LEN, max_query_len=1, accepts_all=True
    )
    attention = make_attention(policy, backend=backend, max_query_len=1)

    assert all(group.pending_column is None for group in attention.store.groups if group.is_bounded)
    assert replay(attention, make_oracle(policy, "h2o"), plans) > 25


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        *(("full", codec) for codec in KV_CODECS.names()),
        *((policy, "native") for policy in KV_POLICIES.names() if policy != "full"),
        ("h2o", "int8"),
        ("ada_kv", "fp8"),
    ],
)
@pytest.mark.parametrize("place", [name for name in KV_PLACES.names() if name != "device"])
def test_rows_in_another_place_agree_as_well(name: str, codec: str, place: str) -> None:
    """Every kind of store: rows, groups, ragged heads, several budgets, several classes of slots."""
    policy, where = KV_POLICIES.create(name, **KNOBS.get(name, [{}])[0]), KV_PLACES.create(place)
    if name in SWITCHING:
        check_switching(policy, codec, "sdpa", where)
        return
    plans = random_plans(5, num_steps=40, num_slots=NUM_SLOTS, max_model_len=MAX_MODEL_LEN, max_query_len=MAX_QUERY_LEN)
    attention = make_attention(policy, codec=codec, place=where)

    num_evicted = replay(attention, make_oracle(policy, name), plans, seed=5)

    assert (num_evicted > 20) == (name != "full")


@pytest.mark.parametrize("codec", [name for name in KV_CODECS.names() if name not in MUTABLE])
@pytest.mark.parametrize("name", [name for name in KV_POLICIES.names() if name not in {"full", *SWITCHING}])
def test_eviction_from_groups_is_refused_by_name(name: str, codec: str) -> None:
    policy = KV_POLICIES.create(name, **KNOBS.get(name, [{"kv_budget": 16}])[0])

    with pytest.raises(Unsupported, match=rf"kv.codec '{codec}' .* kv.policy '{name}' .* use kv.policy 'full'"):
        make_attention(policy, codec=codec)


def check_switching(policy: KVPolicy, codec: str, backend: str, place: KVPlace = ON_DEVICE) -> None:
    """Each class of slots beside an oracle of its own policy; those under pressure evict, the others do not."""
    num_evicted = [0, 0]
    for seed in range(2):
        plans = random_plans(
            seed, num_steps=50, num_slots=NUM_SLOTS, max_model_len=MAX_MODEL_LEN, max_query_len=MAX_QUERY_LEN
        )
        classes = policy.slot_policies(NUM_SLOTS)
        parts = [
            make_attention(own, codec=codec, backend=backend, num_slots=count, place=place) for count, own in classes
        ]
        oracles = [make_oracle(own, type(own).__module__.rpartition(".")[2]) for _, own in classes]
        found = replay_classes(SwitchedAttention(policy, parts), oracles, plans, seed=seed)
        num_evicted = [total + count for total, count in zip(num_evicted, found, strict=True)]

    assert num_evicted[0] == 0 and num_evicted[1] > 50


@pytest.mark.parametrize("name", [name for name in KNOBS if name != "full" and name not in SWITCHING])
def test_a_policy_without_a_law_of_its_own_is_held_to_the_general_one(name: str) -> None:
    """What a new file meets before anybody has written its oracle: the member itself, asked in float64."""
    policy = KV_POLICIES.create(name, **KNOBS[name][0])
    plans = random_plans(3, num_steps=40, num_slots=NUM_SLOTS, max_model_len=MAX_MODEL_LEN, max_query_len=MAX_QUERY_LEN)

    assert replay(make_attention(policy), make_oracle(policy, "a policy nobody has described"), plans) > 20

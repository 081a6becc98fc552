import dataclasses

import pytest
import torch

from codesign.engine.attention.weights import column_sums
from codesign.engine.kv.policies.h2o import H2O
from codesign.engine.kv.policy import KVPolicy, Prompt, Rows
from codesign.engine.kv.staging import StagedPrompt
from codesign.errors import InputError
from codesign.registry import KV_POLICIES

# Attention weights of six tokens, worked out by hand; row i is query i.
WEIGHTS = torch.tensor(
    [
        [1.00, 0.00, 0.00, 0.00, 0.00, 0.00],
        [0.40, 0.60, 0.00, 0.00, 0.00, 0.00],
        [0.10, 0.20, 0.70, 0.00, 0.00, 0.00],
        [0.10, 0.10, 0.60, 0.20, 0.00, 0.00],
        [0.05, 0.05, 0.50, 0.10, 0.30, 0.00],
        [0.10, 0.05, 0.40, 0.05, 0.10, 0.30],
    ]
)
# Column sums: 1.75, 1.00, 2.20, 0.35, 0.40, 0.30.


def prompt(column_sums: torch.Tensor) -> Prompt:
    key = torch.zeros(*column_sums.shape, 2)
    return Prompt(key=key, value=key, window_query=None, column_sums=column_sums, scale=1.0)


def rows(position: list[int], column: list[float]) -> Rows:
    return Rows(
        position=torch.tensor([[position]], dtype=torch.int32),
        column=torch.tensor([[column]]),
        next_position=torch.tensor([max(position) + 1]),
    )


def test_prompt_of_six_tokens_keeps_the_two_heaviest_and_the_two_newest() -> None:
    policy = H2O(kv_budget=4, recent_fraction=0.5, num_sink_tokens=0)

    assert policy.select(prompt(WEIGHTS.sum(dim=0)[None]), 4).tolist() == [[0, 2, 4, 5]]


def test_normalising_by_queries_takes_away_the_advantage_of_age() -> None:
    """With row 1 at 1.6: 1.75 > 1.6 as sums, but 1.75 / 6 queries < 1.6 / 5."""
    column = WEIGHTS.sum(dim=0)[None].clone()
    column[0, 1] = 1.6
    paper = H2O(kv_budget=4, num_sink_tokens=0)
    normalised = dataclasses.replace(paper, score_norm="query_count")

    assert paper.select(prompt(column), 4).tolist() == [[0, 2, 4, 5]]
    assert normalised.select(prompt(column), 4).tolist() == [[1, 2, 4, 5]]


def sums(weights: torch.Tensor, policy: KVPolicy, chunks: tuple[int, ...]) -> torch.Tensor:
    """What a prompt with these attention weights leaves behind: queries are the logarithms, keys the unit vectors."""
    query, key, staged = weights.log().clamp_min(-1e4), torch.eye(len(weights)), StagedPrompt(policy, max_model_len=9)
    start = 0
    for length in chunks:
        part = slice(start, start + length)
        staged.append(key[None, part], key[None, part], query[None, part], is_last=part.stop == len(weights))
        mask = torch.zeros(length, part.stop).masked_fill(weights[part, : part.stop] == 0, float("-inf"))
        found = column_sums(
            query[None, None, part],
            key[None, None, : part.stop],
            mask=mask[None, None],
            is_causal=False,
            scale=1.0,
            decay=policy.column_decay,
        )
        staged.add_column_sums(found[0])
        start += length
    column = staged.finish(1.0).column_sums
    assert column is not None
    return column


@pytest.mark.parametrize("chunks", [(6,), (4, 2), (1, 3, 1, 1)])
def test_decayed_sums_by_hand_however_the_prompt_is_cut(chunks: tuple[int, ...]) -> None:
    """Queries count 1/32, 1/16, 1/8, 1/4, 1/2, 1. Row 2: 0.7/8 + 0.6/4 + 0.5/2 + 0.4."""
    policy = H2O(score_norm="decayed", decay=0.5)
    by_hand = torch.tensor([[0.21875, 0.1625, 0.8875, 0.15, 0.25, 0.3]])

    torch.testing.assert_close(sums(WEIGHTS, policy, chunks), by_hand)
    torch.testing.assert_close(sums(WEIGHTS, H2O(), chunks), WEIGHTS.sum(dim=0)[None])


def test_decay_prefers_what_is_looked_at_now() -> None:
    """The last query looks at row 1: 0.169 < 0.213 decayed, though the plain sums are 1.70 and 1.05."""
    weights = WEIGHTS.clone()
    weights[5, :2] = torch.tensor([0.05, 0.10])
    paper = H2O(kv_budget=4, num_sink_tokens=0)
    decayed = dataclasses.replace(paper, score_norm="decayed", decay=0.5)

    assert paper.select(prompt(sums(weights, paper, (6,))), 4).tolist() == [[0, 2, 4, 5]]
    assert decayed.select(prompt(sums(weights, decayed, (6,))), 4).tolist() == [[1, 2, 4, 5]]


def test_each_head_keeps_its_own_heavy_hitters() -> None:
    column = torch.tensor([[5.0, 1.0, 1.1, 1.0, 0.1, 0.1], [1.0, 1.1, 1.0, 5.0, 0.1, 0.1]])

    kept = H2O(kv_budget=4, num_sink_tokens=0).select(prompt(column), 4)

    assert kept.tolist() == [[0, 2, 4, 5], [1, 3, 4, 5]]


def test_sinks_stay_however_light_they_are() -> None:
    column = torch.tensor([[0.0, 0.0, 5.0, 4.0, 3.0, 0.1, 0.1]])

    assert H2O(kv_budget=5, recent_fraction=0.4, num_sink_tokens=2).select(prompt(column), 5).tolist() == [
        [0, 1, 2, 5, 6]
    ]


def test_victim_is_the_lightest_row_outside_the_recent_window() -> None:
    policy = H2O(kv_budget=4, recent_fraction=0.5, num_sink_tokens=0)

    victims = policy.victims(rows([5, 0, 4, 2], [0.0, 1.75, 1.8, 2.2]), 1)

    assert victims.tolist() == [[[1]]]


def test_the_cache_advances_although_new_rows_weigh_nothing() -> None:
    policy = H2O(kv_budget=6, recent_fraction=0.5, num_sink_tokens=1)
    position, column = list(range(6)), [9.0, 8.0, 7.0, 0.0, 0.0, 0.0]
    for new in range(6, 20):
        (victim,) = policy.victims(rows(position, column), 1).flatten().tolist()
        position[victim], column[victim] = new, 0.0

        assert set(range(new - 2, new + 1)) <= set(position)
    assert sorted(position) == [0, 1, 2, 17, 18, 19]


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"kv_budget": 0}, "at least 1"),
        ({"kv_budget": 1.5}, "fraction"),
        ({"kv_budget": True}, "kv_budget"),
        ({"kv_budget": float("nan")}, "fraction"),
        ({"kv_budget": "many"}, "kv_budget"),
        ({"recent_fraction": 1.0}, "recent_fraction"),
        ({"recent_fraction": "half"}, "recent_fraction"),
        ({"num_sink_tokens": -1}, "num_sink_tokens"),
        ({"num_sink_tokens": 2.0}, "num_sink_tokens"),
        ({"score_norm": "softmax"}, "none, query_count, decayed"),
        ({"score_norm": "decayed"}, "both excluded, with score_norm"),
        ({"decay": 0.9}, "1.0 with others"),
        ({"score_norm": "decayed", "decay": 0.0}, "both excluded"),
        ({"score_norm": "decayed", "decay": float("nan")}, "both excluded"),
    ],
)
def test_wrong_knobs_are_refused_with_what_is_allowed(knobs: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        KV_POLICIES.create("h2o", **knobs)


def test_a_budget_that_protects_everything_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(ValueError, match="at least 9"):
        H2O(kv_budget=8, num_sink_tokens=4).budgets(num_layers=2, max_model_len=100)

import pytest
import torch

from codesign.engine.kv.policies.r_kv import RKV
from codesign.engine.kv.policy import Prompt, Rows

# Window of one query, no pooling, no sinks: small enough to work out by hand.
PLAIN = RKV(kv_budget=4, window_tokens=1, num_sink_tokens=0, kernel_size=1, importance_weight=0.5, buffer_tokens=2)


def prompt(key: list[list[float]], query: list[float]) -> Prompt:
    rows = torch.tensor([key])
    return Prompt(key=rows, value=rows, window_query=torch.tensor([[query]]), column_sums=None, scale=1.0)


@pytest.mark.parametrize("copies", [(0, 1, 2), (0, 1, 3)])
def test_of_three_equal_keys_the_oldest_goes_although_all_are_looked_at_alike(copies: tuple[int, ...]) -> None:
    """Zero logits, so blame decides: 2 for the first copy, 1 for the second, none for the newest and for the others."""
    others = iter(torch.eye(4)[1:].tolist())
    key = [[1.0, 0.0, 0.0, 0.0] if row in copies else next(others) for row in range(6)]

    assert PLAIN.select(prompt(key, [0.0, 0.0, 0.0, 0.0]), 5).tolist() == [[1, 2, 3, 4, 5]]
    assert PLAIN.select(prompt(key, [0.0, 0.0, 0.0, 0.0]), 4).tolist() == [[row for row in range(6) if row > 1]]


def test_importance_decides_where_nothing_is_said_twice() -> None:
    """Orthogonal keys: equal redundancy; the query looks at rows 1 and 3 most."""
    query = [0.0, 3.0, 1.0, 2.0, 0.0]

    assert PLAIN.select(prompt(torch.eye(5).tolist(), query), 3).tolist() == [[1, 3, 4]]


def rows(position: list[int], key: torch.Tensor, query: torch.Tensor, next_position: int) -> Rows:
    return Rows(
        position=torch.tensor([[position]], dtype=torch.int32),
        column=None,
        next_position=torch.tensor([next_position]),
        key=key[None, None],
        window_query=query[None],
        scale=1.0,
    )


def test_victims_come_worst_first_and_never_from_sinks_or_window() -> None:
    """Six orthogonal keys, rows unordered; sink 0 and the window, position 9, are looked at least."""
    policy = RKV(kv_budget=6, window_tokens=1, num_sink_tokens=1, kernel_size=1, importance_weight=1.0, buffer_tokens=3)
    query = torch.tensor([[[4.0, 0.0, 3.0, 0.0, 2.0, 1.0]]])

    victims = policy.victims(rows([7, 0, 3, 9, 5, 8], torch.eye(6), query, 10), 3)

    assert victims.tolist() == [[[5, 4, 2]]]


def test_max_pooling_keeps_the_neighbours_in_position_not_in_the_slot() -> None:
    """The query looks at position 5 (row 1); with a kernel of 3 its neighbours 4 and 6 (rows 4, 0) are spared."""
    policy = RKV(kv_budget=6, window_tokens=1, num_sink_tokens=0, kernel_size=3, importance_weight=1.0, buffer_tokens=2)
    query = torch.tensor([[[0.0, 3.0, 0.0, 0.0, 0.0, 0.0]]])

    victims = policy.victims(rows([6, 5, 2, 9, 4, 1], torch.eye(6), query, 10), 2)

    assert sorted(victims.flatten().tolist()) == [2, 5]


def test_query_heads_of_a_group_count_by_their_maximum() -> None:
    """Two query heads, logits (2, 0, 0) and (0, 1, 0) of the rows outside the window: row 2 is the one to go."""
    policy = RKV(kv_budget=4, window_tokens=1, num_sink_tokens=0, kernel_size=1, importance_weight=1.0, buffer_tokens=1)
    query = torch.tensor([[[2.0, 0.0, 0.0, 9.0]], [[0.0, 1.0, 0.0, 9.0]]])

    assert policy.victims(rows([0, 1, 2, 3], torch.eye(4), query, 4), 1).tolist() == [[[2]]]


def test_buffer_is_what_the_budget_has_room_for() -> None:
    policy = RKV(buffer_tokens=128, window_tokens=8, num_sink_tokens=4)

    assert policy.lookahead(1024) == 128
    assert policy.lookahead(100) == policy.evictable(100) == 88


def test_a_budget_that_protects_everything_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(ValueError, match=r"r_kv: .* allow at least 13"):
        RKV(kv_budget=12).budgets(num_layers=2, max_model_len=100)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"kv_budget": 0}, "kv_budget"),
        ({"importance_weight": 1.5}, "between 0.0 and 1.0"),
        ({"importance_weight": float("nan")}, "importance_weight"),
        ({"buffer_tokens": 0}, "buffer_tokens"),
        ({"window_tokens": 0}, "window_tokens"),
        ({"kernel_size": 4}, "odd"),
        ({"similarity_threshold": 1.0}, "both excluded"),
        ({"num_sink_tokens": -1}, "num_sink_tokens"),
    ],
)
def test_wrong_knobs_are_refused_with_what_is_allowed(knobs: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RKV(**knobs)  # type: ignore[arg-type]

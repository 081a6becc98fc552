import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codesign.engine.kv.policies.ada_kv import AdaKV
from codesign.engine.kv.policies.snapkv import SnapKV
from codesign.engine.kv.policy import Prompt

PLAIN = AdaKV(kv_budget=3, window_tokens=1, num_sink_tokens=0, kernel_size=1, floor_fraction=0.0)


def prompt(*logits: list[float]) -> Prompt:
    """One query per KV head, whose logits over the rows are given; the last row is the window."""
    key = torch.tensor(logits)[:, :, None]
    query = torch.ones(len(logits), 1, 1)
    return Prompt(key=key, value=key, window_query=query, column_sums=None, scale=1.0)


def by_head(kept: torch.Tensor, num_tokens: int, num_heads: int = 2) -> list[list[int]]:
    return [[row % num_tokens for row in kept.tolist() if row // num_tokens == head] for head in range(num_heads)]


def test_a_head_that_looks_at_one_row_gives_its_budget_to_one_that_looks_at_many() -> None:
    """Head 0 gives row 1 97 % of its attention, 0.7 % to others; head 1 gives every row 13 to 20 %."""
    narrow, wide = [0.0, 5.0, 0.0, 0.0, 0.0, 0.0], [0.4, 0.3, 0.2, 0.1, 0.0, 0.0]

    assert by_head(PLAIN.select(prompt(narrow, wide), 3), 6) == [[1, 5], [0, 1, 2, 5]]


def test_the_floor_is_a_heads_own_however_low_its_scores_are() -> None:
    """Head 0 spreads 14 to 20 %, head 1 puts 45 % on each of rows 0 and 1; two rows beside the windows."""
    thin, sharp = [0.3, 0.2, 0.1, 0.0, 0.0, 0.0], [3.0, 3.1, 0.0, 0.0, 0.0, 0.0]
    floored = AdaKV(kv_budget=2, window_tokens=1, num_sink_tokens=0, kernel_size=1, floor_fraction=1.0)

    assert by_head(PLAIN.select(prompt(thin, sharp), 2), 6) == [[5], [0, 1, 5]]
    assert by_head(floored.select(prompt(thin, sharp), 2), 6) == [[0, 5], [1, 5]]


def random_prompt(seed: int, num_tokens: int, window: int, num_heads: int = 3) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    key = 2 * torch.randn(num_heads, num_tokens, 4, generator=generator)
    query = torch.randn(2 * num_heads, window, 4, generator=generator)
    return Prompt(key=key, value=key, window_query=query, column_sums=None, scale=1.0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    budget=st.integers(8, 39),
    floor_fraction=st.floats(0, 1),
    window=st.integers(1, 5),
    sinks=st.integers(0, 2),
)
def test_budget_of_the_layer_is_exact_and_no_head_falls_below_its_floor(
    seed: int, budget: int, floor_fraction: float, window: int, sinks: int
) -> None:
    policy = AdaKV(kv_budget=budget, window_tokens=window, num_sink_tokens=sinks, floor_fraction=floor_fraction)
    asked = random_prompt(seed, 40, window)
    kept = policy.select(asked, budget)
    heads = by_head(kept, 40, 3)

    assert (kept[1:] > kept[:-1]).all() and len(kept) == 3 * budget
    least = window + sinks + int(floor_fraction * (budget - window - sinks))
    for head, rows in enumerate(heads):
        assert least <= len(rows) <= 40
        assert {*range(sinks), *range(40 - window, 40)} <= set(rows)
        score = policy.score(asked)[head]
        dropped = [row for row in range(40) if row not in rows]
        assert not dropped or min(score[rows]) >= max(score[dropped]), "a head keeps its own best rows"


def test_with_everything_safe_it_is_snapkv() -> None:
    knobs = {"kv_budget": 20, "window_tokens": 4, "num_sink_tokens": 2}
    asked = random_prompt(0, 50, 4)
    equal = SnapKV(**knobs).select(asked, 20)

    kept = AdaKV(**knobs, floor_fraction=1.0).select(asked, 20)  # type: ignore[arg-type]

    assert by_head(kept, 50, 3) == equal.tolist()


def test_a_budget_that_protects_everything_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(ValueError, match=r"ada_kv: .* allow at least 37"):
        AdaKV(kv_budget=36).budgets(num_layers=2, max_model_len=100)


@pytest.mark.parametrize("floor_fraction", [-0.1, 1.5, float("nan"), 1, "half"])
def test_wrong_floors_are_refused_with_what_is_allowed(floor_fraction: float) -> None:
    with pytest.raises(ValueError, match=r"floor_fraction must be between 0.0 and 1.0"):
        AdaKV(floor_fraction=floor_fraction)

import dataclasses

import numpy as np
import pytest
import torch

from codesign.engine.kv.policies.pyramidkv import PyramidKV
from codesign.engine.kv.policies.snapkv import SnapKV
from codesign.engine.kv.policy import Prompt, Rows


def snapkv_prompt(num_tokens: int, window: int, *, num_groups: int = 2, seed: int = 0) -> tuple[Prompt, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(2, num_tokens, 8, generator=generator)
    query = torch.randn(2 * num_groups, window, 8, generator=generator)
    return Prompt(key=key, value=key, window_query=query, column_sums=None, scale=0.7), query


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_selection_agrees_with_a_slow_oracle(kernel_size: int) -> None:
    num_tokens, window, budget, sinks = 60, 6, 24, 3
    policy = SnapKV(kv_budget=budget, window_tokens=window, kernel_size=kernel_size, num_sink_tokens=sinks)
    prompt, query = snapkv_prompt(num_tokens, window)

    kept = policy.select(prompt, budget)

    for head in range(2):
        received = np.zeros(num_tokens - window)
        for member in (2 * head, 2 * head + 1):
            for step in range(window):
                seen = num_tokens - window + step + 1
                score = (prompt.key[head, :seen].double() @ query[member, step].double() * 0.7).numpy()
                weight = np.exp(score) / np.exp(score).sum()
                received += weight[: num_tokens - window]
        half = kernel_size // 2
        padded = np.pad(received, half)
        pooled = [padded[row : row + kernel_size].mean() for row in range(len(received))]
        ranked = sorted(range(sinks, num_tokens - window), key=lambda row, pooled=pooled: -pooled[row])
        chosen = {*range(sinks), *range(num_tokens - window, num_tokens), *ranked[: budget - window - sinks]}
        assert kept[head].tolist() == sorted(chosen)


def test_output_tokens_live_in_the_window_and_the_selected_prompt_rows_stay() -> None:
    policy = SnapKV(kv_budget=8, window_tokens=3, num_sink_tokens=1, kernel_size=1)
    position = torch.tensor([[[0, 7, 9, 21, 40, 57, 58, 59]]], dtype=torch.int32)
    for new in range(60, 75):
        rows = Rows(position=position, column=None, next_position=torch.tensor([new]))
        position.scatter_(2, policy.victims(rows, 1), new)

    assert sorted(position.flatten().tolist()) == [0, 7, 9, 21, 40, 72, 73, 74]


@pytest.mark.parametrize("num_victims", [1, 3, 5])
def test_victims_are_the_oldest_of_the_newest_window_wherever_rows_lie(num_victims: int) -> None:
    generator = torch.Generator().manual_seed(0)
    position = torch.stack([torch.randperm(90, generator=generator)[:40] for _ in range(6)]).view(3, 2, 40).int()
    rows = Rows(position=position, column=None, next_position=torch.tensor([90] * 3))
    named = SnapKV(kv_budget=40, window_tokens=5).victims(rows, num_victims)

    assert torch.equal(position.gather(2, named), position.sort(dim=-1).values[..., 35 : 35 + num_victims])


@pytest.mark.parametrize("window", [1, 5, 32])
def test_pyramidkv_without_steepness_is_snapkv_bit_for_bit(window: int) -> None:
    knobs = {"kv_budget": 40, "window_tokens": window, "num_sink_tokens": 2, "kernel_size": 3}
    snapkv, flat = SnapKV(**knobs), PyramidKV(**knobs, beta=1)
    prompt, _ = snapkv_prompt(90, window)
    position = torch.randperm(40, generator=torch.Generator().manual_seed(1)).to(torch.int32).expand(2, 2, -1)
    rows = Rows(position=position, column=None, next_position=torch.tensor([40, 40]))

    assert flat.budgets(num_layers=7, max_model_len=512) == snapkv.budgets(num_layers=7, max_model_len=512)
    assert torch.equal(flat.select(prompt, 40), snapkv.select(prompt, 40))
    assert torch.equal(flat.victims(rows, 1), snapkv.victims(rows, 1))


def test_budget_is_the_same_in_every_layer() -> None:
    assert SnapKV(kv_budget=0.25).budgets(num_layers=3, max_model_len=1024) == (256, 256, 256)


def test_the_row_that_the_last_queries_look_at_is_kept() -> None:
    """One key of ten points where both window queries look; the others get the same small weight each."""
    key = torch.zeros(1, 10, 2)
    key[0, 4, 0] = 5.0
    query = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    prompt = Prompt(key=key, value=key, window_query=query, column_sums=None, scale=1.0)

    kept = SnapKV(kv_budget=4, window_tokens=2, kernel_size=1, num_sink_tokens=1).select(prompt, 4)

    assert kept.tolist() == [[0, 4, 8, 9]]


def test_query_heads_of_a_group_share_one_set_of_rows() -> None:
    prompt, _ = snapkv_prompt(60, 6, num_groups=4)

    assert SnapKV(kv_budget=24, window_tokens=6).select(prompt, 24).shape == (2, 24)


def test_a_budget_that_protects_everything_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(ValueError, match=r"snapkv: .* allow at least 37"):
        SnapKV(kv_budget=36).budgets(num_layers=2, max_model_len=100)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"kv_budget": 0}, "kv_budget"),
        ({"kernel_size": 4}, "odd"),
        ({"window_tokens": 0}, "window_tokens"),
        ({"num_sink_tokens": -1}, "num_sink_tokens"),
    ],
)
def test_wrong_knobs_are_refused_with_what_is_allowed(knobs: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(SnapKV(), **knobs)

import pytest
import torch

from codesign.engine.kv.policies.streaming_llm import StreamingLLM
from codesign.engine.kv.policy import Prompt, Rows


def test_prompt_keeps_sinks_and_the_newest_rows() -> None:
    key = torch.zeros(2, 20, 4)
    prompt = Prompt(key=key, value=key, window_query=None, column_sums=None, scale=1.0)

    kept = StreamingLLM(kv_budget=7, num_sink_tokens=3).select(prompt, 7)

    assert kept.tolist() == [[0, 1, 2, 16, 17, 18, 19]] * 2


def test_victims_are_the_oldest_rows_outside_the_sinks() -> None:
    position = torch.tensor([[[12, 0, 10, 1, 11]]], dtype=torch.int32)
    rows = Rows(position=position, column=None, next_position=torch.tensor([13]))

    victims = StreamingLLM(kv_budget=5, num_sink_tokens=2).victims(rows, 2)

    assert position[0, 0, victims[0, 0]].tolist() == [10, 11]


def test_a_fraction_is_a_share_of_max_model_len() -> None:
    assert StreamingLLM(kv_budget=0.1).budgets(num_layers=2, max_model_len=2048) == (205, 205)


def test_a_budget_beyond_max_model_len_keeps_everything() -> None:
    assert StreamingLLM(kv_budget=10_000).budgets(num_layers=1, max_model_len=2048) == (2048,)


def test_a_budget_of_sinks_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"allow at least 5"):
        StreamingLLM(kv_budget=4).budgets(num_layers=1, max_model_len=2048)

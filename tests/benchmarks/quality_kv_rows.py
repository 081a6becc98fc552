"""Which rows a policy keeps of a prompt: why it does or does not answer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from codesign.engine.attention.layer import Attention
from codesign.engine.engine import Engine
from codesign.engine.score import score

NUM_SINKS = 4


def kept_rows(engine: Engine, items: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Of each prompt, at its end, averaged over layers and KV heads.

    Returns:
        answer: share of the rows of the answer's told tokens that are kept.
        depth: mean place, 0 first and 1 last, of the kept rows that are neither sinks nor in the newest half.

    Args:
        engine: with one slot, whose heads keep equally many rows.
    """
    pairs = [_of_prompt(engine, item["prompt"], item["answer"]) for item in items]
    return {"answer": [answer for answer, _ in pairs], "depth": [depth for _, depth in pairs]}


def _of_prompt(engine: Engine, prompt: list[int], answer: list[int]) -> tuple[float, float]:
    told = next(start for start in range(len(prompt)) if prompt[start : start + len(answer)] == answer)
    shares, depths = [], []

    def on_logits(index: int, position: int, logits: Tensor) -> None:
        if position == len(prompt) - 1:
            for kept in _positions(engine, len(prompt)):
                is_answer = (kept >= told) & (kept < told + len(answer))
                shares.append(is_answer.sum(-1).flatten() / len(answer))
                older = kept.sort(dim=-1).values[..., NUM_SINKS : kept.shape[-1] // 2]
                depths.append(older.float().mean(-1).flatten() / len(prompt))

    score(engine, [[*prompt, *answer]], num_prefill=len(prompt), on_logits=on_logits)
    return float(torch.cat(shares).mean()), float(torch.cat(depths).mean())


def _positions(engine: Engine, num_tokens: int) -> list[Tensor]:
    """[L, H_kv, R] of each group of layers: positions of the rows in slot 0."""
    attention = engine.parts.attention
    assert isinstance(attention, Attention), "all slots under one policy"
    groups = attention.store.groups
    return [group.position[:, 0, :, : group.rows_after(num_tokens)] for group in groups]

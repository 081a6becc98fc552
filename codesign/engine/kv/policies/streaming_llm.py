"""streaming_llm: the first tokens (attention sinks) and the newest ones; whatever lies between is forgotten.

Positions are assigned inside the cache: once rows are gone, a query sees the sinks at cache distance, not at their
true distance. It streams without end; it neither extends the context nor finds what it evicted.

StreamingLLM (Xiao et al., 2023), https://arxiv.org/abs/2309.17453. Departs from the paper: the prompt attends in full
and is cut when it ends, so that prefill is the same for every policy.
Cost: the sink keys are turned at each step, nothing else.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from codesign.engine.kv.budget import check_kv_budget, check_room, check_tokens
from codesign.engine.kv.policy import KeySpace, KVPolicy, Prompt, Rows
from codesign.spec.kv_budget import kv_budget_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(KVPolicy):
    """Args:
    kv_budget: tokens kept per layer and head, sinks included, or a fraction of max_model_len.
    num_sink_tokens: first tokens that are never evicted.
    """

    key_space: ClassVar[KeySpace] = "pre_rope"

    kv_budget: int | float = 0.25
    num_sink_tokens: int = 4

    def __post_init__(self) -> None:
        check_kv_budget(self.kv_budget)
        check_tokens("num_sink_tokens", self.num_sink_tokens)

    def budgets(self, *, num_layers: int, max_model_len: int) -> tuple[int, ...]:
        tokens = kv_budget_tokens(self.kv_budget, max_model_len)
        check_room("streaming_llm", self.kv_budget, tokens, self.num_sink_tokens, max_model_len)
        return (tokens,) * num_layers

    def evictable(self, budget: int) -> int:
        return budget - self.num_sink_tokens

    def select(self, prompt: Prompt, num_rows: int) -> Tensor:
        num_heads, num_tokens, _ = prompt.key.shape
        row = torch.arange(num_rows, device=prompt.key.device)
        kept = torch.where(row < self.num_sink_tokens, row, row + num_tokens - num_rows)
        return kept.expand(num_heads, -1)

    def victims(self, rows: Rows, num_victims: int) -> Tensor:
        newest = torch.iinfo(rows.position.dtype).max
        age_order = rows.position.masked_fill(rows.position < self.num_sink_tokens, newest)
        return age_order.topk(num_victims, largest=False).indices

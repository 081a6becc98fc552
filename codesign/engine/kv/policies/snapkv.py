"""snapkv: the prompt rows that the last queries look at, equally many in every layer.

Softmax of the last `window_tokens` queries over all keys, mean over them and over the query group, average-pooled so
that neighbourhoods stay together, top rows per KV head; sinks and window rows always stay.

SnapKV (Li et al., 2024), https://arxiv.org/abs/2404.14469. Departs from the paper: sinks are pinned, and the budget
also holds after the prompt. There, output tokens live in the window: a new row takes the place of the oldest of the
newest `window_tokens` rows, and the rows selected from the prompt stay. (A token that leaves the window was never
scored by prompt queries; ranked with the prompt rows it would be the first to go.)
"""

import dataclasses
from typing import ClassVar

from torch import Tensor

from codesign.engine.kv.budget import check_kv_budget, check_room, check_tokens
from codesign.engine.kv.policy import Evidence, KVPolicy, Prompt, Rows
from codesign.engine.kv.window_scores import snapkv_scores
from codesign.spec.kv_budget import kv_budget_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(KVPolicy):
    """Args:
    kv_budget: tokens kept per layer and head, or a fraction of max_model_len.
    window_tokens: last prompt queries that score, and newest rows that always stay.
    kernel_size: of the average pooling over neighbouring rows, odd; 1 pools nothing.
    num_sink_tokens: first tokens that are never evicted (the paper pins none).
    """

    evidence: ClassVar[Evidence] = "window_queries"

    kv_budget: int | float = 0.25
    window_tokens: int = 32
    kernel_size: int = 5
    num_sink_tokens: int = 4

    def __post_init__(self) -> None:
        check_kv_budget(self.kv_budget)
        check_tokens("window_tokens", self.window_tokens, least=1)
        check_tokens("kernel_size", self.kernel_size, least=1)
        check_tokens("num_sink_tokens", self.num_sink_tokens)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")

    def budgets(self, *, num_layers: int, max_model_len: int) -> tuple[int, ...]:
        tokens = kv_budget_tokens(self.kv_budget, max_model_len)
        check_room("snapkv", self.kv_budget, tokens, self.num_protected, max_model_len)
        return (tokens,) * num_layers

    @property
    def num_protected(self) -> int:
        return self.window_tokens + self.num_sink_tokens

    def evictable(self, budget: int) -> int:
        return self.window_tokens

    def score(self, prompt: Prompt) -> Tensor:
        """[H_kv, T], higher is kept; sinks and window score +inf."""
        assert prompt.window_query is not None
        score = snapkv_scores(prompt.window_query, prompt.key, scale=prompt.scale, kernel_size=self.kernel_size)
        score[:, : self.num_sink_tokens] = float("inf")
        return score

    def select(self, prompt: Prompt, num_rows: int) -> Tensor:
        return self.score(prompt).topk(num_rows).indices.sort().values

    def victims(self, rows: Rows, num_victims: int) -> Tensor:
        newest_first = rows.position.topk(self.window_tokens).indices
        return newest_first[..., self.window_tokens - num_victims :].flip(-1)

"""r_kv: while output is generated, drop what is both little looked at and said again elsewhere.

    importance   I = max-pooled mean over the last `window_tokens` queries of softmax_j(max over the group of q k_j)
    redundancy   R = softmax_j(mean cosine similarity of k_j to all keys, the newest of near-duplicates spared)
    keep the highest  Z = importance_weight · I - (1 - importance_weight) · R      sinks and window rows always stay

Rows are scored once in `buffer_tokens` tokens: reasoning output repeats itself for thousands of tokens, which sums of
attention (h2o) do not see.

R-KV (Cai et al., 2025), https://arxiv.org/abs/2505.24133. Departs from the paper: there the cache grows by the buffer
and is then cut; here the budget includes the buffer, and a row that is to go is read until a new one takes its place:
the budget is always used and never exceeded. Sinks are pinned. Of the rows that resemble a row only the newest is
spared (as in the released code, which also spares row 0 where nothing resembles a row).
Cost: a ring of the last queries, and R² cosines per KV head once per buffer; a prompt of T tokens that is cut, T².
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from codesign.engine.kv.budget import check_kv_budget, check_room, check_tokens
from codesign.engine.kv.policy import Evidence, KVPolicy, Prompt, Rows
from codesign.engine.kv.redundancy import key_redundancy
from codesign.spec.kv_budget import kv_budget_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class RKV(KVPolicy):
    """Args:
    kv_budget: tokens kept per layer and head, buffer included, or a fraction of max_model_len.
    importance_weight: of importance against redundancy, in [0, 1]; lambda in the paper.
    buffer_tokens: rows that go between two scorings; fewer where the budget has not as many.
    window_tokens: last queries that score, and newest rows that always stay.
    kernel_size: of the max pooling of importance over neighbouring rows, odd; 1 pools nothing.
    similarity_threshold: cosine above which two keys are near-duplicates, in (0, 1).
    num_sink_tokens: first tokens that are never evicted (the paper pins none).
    """

    evidence: ClassVar[Evidence] = "window_queries"
    needs_keys: ClassVar[bool] = True

    kv_budget: int | float = 0.25
    importance_weight: float = 0.1
    buffer_tokens: int = 128
    window_tokens: int = 8
    kernel_size: int = 7
    similarity_threshold: float = 0.5
    num_sink_tokens: int = 4

    def __post_init__(self) -> None:
        check_kv_budget(self.kv_budget)
        check_tokens("buffer_tokens", self.buffer_tokens, least=1)
        check_tokens("window_tokens", self.window_tokens, least=1)
        check_tokens("kernel_size", self.kernel_size, least=1)
        check_tokens("num_sink_tokens", self.num_sink_tokens)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        if not isinstance(self.importance_weight, float) or not 0 <= self.importance_weight <= 1:
            raise ValueError(f"importance_weight must be between 0.0 and 1.0, got {self.importance_weight!r}")
        if not isinstance(self.similarity_threshold, float) or not 0 < self.similarity_threshold < 1:
            raise ValueError(
                f"similarity_threshold must be between 0 and 1, both excluded, got {self.similarity_threshold!r}"
            )

    def budgets(self, *, num_layers: int, max_model_len: int) -> tuple[int, ...]:
        tokens = kv_budget_tokens(self.kv_budget, max_model_len)
        check_room("r_kv", self.kv_budget, tokens, self.window_tokens + self.num_sink_tokens, max_model_len)
        return (tokens,) * num_layers

    def evictable(self, budget: int) -> int:
        return budget - self.window_tokens - self.num_sink_tokens

    def lookahead(self, budget: int) -> int:
        return min(self.buffer_tokens, self.evictable(budget))

    def select(self, prompt: Prompt, num_rows: int) -> Tensor:
        assert prompt.window_query is not None
        key, query = prompt.key[None], prompt.window_query[None]
        num_tokens = key.shape[2]
        position = torch.arange(num_tokens, dtype=torch.int32, device=key.device).expand(key.shape[:3])
        score = self._score(key, position, query, torch.tensor([num_tokens], device=key.device), prompt.scale)
        return score[0].topk(num_rows).indices.sort().values

    def victims(self, rows: Rows, num_victims: int) -> Tensor:
        assert rows.key is not None and rows.window_query is not None and rows.scale is not None
        score = self._score(rows.key, rows.position, rows.window_query, rows.next_position, rows.scale)
        return score.topk(num_victims, largest=False).indices

    def _score(self, key: Tensor, position: Tensor, query: Tensor, next_position: Tensor, scale: float) -> Tensor:
        """[B, H_kv, R], higher is kept, protected rows +inf; key [B, H_kv, R, D], query [B, H, W, D] of the window."""
        is_window = position >= next_position[:, None, None] - self.window_tokens
        num_batch, num_kv_heads, num_rows, head_dim = key.shape
        grouped = query.float().reshape(num_batch, num_kv_heads, -1, head_dim)
        logit = (grouped @ key.float().mT * scale).view(num_batch, num_kv_heads, -1, self.window_tokens, num_rows)
        weight = logit.amax(dim=2).masked_fill(is_window[:, :, None], float("-inf")).softmax(dim=-1).mean(dim=2)
        age_order = position.argsort(dim=-1)
        in_order = weight.gather(-1, age_order)
        pooled = max_pool1d(in_order, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        importance = torch.empty_like(weight).scatter_(-1, age_order, pooled)
        redundancy = key_redundancy(key, position, threshold=self.similarity_threshold)
        score = self.importance_weight * importance - (1 - self.importance_weight) * redundancy
        return score.masked_fill(is_window | (position < self.num_sink_tokens), float("inf"))

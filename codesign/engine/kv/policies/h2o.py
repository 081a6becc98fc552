"""h2o: the newest tokens, and among the others the heavy hitters, those that have received most attention so far.

    S_j = Σ_i P_ij over the queries of the prompt and of every accepted output token, mean over the query group
    full: evict argmin S_j outside the sinks and the recent window, per KV head; no re-admission

Without the protected window a new token, whose sum is still small, would be evicted at once and the cache would freeze
on the prompt.

A plain sum favours old tokens: they were there to be looked at more often. `score_norm` says what is compared:

    none          S_j
    query_count   S_j / (queries that could see row j)
    decayed       Σ_i decay^(n - i) P_ij after n accepted queries: S_j is multiplied by `decay` as each query, prompt or
                  output, is accepted, then the query's own weights are added

H2O (Zhang et al., 2023), https://arxiv.org/abs/2306.14048; decayed: A2SF (Jo and Shin, 2024),
https://arxiv.org/abs/2407.20485. Departs from the papers: the prompt attends in full and is cut when it ends; sinks can
be pinned; mean over the query group. Cost: fused attention shows no weights, so every query of a prompt pays a second
q kᵀ, and so does every output token where no compiled kernel reads the cache.
"""

import dataclasses
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from codesign.engine.kv.budget import check_kv_budget, check_room, check_tokens
from codesign.engine.kv.policy import Evidence, KVPolicy, Prompt, Rows
from codesign.spec.kv_budget import kv_budget_tokens

ScoreNorm = Literal["none", "query_count", "decayed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(KVPolicy):
    """Args:
    kv_budget: tokens kept per layer and head, or a fraction of max_model_len.
    recent_fraction: share of the budget that the newest tokens hold for sure, in (0, 1).
    num_sink_tokens: first tokens that are never evicted (the paper pins none).
    score_norm: "none" is the paper's sum, "query_count" a mean, "decayed" forgets.
    decay: share of the sums that is left after one more query: in (0, 1) with "decayed", 1 otherwise. Half is
        forgotten after log(1/2) / log(decay) tokens: 69 at 0.99.
    """

    evidence: ClassVar[Evidence] = "column_sums"

    kv_budget: int | float = 0.25
    recent_fraction: float = 0.5
    num_sink_tokens: int = 4
    score_norm: ScoreNorm = "none"
    decay: float = 1.0

    def __post_init__(self) -> None:
        check_kv_budget(self.kv_budget)
        check_tokens("num_sink_tokens", self.num_sink_tokens)
        if not isinstance(self.recent_fraction, float) or not 0 < self.recent_fraction < 1:
            raise ValueError(f"recent_fraction must be between 0 and 1, both excluded, got {self.recent_fraction!r}")
        if self.score_norm not in get_args(ScoreNorm):
            raise ValueError(f"score_norm must be one of {', '.join(get_args(ScoreNorm))}, got {self.score_norm!r}")
        is_decayed = self.score_norm == "decayed"
        if not isinstance(self.decay, float) or not (0 < self.decay < 1 if is_decayed else self.decay == 1):
            raise ValueError(
                f'decay must be between 0 and 1, both excluded, with score_norm "decayed" and 1.0 with others, got '
                f"{self.decay!r} with {self.score_norm!r}"
            )

    @property
    def column_decay(self) -> float:
        return self.decay

    def recent_tokens(self, budget: int) -> int:
        """Newest tokens that are protected: the rounded share of the budget, at least one."""
        return max(1, int(budget * self.recent_fraction + 0.5))

    def budgets(self, *, num_layers: int, max_model_len: int) -> tuple[int, ...]:
        tokens = kv_budget_tokens(self.kv_budget, max_model_len)
        protected = self.num_sink_tokens + self.recent_tokens(tokens)
        check_room("h2o", self.kv_budget, tokens, protected, max_model_len)
        return (tokens,) * num_layers

    def evictable(self, budget: int) -> int:
        return budget - self.num_sink_tokens - self.recent_tokens(budget)

    def select(self, prompt: Prompt, num_rows: int) -> Tensor:
        assert prompt.column_sums is not None
        position = torch.arange(prompt.key.shape[1], device=prompt.key.device)
        score = self._score(prompt.column_sums, position, prompt.key.shape[1], num_rows)
        return score.topk(num_rows).indices.sort().values

    def victims(self, rows: Rows, num_victims: int) -> Tensor:
        assert rows.column is not None
        num_tokens = rows.next_position[:, None, None] + num_victims  # the new rows are the newest of the window
        score = self._score(rows.column, rows.position, num_tokens, rows.position.shape[-1])
        return score.topk(num_victims, largest=False).indices

    def _score(self, column: Tensor, position: Tensor, num_tokens: Tensor | int, budget: int) -> Tensor:
        """Higher is kept; protected rows score +inf."""
        if self.score_norm == "query_count":
            column = column / (num_tokens - position)
        is_recent = position >= num_tokens - self.recent_tokens(budget)
        return column.masked_fill((position < self.num_sink_tokens) | is_recent, float("inf"))

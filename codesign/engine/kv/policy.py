"""KVPolicy: which rows of the cache stay. One file below `policies/` per policy.

A policy never touches storage. It says how many rows a layer keeps (from lengths only), which rows of a finished
prompt to keep, and which rows to overwrite when the budget is full. All decisions are per KV head.

`key_space` says where a row stands when a query looks at it. "rotated": at its true position. "pre_rope": at its rank
among the kept rows, and so does the query, so distances shrink to cache distances once rows are gone (StreamingLLM).
Such a policy keeps its first `num_sink_tokens` tokens and an unbroken tail of the newest ones. Inside the tail, ranks
and positions differ by one constant, and RoPE sees only differences: the store keeps tail keys rotated at their true
positions and turns only the sink keys, from unrotated copies, at each step.
"""

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

KeySpace = Literal["rotated", "pre_rope"]
Evidence = Literal["none", "window_queries", "column_sums"]
HeadBudgets = Literal["equal", "ragged"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a policy may look at when a prompt has just ended, for one sequence and one layer.

    Attributes:
        key: [H_kv, T, D] rotated at its true position, native precision, row index == position.
        value: [H_kv, T, D].
        window_query: [H, W, D] rotated queries of the last W = min(window, T) prompt tokens, or None
            (only with `evidence = "window_queries"`).
        column_sums: [H_kv, T] fp32, attention mass each row received from all prompt queries, summed over the queries
            (query i of T counts `column_decay` ** (T - 1 - i)) and averaged over the GQA group, or None (only with
            `evidence = "column_sums"`).
        scale: softmax scale of the attention.
    """

    key: Tensor
    value: Tensor
    window_query: Tensor | None
    column_sums: Tensor | None
    scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Committed rows of B slots of one layer, for deciding what to overwrite.

    Attributes:
        position: [B, H_kv, R] int32 logical positions, unordered.
        column: [B, H_kv, R] fp32 accumulated attention mass, or None unless `evidence = "column_sums"`.
        next_position: [B] position of the first row about to be committed.
        key: [B, H_kv, R, D] as they are stored, or None unless `needs_keys`; so are the next two.
        window_query: [B, H, W, D] rotated queries of the W = window_tokens positions before `next_position`.
        scale: softmax scale of the attention.
    """

    position: Tensor
    column: Tensor | None
    next_position: Tensor
    key: Tensor | None = None
    window_query: Tensor | None = None
    scale: float | None = None


class KVPolicy(ABC):
    """The protocol. Members are frozen dataclasses of knobs; every bounded one has `kv_budget`."""

    key_space: ClassVar[KeySpace] = "rotated"
    evidence: ClassVar[Evidence] = "none"
    needs_keys: ClassVar[bool] = False  # `victims` looks at keys and recent queries; with evidence "window_queries"

    head_budgets: ClassVar[HeadBudgets] = "equal"  # "ragged": a prompt's rows are split over the KV heads by values

    @property
    def window_tokens(self) -> int:
        """How many of the newest queries are shown: to `select` with `evidence = "window_queries"`, to `victims` with
        `needs_keys`."""
        return 0

    @property
    def column_decay(self) -> float:
        """What is left of all attention mass so far when one more query is accepted (`evidence = "column_sums"`)."""
        return 1.0

    @property
    def num_sink_tokens(self) -> int:
        """How many first tokens are never evicted; with `key_space = "pre_rope"` their keys are turned at each step."""
        return 0

    def slot_policies(self, num_slots: int) -> "tuple[tuple[int, KVPolicy], ...]":
        """(how many slots, their policy), slot after slot, from the first; this one for all of them by default."""
        return ((num_slots, self),)

    @abstractmethod
    def budgets(self, *, num_layers: int, max_model_len: int) -> tuple[int, ...]:
        """[num_layers] most rows kept per KV head in each layer, each in 1..max_model_len.

        A fraction means that share of `max_model_len`. `capacity(layer, n)` is `min(n, budgets[layer])` for every
        policy: how many rows exist depends on lengths only.

        Raises:
            ValueError: a budget that is too small for what the policy protects; the text says the least.
        """

    def evictable(self, budget: int) -> int:
        """How many of `budget` rows `victims` may name at once: those outside sinks and the protected window."""
        raise NotImplementedError  # an unbounded policy is never asked

    def lookahead(self, budget: int) -> int:
        """How many victims to name at once, at most `evictable(budget)`; 1: as many as each commit overwrites."""
        return 1

    def select(self, prompt: Prompt, num_rows: int) -> Tensor:
        """[H_kv, num_rows] int64 row indices to keep, ascending and distinct; called only when num_rows < T.

        With `head_budgets = "ragged"`: [H_kv * num_rows] indices into the flattened [H_kv, T], ascending and distinct;
        of each head at least the newest `evictable(num_rows)` rows, in which its output tokens will live.
        """
        raise NotImplementedError  # an unbounded policy is never asked

    def victims(self, rows: Rows, num_victims: int) -> Tensor:
        """[B, H_kv, num_victims] int64 indices into R, distinct per head; called only when the budget is full.

        Never names a row newer than the protected recent window of the policy. With `head_budgets = "ragged"` only the
        newest `evictable` rows of each head are shown: R is their number.
        """
        raise NotImplementedError  # an unbounded policy is never asked

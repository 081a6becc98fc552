"""ada_kv: snapkv whose budget is shared by the KV heads of a layer; heads that look at many rows keep more of them.

    every head keeps sinks, window, and the best floor_fraction · (budget - sinks - window) of its own rows
    what is left of H_kv · budget goes to the highest SnapKV scores of all heads together

Heads keep different numbers of rows, in the memory of equal ones (`kv/ragged.py`). Output tokens live in the window, as
in snapkv.

Ada-KV (Feng et al., 2024), https://arxiv.org/abs/2407.11550. Departs from the paper as snapkv does, and in the
safeguard: there a head's share is alpha · its rows in the joint top + (1 - alpha) · budget, rounded; here, as in
kvpress, its best rows are safe and the others compete: the sum is exact, and what is kept is the joint top.
Cost: without the compiled kernel one attention call per slot and KV head while output is generated.
"""

import dataclasses
from typing import ClassVar

from torch import Tensor

from codesign.engine.kv.budget import check_room
from codesign.engine.kv.policies.snapkv import SnapKV
from codesign.engine.kv.policy import HeadBudgets, Prompt
from codesign.spec.kv_budget import kv_budget_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """Args:
    kv_budget: tokens kept per layer and head, mean over the heads, or a fraction of max_model_len.
    floor_fraction: share of the budget beside sinks and window that no head can lose, in [0, 1]; 1 is snapkv.
    """

    head_budgets: ClassVar[HeadBudgets] = "ragged"

    floor_fraction: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.floor_fraction, float) or not 0 <= self.floor_fraction <= 1:
            raise ValueError(f"floor_fraction must be between 0.0 and 1.0, got {self.floor_fraction!r}")

    def budgets(self, *, num_layers: int, max_model_len: int) -> tuple[int, ...]:
        tokens = kv_budget_tokens(self.kv_budget, max_model_len)
        check_room("ada_kv", self.kv_budget, tokens, self.num_protected, max_model_len)
        return (tokens,) * num_layers

    def select(self, prompt: Prompt, num_rows: int) -> Tensor:
        score = self.score(prompt)
        num_safe = self.num_protected + int(self.floor_fraction * (num_rows - self.num_protected))
        score.scatter_(1, score.topk(num_safe).indices, float("inf"))
        return score.flatten().topk(len(score) * num_rows).indices.sort().values

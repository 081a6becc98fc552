"""A StepPlan on the device: the tensors that every layer of one step reads."""

import dataclasses

import torch
from torch import Tensor

from codesign.engine.step import StepPlan


@dataclasses.dataclass(frozen=True)
class Batch:
    """Attributes:
    token_ids: [N] int64.
    positions: [N] int64, logical positions (the true ones; a policy with cache-relative positions maps them itself).
    """

    plan: StepPlan
    token_ids: Tensor
    positions: Tensor

    @classmethod
    def of(cls, plan: StepPlan, device: torch.device) -> "Batch":
        return cls(
            plan=plan,
            token_ids=torch.tensor(plan.token_ids, dtype=torch.int64, device=device),
            positions=torch.tensor(plan.positions, dtype=torch.int64, device=device),
        )

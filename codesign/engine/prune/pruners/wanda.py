"""wanda: a weight counts as much as its size times the norm of the input that it multiplies; ranked in each output row.

    score_ij = |w_ij| ||x_j||_2        no update of what remains

Sun et al., 2023 (https://arxiv.org/abs/2306.11695). Layers are pruned in order, each on what the pruned ones before it
give.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from codesign.engine.prune.pruner import ScorePruner
from codesign.engine.quantize.inputs import InputStats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanda(ScorePruner):
    needs_inputs: ClassVar[bool] = True

    def score(self, weight: Tensor, inputs: InputStats | None) -> Tensor:
        if inputs is None:
            raise ValueError("wanda needs calibration inputs")
        return weight.float().abs() * inputs.norm.to(weight.device)

    def dropped(self, score: Tensor) -> Tensor:
        count = int(self.sparsity * score.shape[1])
        lowest = score.argsort(dim=1, stable=True)[:, :count]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, lowest, True)

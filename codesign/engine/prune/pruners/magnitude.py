"""magnitude: the smallest weights of each matrix become 0. Needs no data; the baseline that others must beat.

Zhu and Gupta, 2017 (https://arxiv.org/abs/1710.01878), in one shot and without retraining.
"""

import dataclasses

import torch
from torch import Tensor

from codesign.engine.prune.pruner import ScorePruner
from codesign.engine.quantize.inputs import InputStats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Magnitude(ScorePruner):
    def score(self, weight: Tensor, inputs: InputStats | None) -> Tensor:
        return weight.float().abs()

    def dropped(self, score: Tensor) -> Tensor:
        """Ranked over the whole matrix; exactly the share asked for, also among equals."""
        count = int(self.sparsity * score.numel())
        lowest = score.flatten().argsort(stable=True)[:count]
        return torch.zeros_like(score, dtype=torch.bool).view(-1).scatter_(0, lowest, True).view(score.shape)

"""The plainest right attention: RoPE and a causal softmax in fp32, one packed sequence after the other, no cache.

What the real attention, with its cache, policies and fast paths, is compared with.
"""

import itertools

import torch
from torch import Tensor

from codesign.engine.batch import Batch


def rotate_half_split(x: Tensor, angle: Tensor, attention_scaling: float) -> Tensor:
    """x [n, H, D] turned by angle [n, D/2]; pair i is (x[i], x[i + D/2])."""
    cos, sin = angle.cos()[:, None] * attention_scaling, angle.sin()[:, None] * attention_scaling
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class ReferenceAttention:
    """Whole sequences in one plan only: it remembers nothing between steps."""

    def __init__(self, inv_freq: Tensor, attention_scaling: float) -> None:
        self.inv_freq, self.attention_scaling = inv_freq, attention_scaling

    def begin(self, batch: Batch) -> None: ...

    def end(self, batch: Batch) -> None: ...

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        starts = batch.plan.query_starts
        return torch.cat(
            [self._one(q[a:b], k[a:b], v[a:b], batch.positions[a:b]) for a, b in itertools.pairwise(starts)]
        )

    def _one(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        angle = positions.float()[:, None] * self.inv_freq
        query = rotate_half_split(q.float(), angle, self.attention_scaling)
        key = rotate_half_split(k.float(), angle, self.attention_scaling)
        groups = q.shape[1] // k.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), v.float().repeat_interleave(groups, dim=1)
        weight = torch.einsum("qhd,khd->hqk", query, key) * q.shape[-1] ** -0.5
        weight.masked_fill_(positions[None, :] > positions[:, None], -torch.inf)
        return torch.einsum("hqk,khd->qhd", weight.softmax(dim=-1), value).to(q.dtype)

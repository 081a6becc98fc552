"""eager: two matrix products and a softmax, all in fp32, the plain path that fused kernels are compared with.

Query rows are taken in tiles, so that scores never need more than O(tile · R) memory.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from codesign.engine.attention.backend import AttentionBackend
from codesign.engine.attention.weights import query_tiles, weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eager(AttentionBackend):
    is_plain: ClassVar[bool] = True

    @property
    def kernel(self) -> str:
        return "eager matmul-softmax-matmul, in fp32"

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float
    ) -> Tensor:
        out, value = torch.empty_like(query), value.float()
        for tile in query_tiles(query, key.shape[2]):
            weight = weights(query, key, tile, mask=mask, is_causal=is_causal, scale=scale)
            mixed = weight.flatten(2, 3) @ value
            out[:, :, tile] = mixed.view(*query.shape[:2], -1, query.shape[3])
        return out

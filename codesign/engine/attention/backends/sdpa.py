"""sdpa: torch's fused attention; on a CPU the flash kernel, O(M) memory.

Cannot give attention weights, so column sums cost a second pass over the keys.
"""

import dataclasses

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from codesign.engine.attention.backend import AttentionBackend


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sdpa(AttentionBackend):
    @property
    def kernel(self) -> str:
        return "aten::scaled_dot_product_attention"

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float
    ) -> Tensor:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

"""sdpa: torch's fused attention; on a CPU the flash kernel, O(M) memory.

Cannot give attention weights, so column sums cost a second pass over the keys. Half precision on a CPU without its own
instructions for it (AVX2, torch 2.13, one thread, decode of 8 x 512 rows x 2 KV heads x 64): fp32 0.43 ms, bf16 0.55,
fp16 1.99; converting the views to fp32 first took 3.3, so they are read as they are.
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

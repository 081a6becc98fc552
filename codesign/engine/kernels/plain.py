"""The small operations of a layer as operations of torch: what `kernels.fused: false` runs, and the reference."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from codesign.engine.attention.rope import rotate


@dataclasses.dataclass(frozen=True)
class Plain:
    """Args:
    reason: why these stand in for fused ones, or "".
    """

    reason: str = ""

    @property
    def kernel(self) -> str:
        return f"none: {self.reason}" if self.reason else "none"

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight; fp32 inside, cast to the dtype of x, then weighted: the order of
        transformers, without which a quarter of the 16-bit results differ in their last bit."""
        if x.device.type != "cpu":  # one fused kernel there
            normed = F.rms_norm(x.float(), x.shape[-1:], None, eps)
            return normed.to(x.dtype) * weight
        # torch's CPU kernel makes a temporary per operation. Zen 3, one thread, us: [8, 256] bf16 28 instead of 36,
        # [1024, 896] fp32 400 instead of 5600.
        wide = x.float()
        norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
        if x.dtype == torch.float32:
            return (wide * scale).mul_(weight)  # wide is x itself
        return wide.mul_(scale).to(x.dtype).mul_(weight)

    def add_norm(self, x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + change
        return total, self.norm(total, weight, eps)

    def norm_heads(self, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self.norm(q, q_weight, eps), self.norm(k, k_weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, signed_sin: Tensor) -> tuple[Tensor, Tensor]:
        num_heads = q.shape[1]
        rotated = rotate(torch.cat((q, k), dim=1), cos, signed_sin)
        return rotated[:, :num_heads], rotated[:, num_heads:]

    def rotate_into(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        signed_sin: Tensor,
        *,
        key: Tensor,
        value: Tensor,
        rows: Tensor,
    ) -> Tensor:
        q, k = self.rotate(q, k, cos, signed_sin)
        for cache, new in ((key, k), (value, v)):
            cache.index_copy_(0, rows, new.reshape(-1, new.shape[-1]))
        return q

    def rotate_rows(self, k: Tensor, cos: Tensor, signed_sin: Tensor, *, key: Tensor, rows: Tensor) -> None:
        key.index_copy_(0, rows, rotate(k, cos, signed_sin).flatten(0, 1))


PLAIN = Plain()

"""Rope: rotary positions, applied outside the model, because only the cache knows which position a row stands for.

    rotate(x, p)[i]         = x[i] cos(p f_i) - x[i + D/2] sin(p f_i)          0 <= i < D/2
    rotate(x, p)[i + D/2]   = x[i + D/2] cos(p f_i) + x[i] sin(p f_i)

Half-split pairs, as Hugging Face checkpoints store them (RoFormer, https://arxiv.org/abs/2104.09864, pairs neighbours).
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Rope:
    """Attributes:
    inv_freq: [D/2] fp32, radians per position.
    attention_scaling: factor on cosine and sine (YaRN); 1 otherwise.
    """

    inv_freq: Tensor
    attention_scaling: float = 1.0

    def tables(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """[num_positions, D] fp32 cosine and signed sine (`[-sin, sin]`), ready for `rotate`."""
        inv_freq = self.inv_freq.to(device=device, dtype=torch.float32)
        angle = torch.arange(num_positions, device=device, dtype=torch.float32)[:, None] * inv_freq
        cos, sin = angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """x [..., D] turned by table rows that broadcast against it; computed in fp32, returned in the dtype of x."""
    swapped = torch.roll(x, x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, signed_sin).to(x.dtype)

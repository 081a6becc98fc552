"""int8: each row of a KV head as int8 codes with one scale of its own, keys and values alike.

    scale = max|x| / 127 in bf16        code = round(x / scale)        x' = code · scale

Symmetric, per token and per head: half the bytes of bf16, a quarter of those of fp32, and rows that can still be
evicted in place. Codes are computed against the scale as it is stored, so its precision moves the step and adds no
error; bf16 and not fp16 because it has the range of whatever the model computes in.
Cost: one pass over each new row; reading it costs a conversion per value, in registers where there is a kernel.
"""

import dataclasses

import torch
from torch import Tensor

from codesign.engine.kernels import kv_attention
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.kv_attention import KVAttention, Queries
from codesign.engine.kv.codec import KVCodec, Parts
from codesign.engine.kv.group import LayerGroup

_LARGEST = 127
_TINY = 1e-30  # rows of zeros have scale 0; they are not divided by it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(KVCodec):
    def encode(self, rows: Tensor) -> Parts:
        """int8 codes [..., D], bf16 scale [..., 1]."""
        wide = rows.float()
        scale = (wide.abs().amax(dim=-1, keepdim=True) / _LARGEST).to(torch.bfloat16)
        code = (wide / scale.float().clamp_min(_TINY)).round_().clamp_(-_LARGEST, _LARGEST)
        return code.to(torch.int8), scale

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        code, scale = parts
        return (code.float() * scale.float()).to(dtype)

    def kernel(self, *, head_dim: int, device: torch.device) -> KVAttention | Missing:
        return kv_attention.usable(head_dim=head_dim, device=device)

    def attend(self, kernel: KVAttention, queries: Queries, group: LayerGroup, index: int, slots: slice) -> None:
        kernel.rows("int8", queries, *group.stored(index, slots))

    def attend_blocks(self, kernel: KVAttention, queries: Queries, table: Tensor, key: Parts, value: Parts) -> None:
        kernel.paged_rows("int8", queries, table, key, value)

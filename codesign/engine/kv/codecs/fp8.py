"""fp8: each row of a KV head as e4m3 codes with one scale of its own, keys and values alike.

    scale = max|x| / 448 in bf16        code = e4m3(x / scale)        x' = code · scale

The bytes of int8 with relative instead of absolute steps (three mantissa bits): values far below the row's largest keep
their precision, the large ones lose. Meant for rows with a few very large values; where rows are even, int8 is closer.
Storage only: casting is exact emulation of the format on any device, and reading needs no fp8 arithmetic, so no compute
capability is asked for.
"""

import dataclasses

import torch
from torch import Tensor

from codesign.engine.kernels import kv_attention
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.kv_attention import KVAttention, Queries
from codesign.engine.kv.codec import KVCodec, Parts
from codesign.engine.kv.group import LayerGroup

_LARGEST = 448  # of e4m3 without infinities
_TINY = 1e-30  # rows of zeros have scale 0; they are not divided by it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8(KVCodec):
    def encode(self, rows: Tensor) -> Parts:
        """e4m3 codes [..., D] as uint8, which every device can copy by index; bf16 scale [..., 1]."""
        wide = rows.float()
        scale = (wide.abs().amax(dim=-1, keepdim=True) / _LARGEST).to(torch.bfloat16)
        code = (wide / scale.float().clamp_min(_TINY)).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        return code.view(torch.uint8), scale

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        code, scale = parts
        return (code.view(torch.float8_e4m3fn).float() * scale.float()).to(dtype)

    def kernel(self, *, head_dim: int, device: torch.device) -> KVAttention | Missing:
        return kv_attention.usable(head_dim=head_dim, device=device)

    def attend(self, kernel: KVAttention, queries: Queries, group: LayerGroup, index: int, slots: slice) -> None:
        kernel.rows("fp8", queries, *group.stored(index, slots))

    def attend_blocks(self, kernel: KVAttention, queries: Queries, table: Tensor, key: Parts, value: Parts) -> None:
        kernel.paged_rows("fp8", queries, table, key, value)

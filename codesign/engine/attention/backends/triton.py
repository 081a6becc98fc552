"""triton: output tokens by our split-K kernels: K and V are read once for a query group, where and as they are stored.

Codes of int8, fp8 and int4 caches become numbers in registers; what else a cache stores is decoded in slices. Rows in
blocks are found through their table. Weights for a policy that scores columns come out of the same pass, and of a
prompt by two passes in O(n) memory. Prompt chunks attend through SDPA, whose kernels are made for many queries. Runs on
CUDA, or anywhere in Triton's interpreter (TRITON_INTERPRET=1), which is for tests.
"""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from codesign.engine.attention.backend import AttentionBackend
from codesign.engine.attention.backends.sdpa import Sdpa
from codesign.engine.attention.calls import Call
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.triton import available
from codesign.engine.kernels.triton.splits import int4_is_read
from codesign.engine.kv.codec import KVCodec, Parts
from codesign.engine.kv.group import LayerGroup

_PROMPTS = Sdpa()
_ROW_CODECS = ("native", "int8", "fp8")
_MAX_QUERIES = 128  # of a KV head; more are a prompt chunk, and worth a kernel that reuses rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Triton(AttentionBackend):
    column_kernel: ClassVar[str] = "triton::column_sums"
    is_indexed: ClassVar[bool] = True

    @property
    def kernel(self) -> str:
        return f"triton::attend, prompts {_PROMPTS.kernel}"

    def missing(self, device: torch.device) -> Missing | None:
        return available.missing_attention(device)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float
    ) -> Tensor:
        if is_causal or query.shape[1] != key.shape[1] or query.shape[2] > _MAX_QUERIES:
            return _PROMPTS.attend(query, key, value, mask=mask, is_causal=is_causal, scale=scale)
        from codesign.engine.kernels.triton.attend import attend  # triton is there only where `missing` is None

        return attend(query, (key,), (value,), mask=mask, scale=scale)[0]

    def attend_columns(
        self, query: Tensor, key: Tensor, value: Tensor, *, num_tokens: int, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        from codesign.engine.kernels.triton.attend import attend

        out, columns = attend(query, (key,), (value,), num_tokens=num_tokens, mask=mask, scale=scale, want_columns=True)
        assert columns is not None
        return out, columns

    def column_sums(
        self, query: Tensor, key: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float, decay: float
    ) -> Tensor:
        from codesign.engine.kernels.triton.column_sums import column_sums

        return column_sums(query, key, mask=mask, is_causal=is_causal, scale=scale, decay=decay)

    def reads(self, codec: KVCodec, *, head_dim: int) -> bool:
        name = _name(codec)
        if name != "int4":
            return name in _ROW_CODECS
        channels = math.gcd(codec.group_size, head_dim)
        return int4_is_read(head_dim=head_dim, group_size=codec.group_size, channels=channels)

    def attend_stored(
        self,
        query: Tensor,
        codec: KVCodec,
        group: LayerGroup,
        index: int,
        call: Call,
        *,
        scale: float,
        want_columns: bool,
    ) -> tuple[Tensor, Tensor | None]:
        from codesign.engine.kernels.triton.attend import attend, attend_int4

        name = _name(codec)
        near = group.near_key[index], group.near_value[index]
        if call.planes is not None:  # each KV head is a sequence with one head, of rows from where it begins
            counts, first = call.planes.index[:, index]
            out, _ = attend(
                query.flatten(0, 1)[:, None],
                *(tuple(_from_every_row(part, call.planes.num_rows) for part in parts) for parts in near),
                codec=name,
                counts=counts,
                slots=first,
                num_tokens=call.num_queries,
                scale=scale,
            )
            return out.view(query.shape), None
        if name in _ROW_CODECS:
            return attend(
                query,
                *(tuple(part[:, :, : call.num_rows] for part in parts) for parts in near),
                codec=name,
                counts=call.counts,
                slots=call.slot_ids,
                num_tokens=call.num_queries,
                scale=scale,
                want_columns=want_columns,
            )
        assert group.encoded is not None and not want_columns, "rows in groups are never evicted, whatever their scores"
        key, value = (parts[0][:, :, : call.num_rows] for parts in group.stored(index, call.slots))
        num_encoded = group.encoded_tokens(call.slots)
        in_groups = torch.tensor(num_encoded, dtype=torch.int32, device=query.device)
        out = attend_int4(
            query,
            [part[index, call.slots] for part in group.encoded.tensors],
            in_groups,
            key,
            value,
            call.counts - in_groups,
            group_size=codec.group_size,
            most_encoded=max(num_encoded),
            num_tokens=call.num_queries,
            scale=scale,
        )
        return out, None

    def reads_blocks(self, codec: KVCodec) -> bool:
        return _name(codec) in _ROW_CODECS

    def attend_blocks(
        self, query: Tensor, codec: KVCodec, key: Parts, value: Parts, table: Tensor, call: Call, *, scale: float
    ) -> Tensor:
        from codesign.engine.kernels.triton.attend import attend

        return attend(
            query,
            key,
            value,
            codec=_name(codec),
            counts=call.counts,
            table=table,
            num_tokens=call.num_queries,
            scale=scale,
        )[0]


def _from_every_row(part: Tensor, num_rows: int) -> Tensor:
    """[S, H_kv, C, X] -> [n, 1, num_rows, X]: each row as the first of `num_rows`."""
    rows = part.flatten(0, 2)
    width = rows.shape[1]
    return rows.as_strided((len(rows) - num_rows + 1, 1, num_rows, width), (width, width, width, 1))


def _name(codec: KVCodec) -> str:
    return type(codec).__module__.rpartition(".")[2]

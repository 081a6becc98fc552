"""BlockAttention: output tokens over blocks. B sequences in one call.

What reads through a table, where and as rows are stored: the backend's own kernel, else the compiled one. Otherwise the
plain way, which those are compared with: the rows of a few sequences at a time are copied together and decoded.
"""

import torch
from torch import Tensor

from codesign.engine.attention.backend import AttentionBackend
from codesign.engine.attention.calls import Call
from codesign.engine.attention.fold import fold, unfold
from codesign.engine.attention.output import MAX_DECODED, beside
from codesign.engine.kernels import kv_attention
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.kv_attention import KVAttention, Queries
from codesign.engine.kv.codec import KVCodec
from codesign.engine.kv.paged import PagedStore


class BlockAttention:
    """Args:
        prompts: the kernel of prompts.

    Attributes:
    kernel: what runs, for the record.
    packed: what reads native rows for the tokens of a whole step, prompts too, or None.
    is_ragged: whether sequences of any lengths can share a call that has no mask.
    is_indexed: whether counts are read from `call.index`.
    """

    def __init__(
        self,
        codec: KVCodec,
        backend: AttentionBackend,
        *,
        prompts: str,
        num_kv_heads: int,
        scale: float,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._codec, self._backend, self._num_kv_heads, self._scale = codec, backend, num_kv_heads, scale
        self._fused: KVAttention | None = None
        self.packed: KVAttention | None = None
        self.kernel = backend.kernel
        self.is_ragged = self._is_read = backend.reads_blocks(codec)
        self.is_indexed = self._is_read and backend.is_indexed
        if self._is_read:
            return
        found: KVAttention | Missing = Missing("plain")
        if not backend.is_plain and codec.is_native:
            found = kv_attention.usable(head_dim=head_dim, device=device)
        elif not backend.is_plain:
            found = codec.kernel(head_dim=head_dim, device=device)
        if isinstance(found, Missing):
            self.kernel += f" over rows copied out of blocks ({found.reason})"
            return
        self._fused, self.is_ragged = found, True
        if codec.is_native and found.is_bf16("native", head_dim=head_dim, dtype=dtype):
            self.packed = found
        stored = "paged" if codec.is_native else f"paged_{type(codec).__name__.lower()}"
        self.kernel = beside(found.name(stored, head_dim=head_dim, dtype=dtype), prompts)

    def __call__(self, q: Tensor, store: PagedStore, layer: int, call: Call, table: Tensor) -> Tensor:
        """[n, H, D] for the packed queries of a call, as large.

        Args:
            table: [B, H_kv, n] int32 blocks of `call.num_rows` rows of each sequence.
        """
        if self._fused is None:
            query = fold(q, num_queries=call.num_queries, num_kv_heads=self._num_kv_heads)
            if self._is_read:
                key, value = store.parts(layer)
                out = self._backend.attend_blocks(query, self._codec, key, value, table, call, scale=self._scale)
            else:
                out = self._over_copies(query, store, layer, call, table)
            return unfold(out, num_queries=call.num_queries)
        queries = Queries(
            q,
            [span.num_past for span in call.spans],
            num_kv_heads=self._num_kv_heads,
            num_tokens=call.num_queries,
            num_rows=call.num_rows,
            scale=self._scale,
            want_columns=False,
        )
        self._codec.attend_blocks(self._fused, queries, table, *store.parts(layer))
        return queries.out

    def _over_copies(self, query: Tensor, store: PagedStore, layer: int, call: Call, table: Tensor) -> Tensor:
        """[B, H_kv, M, D] for query groups folded into rows."""
        out = torch.empty_like(query)
        num_heads, _, head_dim = query.shape[1:]
        at_once = max(1, MAX_DECODED[query.device.type] // (num_heads * call.num_rows * head_dim))
        for first in range(0, len(query), at_once):
            own = slice(first, first + at_once)
            key, value = store.read(layer, table[own], call.num_rows)
            mask = None if call.mask is None else call.mask[own]
            out[own] = self._backend.attend(query[own], key, value, mask=mask, is_causal=False, scale=self._scale)
        return out

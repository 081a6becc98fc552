"""OutputAttention: output tokens over what the slots hold. B slots in one call.

A backend may read what is stored by itself. Otherwise rows that are stored as they are read are views: the compiled
kernel reads them where it is faster than the backend, and where their weights are wanted, which fused backends do not
show: it finds them in the same pass. Other rows are read by the codec's own kernel where there is one, or are decoded a
slice of (slot, KV head) planes at a time: there is never a decoded copy of the cache.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from codesign.engine.attention.backend import AttentionBackend
from codesign.engine.attention.calls import Call
from codesign.engine.attention.fold import fold, unfold
from codesign.engine.kernels import kv_attention
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.kv_attention import KVAttention, Queries, row_starts
from codesign.engine.kv.codec import KVCodec
from codesign.engine.kv.group import LayerGroup

# Keys, and as many values, decoded at a time: 4 MiB each in fp32 on a CPU, near its caches; 64 MiB each in bf16 on a
# GPU, for few launches. At least one plane, whatever its length.
MAX_DECODED = {"cpu": 1 << 20, "cuda": 1 << 25}


class OutputAttention:
    """Args:
        prompts: the kernel of prompts.

    Attributes:
    kernel: what runs, for the record.
    native: what reads native rows where a backend cannot do it in one call, or why there is nothing.
    packed: what reads native rows for the tokens of a whole step, prompts too, or None.
    is_ragged: whether sequences of any lengths can share a call that has no mask.
    finds_slots: whether those of any slots can.
    is_indexed: whether counts and slots are read from `call.index`.
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
        self._prompts = prompts
        self._codec, self._backend, self._num_kv_heads, self._scale = codec, backend, num_kv_heads, scale
        self._fused: KVAttention | None = None
        self._is_native_faster = False
        self._native_name = ""
        self.packed: KVAttention | None = None
        self.finds_slots = False
        self.is_ragged = self._is_read = backend.reads(codec, head_dim=head_dim)
        self.is_indexed = self._is_read and backend.is_indexed
        self.kernel = backend.kernel
        self.native: KVAttention | Missing = Missing("plain")
        if self._is_read:
            self.finds_slots = self.is_indexed and not codec.group_size  # groups are sliced out of neighbouring slots
            self.native = Missing("the backend's own kernel reads heads of one length")
            return
        if codec.is_native:
            if not backend.is_plain:
                self.native = kv_attention.usable(head_dim=head_dim, device=device)
            if not isinstance(self.native, Missing):
                self._native_name = self.native.name("native", head_dim=head_dim, dtype=dtype)
                self._is_native_faster = self.native.beats_sdpa(head_dim=head_dim, dtype=dtype)
                if self.native.is_bf16("native", head_dim=head_dim, dtype=dtype):
                    self.packed = self.native
            self.is_ragged = self.finds_slots = self._is_native_faster
            if self._is_native_faster:
                self.kernel = beside(self._native_name, prompts)
            return
        self.native = Missing("encoded rows")
        found = Missing("plain") if backend.is_plain else codec.kernel(head_dim=head_dim, device=device)
        if isinstance(found, Missing):
            self.kernel += f" over decoded slices ({found.reason})"
            return
        self._fused, self.is_ragged = found, True
        stored = type(codec).__name__.lower()
        name = found.name(stored, head_dim=head_dim, dtype=dtype, group_size=codec.group_size)
        self.kernel = beside(name, prompts)

    def named(self, *, has_weights: bool, has_ragged: bool) -> str:
        """What runs for a policy that wants weights, or whose heads differ in length."""
        name, reason = self.kernel, self.native.reason if isinstance(self.native, Missing) else None
        if has_weights and self._is_read:
            name += f" + {self._backend.column_kernel}"
        elif has_weights:
            if self._native_name and not self._is_native_faster:
                name = beside(self._native_name, self._prompts)
            name += f" + column pass ({reason})" if self._codec.is_native and reason else " + column pass"
        if has_ragged and not self.is_indexed:
            calls = f"{self._backend.kernel}, a call per slot and KV head ({reason})"
            name += f", ragged heads {calls if reason else self._native_name}"
        return name

    def scored(self, q: Tensor, group: LayerGroup, index: int, call: Call) -> Tensor:
        """[n, H, D] for the packed queries of a call, as large; the group's scores get the weights of its rows."""
        if isinstance(self.native, KVAttention) and group.is_credited_at_once:
            return self._over_native(self.native, q, group, index, call, want_columns=False, is_scored=True).out
        out, mass = self(q, group, index, call, want_columns=True)
        assert mass is not None
        group.note(index, call.where, mass)
        return out

    def __call__(
        self, q: Tensor, group: LayerGroup, index: int, call: Call, *, want_columns: bool
    ) -> tuple[Tensor, Tensor | None]:
        """[n, H, D] for the packed queries of a call, as large.

        If wanted also [B, H_kv, Q, R] fp32: the weight that each row received from each token, mean of the query group.
        """
        if isinstance(self.native, KVAttention) and (want_columns or self._is_native_faster):
            queries = self._over_native(self.native, q, group, index, call, want_columns=want_columns)
            return queries.out, queries.columns
        kernel = self._fused
        if kernel is None:
            query = fold(q, num_queries=call.num_queries, num_kv_heads=self._num_kv_heads)
            out, columns = self._over_folded(query, group, index, call, want_columns)
            return unfold(out, num_queries=call.num_queries), columns
        queries = Queries(q, call.past, **self._sizes(call), want_columns=want_columns)
        self._codec.attend(kernel, queries, group, index, call.slots)
        return queries.out, queries.columns

    def _sizes(self, call: Call) -> dict[str, Any]:
        heads = {"num_kv_heads": self._num_kv_heads, "scale": self._scale}
        return heads | {"num_tokens": call.num_queries, "num_rows": call.num_rows}

    def _over_native(
        self,
        kernel: KVAttention,
        q: Tensor,
        group: LayerGroup,
        index: int,
        call: Call,
        *,
        want_columns: bool,
        is_scored: bool = False,
    ) -> Queries:
        """Rows as they lie: those of neighbouring slots, or of a layer with where each slot's begin."""
        (key,), (value,), first = group.near_key[index], group.near_value[index], None
        scores = group.column[index] if is_scored and group.column is not None else None
        if isinstance(call.where, slice):
            key, value, scores = key[call.where], value[call.where], None if scores is None else scores[call.where]
        else:
            first = row_starts(group.first_rows(span.slot for span in call.spans))
        wanted: dict[str, Any] = {"want_columns": want_columns, "scores": scores, "decay": group.column_decay}
        queries = Queries(q, call.past, **self._sizes(call), **wanted)
        kernel.native(queries, key, value, first)
        return queries

    def _over_folded(
        self, query: Tensor, group: LayerGroup, index: int, call: Call, want_columns: bool
    ) -> tuple[Tensor, Tensor | None]:
        """[B, H_kv, M, D] for query groups folded into rows."""
        if self._is_read:
            return self._backend.attend_stored(
                query, self._codec, group, index, call, scale=self._scale, want_columns=want_columns
            )
        if not self._codec.is_native:
            return self._over_slices(query, group, index, call, want_columns)
        where = (call.slots, slice(None), slice(call.num_rows))
        key, value = group.near_key[index][0][where], group.near_value[index][0][where]
        return self._over_rows(query, key, value, call, call.mask, want_columns)

    def _over_slices(
        self, query: Tensor, group: LayerGroup, index: int, call: Call, want_columns: bool
    ) -> tuple[Tensor, Tensor | None]:
        num_slots, num_heads, _, head_dim = query.shape
        out = torch.empty_like(query)
        columns: Tensor | None = None
        if want_columns:
            columns = query.new_empty(num_slots, num_heads, call.num_queries, call.num_rows, dtype=torch.float32)
        num_planes = MAX_DECODED[query.device.type] // (call.num_rows * head_dim)
        for own, heads in _slices(num_slots, num_heads, max(1, num_planes)):
            slots = slice(call.slots.start + own.start, call.slots.start + own.stop)
            key, value = group.read(index, slots, heads, call.num_rows)
            mask = None if call.mask is None else call.mask[own]
            out[own, heads], part = self._over_rows(query[own, heads], key, value, call, mask, want_columns)
            if columns is not None and part is not None:
                columns[own, heads] = part
        return out, columns

    def _over_rows(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call, mask: Tensor | None, want_columns: bool
    ) -> tuple[Tensor, Tensor | None]:
        if want_columns:
            return self._backend.attend_columns(
                query, key, value, num_tokens=call.num_queries, mask=mask, scale=self._scale
            )
        return self._backend.attend(query, key, value, mask=mask, is_causal=False, scale=self._scale), None


def beside(outputs: str, prompts: str) -> str:
    """The kernels of both, for a record."""
    return outputs if outputs == prompts else f"{outputs}, prompts {prompts}"


def _slices(num_slots: int, num_heads: int, num_planes: int) -> Iterator[tuple[slice, slice]]:
    """(slots, heads) that together are all planes, at most `num_planes` at a time."""
    slots_at_once, heads_at_once = max(1, num_planes // num_heads), min(num_heads, num_planes)
    for slot in range(0, num_slots, slots_at_once):
        for head in range(0, num_heads, heads_at_once):
            yield slice(slot, min(slot + slots_at_once, num_slots)), slice(head, min(head + heads_at_once, num_heads))

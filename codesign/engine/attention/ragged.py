"""Output tokens over KV heads that keep different numbers of rows; nothing is padded or masked away.

Native rows are read in one call by the compiled kernel where there is one; a backend that finds rows through tensors
never comes here (`Call.planes`). Otherwise there is a backend call per slot and KV head, over a view of the cache or
one head of it decoded; on a CPU such a call keeps one thread busy.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from codesign.engine.attention.backend import AttentionBackend
from codesign.engine.attention.calls import Call
from codesign.engine.attention.fold import fold, unfold
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.kv_attention import KVAttention, Queries
from codesign.engine.kv.ragged import RaggedGroup


def _at_once(kernel: KVAttention, group: RaggedGroup, index: int, call: Call, q: Tensor, scale: float) -> Tensor:
    (key,), (value,) = group.stored(index, call.slots)
    places = group.places(index, tuple(span.slot for span in call.spans), call.past)
    queries = Queries(
        q,
        places.num_past,
        num_kv_heads=key.shape[1],
        num_tokens=call.num_queries,
        num_rows=places.longest + call.num_queries,
        scale=scale,
        want_columns=False,
    )
    kernel.native(queries, key, value, places.first)
    return queries.out


def attend_ragged(
    kernel: KVAttention | Missing,
    backend: AttentionBackend,
    group: RaggedGroup,
    index: int,
    call: Call,
    q: Tensor,
    *,
    num_kv_heads: int,
    scale: float,
) -> Tensor:
    """[n, H, D] for the packed queries of output tokens, as large."""
    if not isinstance(kernel, Missing):
        return _at_once(kernel, group, index, call, q, scale)
    query = fold(q, num_queries=call.num_queries, num_kv_heads=num_kv_heads)
    out = torch.empty_like(query)
    for batch, span in enumerate(call.spans):
        for head, (first, num_past) in enumerate(group.heads(index, span.slot, span.num_past)):
            key, value = group.read_arena(index, span.slot, slice(first, first + num_past + call.num_queries))
            mask = None
            if call.num_queries > 1:
                assert call.mask is not None
                among_pending = call.mask[batch, 0, :, span.num_past : span.num_rows]
                mask = pad(among_pending, (num_past, 0))[None, None]
            one = query[batch : batch + 1, head : head + 1]
            out[batch, head] = backend.attend(one, key, value, mask=mask, is_causal=False, scale=scale)[0, 0]
    return unfold(out, num_queries=call.num_queries)

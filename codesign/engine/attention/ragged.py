"""Output tokens over KV heads that keep different numbers of rows: one backend call per slot and KV head.

Each call reads a view of the cache, or one head of it decoded; nothing is padded or masked away. What it costs is
calls: slots x KV heads in each layer, where equal heads of neighbouring slots share one.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from codesign.engine.attention.backend import AttentionBackend
from codesign.engine.attention.calls import Call
from codesign.engine.kv.ragged import RaggedGroup


def attend_ragged(
    backend: AttentionBackend, group: RaggedGroup, index: int, call: Call, query: Tensor, *, scale: float
) -> Tensor:
    """[B, H_kv, G * Q, D] from a query of that shape: output tokens, query groups folded into rows."""
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
    return out

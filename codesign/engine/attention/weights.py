"""Attention weights themselves, in tiles of query rows: for the eager backend and for policies that score columns.

A fused backend never shows its weights. A policy that needs how much attention each row received (H2O) pays a second
q kᵀ here, in O(tile · R) memory: for prompts, and for output tokens where the compiled kernel cannot be used.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# 4 Mi fp32 scores are 16 MiB: large enough for efficient products, small beside any model.
_TILE_SCORES = 1 << 22


def query_tiles(query: Tensor, num_rows: int) -> Iterator[slice]:
    """Slices of the query rows of [B, H, M, D] whose scores against R rows fit in one tile."""
    num_batch, num_heads, num_queries, _ = query.shape
    step = max(1, _TILE_SCORES // max(1, num_batch * num_heads * num_rows))
    for start in range(0, num_queries, step):
        yield slice(start, min(start + step, num_queries))


def weights(query: Tensor, key: Tensor, tile: slice, *, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """softmax(q kᵀ · scale) of the query rows in `tile`, fp32 [B, H_kv, G, M', R]; arguments as in `attend`."""
    num_batch, num_heads, _, head_dim = query.shape
    num_kv_heads, num_rows = key.shape[1], key.shape[2]
    part = query[:, :, tile].reshape(num_batch, num_kv_heads, -1, head_dim)
    score = (part.float() @ key.float().mT).mul_(scale)
    score = score.view(num_batch, num_kv_heads, num_heads // num_kv_heads, -1, num_rows)
    if is_causal:
        query_row = torch.arange(tile.start, tile.stop, device=key.device)[:, None]
        score.masked_fill_(torch.arange(num_rows, device=key.device) > query_row, float("-inf"))
    elif mask is not None:
        rows = mask if mask.shape[2] == 1 else mask[:, :, tile]
        score += rows.unsqueeze(2)
    return score.softmax(dim=-1)


def column_sums(
    query: Tensor, key: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float, decay: float = 1.0
) -> Tensor:
    """[B, H_kv, R] fp32: weight each row received, summed over query rows, averaged over the query group.

    Each tile recomputes its rows' log-sum-exp, so that nothing is asked of the backend and no M x R matrix exists.
    Query i of M counts decay ** (M - 1 - i).
    """
    num_queries, num_rows = query.shape[2], key.shape[2]
    age = torch.arange(num_queries - 1, -1, -1, dtype=torch.float32, device=key.device)
    share = torch.pow(decay, age)
    total = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
    for tile in query_tiles(query, num_rows):
        visible = tile.stop if is_causal else num_rows
        weight = weights(query, key[:, :, :visible], tile, mask=mask, is_causal=is_causal, scale=scale)
        total[:, :, :visible] += (share[tile] @ weight).mean(dim=2)
    return total

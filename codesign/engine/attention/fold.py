"""Query groups as rows of their KV head, and back: K and V are then read once for a group."""

from torch import Tensor


def fold(query: Tensor, *, num_queries: int, num_kv_heads: int) -> Tensor:
    """[B, H_kv, G * Q, D], tokens last, from packed [B * Q, H, D]."""
    folded = query.view(-1, num_queries, num_kv_heads, query.shape[1] // num_kv_heads, query.shape[2])
    # with one query each nothing has to move
    return folded[:, 0] if num_queries == 1 else folded.permute(0, 2, 3, 1, 4).flatten(2, 3)


def unfold(out: Tensor, *, num_queries: int) -> Tensor:
    """What `fold` was given the shape of."""
    num_kv_heads, num_rows, head_dim = out.shape[1:]
    if num_queries > 1:
        out = out.reshape(*out.shape[:2], num_rows // num_queries, num_queries, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(-1, num_kv_heads * num_rows // num_queries, head_dim)

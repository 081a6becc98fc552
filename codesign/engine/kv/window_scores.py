"""How much the end of a prompt looks at each of its rows: the score behind SnapKV and its kin."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d


def snapkv_scores(window_query: Tensor, key: Tensor, *, scale: float, kernel_size: int) -> Tensor:
    """Importance of each prompt row, seen from the last W queries. Higher is kept.

    SnapKV (Li et al., 2024), https://arxiv.org/abs/2404.14469: fp32 softmax under the causal mask, mean over the
    window queries, then average pooling along the rows, zeros beyond both ends. Pooling never mixes window rows in.
    Departs from the paper: per KV head (mean over the query group), not per query head.

    Args:
        window_query: [H, W, D] rotated queries of the last W tokens.
        key: [H_kv, T, D] rotated; T >= W.
    Returns:
        [H_kv, T] fp32; the window rows themselves score +inf.
    """
    num_kv_heads, num_tokens, head_dim = key.shape
    num_window = window_query.shape[1]
    query = window_query.float().reshape(num_kv_heads, -1, head_dim)
    score = (query @ key.float().mT * scale).view(num_kv_heads, -1, num_window, num_tokens)
    row = torch.arange(num_tokens, device=key.device)
    is_hidden = row > row[-num_window:, None]
    weight = score.masked_fill(is_hidden, float("-inf")).softmax(dim=-1)
    received = weight[..., : num_tokens - num_window].mean(dim=(1, 2))
    out = torch.full((num_kv_heads, num_tokens), float("inf"), device=key.device)
    if num_window < num_tokens:
        out[:, : num_tokens - num_window] = avg_pool1d(received, kernel_size, stride=1, padding=kernel_size // 2)
    return out

"""How much of what a key says is said by other keys too: the score against near-duplicates in R-KV."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

_TILE_SCORES = 1 << 22  # 16 MiB of fp32


def key_redundancy(key: Tensor, position: Tensor, *, threshold: float) -> Tensor:
    """softmax over the rows j of the mean over all rows i of cos(k_i, k_j), in tiles of i.

    Of the rows that resemble row i (cosine above the threshold) the newest is not blamed for it, so that one of a group
    of near-duplicates stays (and both of a pair: each is the newest that resembles the other).
    R-KV (Cai et al., 2025), https://arxiv.org/abs/2505.24133.

    Args:
        key: [B, H_kv, R, D].
        position: [B, H_kv, R] int32, all distinct.
    Returns:
        [B, H_kv, R] fp32, sums to one.
    """
    num_rows = key.shape[2]
    unit = normalize(key.float(), dim=-1)
    blame = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
    step = max(1, _TILE_SCORES // (key.shape[0] * key.shape[1] * num_rows))
    for start in range(0, num_rows, step):
        own = slice(start, start + step)
        cosine = unit[:, :, own] @ unit.mT
        cosine.masked_fill_(position[:, :, own, None] == position[:, :, None], 0.0)
        similar = torch.where(cosine > threshold, position[:, :, None], -1)
        is_newest = (similar == similar.amax(dim=-1, keepdim=True)) & (similar >= 0)
        blame += cosine.masked_fill_(is_newest, 0.0).sum(dim=2)
    return (blame / num_rows).softmax(dim=-1)

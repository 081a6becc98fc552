"""What a policy that re-scores rows during output needs beside them: the newest queries, and victims named ahead.

Scoring every row at every commit would cost more than attention. Such a policy names `lookahead` victims at once; they
are overwritten one after the other by the next rows, and only when too few are left are the rows scored anew. A named
row is read until its turn comes, so the slot is always full and the number of rows stays a function of lengths.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class RecentQueries:
    """query [L, S, ring, H, D]: rotated queries of each slot, that of position p at p % ring.

    The ring holds the window and all pending queries: a rejected one is overwritten before it could be seen. `scale` is
    that of the softmax.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_heads: int,
        head_dim: int,
        *,
        window_tokens: int,
        max_query_len: int,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.ring, self.window_tokens, self.scale = window_tokens + max_query_len, window_tokens, scale
        self.query = torch.zeros(num_layers, num_slots, self.ring, num_heads, head_dim, dtype=dtype, device=device)

    def rows(self, slot: Tensor | int, position: Tensor) -> Tensor:
        """[N] places for `write`, of slot and position [N]: the same in every layer."""
        return slot * self.ring + position % self.ring

    def write(self, index: int, rows: Tensor, query: Tensor) -> None:
        """query [N, H, D] in layer `layers[index]` of the group."""
        self.query[index].flatten(0, 1).index_copy_(0, rows, query)

    def before(self, slot: Tensor, next_position: Tensor) -> Tensor:
        """[L, B, H, W, D]: queries of the `window_tokens` positions before next_position [B], oldest first."""
        position = next_position[:, None] - torch.arange(self.window_tokens, 0, -1, device=next_position.device)
        return self.query[:, slot[:, None], position % self.ring].transpose(2, 3)


class VictimQueue:
    """named [L, S, H_kv, length] of `dtype`: rows of each slot in the order in which they are to be overwritten."""

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.length = length
        self.named = torch.zeros(num_layers, num_slots, num_kv_heads, length, dtype=dtype, device=device)
        self._num_left = [0] * num_slots

    def clear(self, slot: int) -> None:
        self._num_left[slot] = 0

    def needs(self, slot: int, count: int) -> bool:
        """Whether fewer than `count` victims are left; depends on what was committed alone, never on values."""
        return self._num_left[slot] < count

    def fill(self, slots: Sequence[int], named: Tensor) -> None:
        """named [L, B, H_kv, length], in place of whatever was left."""
        self.named[:, torch.tensor(slots, device=named.device)] = named.to(self.named.dtype)
        for slot in slots:
            self._num_left[slot] = self.length

    def take(self, slots: Sequence[int], count: int) -> Tensor:
        """[L, B, H_kv, count] int64: the next ones of each slot."""
        device = self.named.device
        first = torch.tensor([self.length - self._num_left[slot] for slot in slots], device=device)
        named = self.named[:, torch.tensor(slots, device=device)]
        place = (first[:, None] + torch.arange(count, device=device))[None, :, None].expand(*named.shape[:3], -1)
        for slot in slots:
            self._num_left[slot] -= count
        return named.gather(3, place).long()

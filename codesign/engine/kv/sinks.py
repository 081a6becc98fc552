"""SinkKeys: unrotated copies of the first keys, for policies whose positions are cache-relative ("pre_rope").

Such a policy keeps sinks and an unbroken tail. With R rows before a query at position p, a tail row's rank and its
position differ by the same `p - R` as the query's own: the tail can stay rotated at its true positions. Only the sinks
have come nearer by `p - R`, so at each step their keys are turned to `rank + (p - R)`. Before anything has been evicted
that is where they are, bit for bit.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from codesign.engine.attention.rope import rotate
from codesign.engine.kv.codec import KVCodec, Parts


@dataclasses.dataclass(frozen=True)
class NewSinks:
    """tokens [n]: packed tokens of the step that are sinks; copies [n * H_kv]: where they are kept."""

    tokens: Tensor
    copies: Tensor


@dataclasses.dataclass(frozen=True)
class Turn:
    """copies [m * H_kv * num_sinks] to turn; rows of the slots they go to and table rows [.., D], as many."""

    copies: Tensor
    rows: Tensor
    cos: Tensor
    signed_sin: Tensor


class SinkKeys:
    """key [L, S, H_kv, num_sinks, D] in native precision, beside the parts [S, H_kv, C, X] of a group's layers."""

    def __init__(
        self, layers: Sequence[Parts], num_sinks: int, codec: KVCodec, *, head_dim: int, dtype: torch.dtype
    ) -> None:
        num_layers, (num_slots, num_kv_heads, num_rows, _) = len(layers), layers[0][0].shape
        device = layers[0][0].device
        self._codec = codec
        self.key = torch.zeros(num_layers, num_slots, num_kv_heads, num_sinks, head_dim, dtype=dtype, device=device)
        self._flat_key = [self.key[index].view(-1, head_dim) for index in range(num_layers)]
        self._flat_slots = [[part.flatten(0, 2) for part in parts] for parts in layers]
        plane = torch.arange(num_slots * num_kv_heads, device=device).view(num_slots, num_kv_heads)
        self._copy_start = plane * num_sinks
        self._row_start = plane * num_rows
        self._rank = torch.arange(num_sinks, device=device)

    @property
    def num_sinks(self) -> int:
        return self.key.shape[3]

    def new(self, tokens_slots_positions: Sequence[tuple[int, int, int]]) -> NewSinks | None:
        """Which of these (packed token, slot, position) are sinks."""
        found = [item for item in tokens_slots_positions if item[2] < self.num_sinks]
        if not found:
            return None
        token, slot, position = torch.tensor(found, device=self.key.device).unbind(1)
        return NewSinks(token, (self._copy_start[slot] + position[:, None]).flatten())

    def turn(self, slots_shifts: Sequence[tuple[int, int]], cos: Tensor, signed_sin: Tensor) -> Turn | None:
        """How to turn the sinks of each (slot, shift); cos and signed_sin [P, D] are the tables."""
        moved = [item for item in slots_shifts if item[1] > 0]
        if not moved or not self.num_sinks:
            return None
        slot, shift = torch.tensor(moved, device=self.key.device).unbind(1)
        place = (slice(None), slice(None), None)
        position = (self._rank + shift[:, None, None]).expand(-1, self.key.shape[2], -1).flatten()
        return Turn(
            copies=(self._copy_start[slot][place] + self._rank).flatten(),
            rows=(self._row_start[slot][place] + self._rank).flatten(),
            cos=cos[position],
            signed_sin=signed_sin[position],
        )

    def store(self, index: int, new: NewSinks, key: Tensor) -> None:
        """key [N, H_kv, D], unrotated, of the step's packed tokens."""
        self._flat_key[index].index_copy_(0, new.copies, key[new.tokens].flatten(0, 1))

    def apply(self, index: int, turn: Turn) -> None:
        """Writes the turned keys into the slots of layer `layers[index]`, always from the native copies."""
        key = rotate(self._flat_key[index][turn.copies], turn.cos, turn.signed_sin)
        for part, encoded in zip(self._flat_slots[index], self._codec.encode(key), strict=True):
            part.index_copy_(0, turn.rows, encoded)

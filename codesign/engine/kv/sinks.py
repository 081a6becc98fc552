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

from codesign.engine.kernels.pieces import Pieces
from codesign.engine.kv.codec import KVCodec, Parts


@dataclasses.dataclass(frozen=True)
class NewSinks:
    """tokens [n]: packed tokens of the step that are sinks; copies [n]: where they are kept."""

    tokens: Tensor
    copies: Tensor


@dataclasses.dataclass(frozen=True)
class Turn:
    """copies [m * num_sinks] to turn, and table rows [m * num_sinks, 1, D] for them; rows [m * num_sinks * H_kv] of the
    slots they go to."""

    copies: Tensor | slice
    rows: Tensor
    cos: Tensor
    signed_sin: Tensor


class SinkKeys:
    """key [L, S, num_sinks, H_kv, D] in native precision, beside the parts [S, H_kv, C, X] of a group's layers."""

    def __init__(
        self, layers: Sequence[Parts], num_sinks: int, codec: KVCodec, *, head_dim: int, dtype: torch.dtype
    ) -> None:
        num_layers, (num_slots, num_kv_heads, num_rows, _) = len(layers), layers[0][0].shape
        device = layers[0][0].device
        self._codec = codec
        self.key = torch.zeros(num_layers, num_slots, num_sinks, num_kv_heads, head_dim, dtype=dtype, device=device)
        self._flat_key = [self.key[index].flatten(0, 1) for index in range(num_layers)]
        self._flat_slots = [[part.flatten(0, 2) for part in parts] for parts in layers]
        self._row_start = num_rows * torch.arange(num_slots * num_kv_heads, device=device).view(num_slots, num_kv_heads)
        self._rank = torch.arange(num_sinks, device=device)

    @property
    def num_sinks(self) -> int:
        return self.key.shape[2]

    def new(self, tokens_slots_positions: Sequence[tuple[int, int, int]]) -> NewSinks | None:
        """Which of these (packed token, slot, position) are sinks."""
        found = [item for item in tokens_slots_positions if item[2] < self.num_sinks]
        if not found:
            return None
        token, slot, position = torch.tensor(found, device=self.key.device).unbind(1)
        return NewSinks(token, slot * self.num_sinks + position)

    def turn(self, slots_shifts: Sequence[tuple[int, int]], cos: Tensor, signed_sin: Tensor) -> Turn | None:
        """How to turn the sinks of each (slot, shift); cos and signed_sin [P, D] are the tables."""
        moved = [item for item in slots_shifts if item[1] > 0]
        if not moved or not self.num_sinks:
            return None
        slot, shift = torch.tensor(moved, device=self.key.device).unbind(1)
        position = (self._rank + shift[:, None]).flatten()
        is_every_slot = [own for own, _ in moved] == list(range(self.key.shape[1]))
        return Turn(
            copies=slice(None) if is_every_slot else (slot[:, None] * self.num_sinks + self._rank).flatten(),
            rows=(self._row_start[slot][:, None] + self._rank[:, None]).flatten(),
            cos=cos[position][:, None],
            signed_sin=signed_sin[position][:, None],
        )

    def store(self, index: int, new: NewSinks, key: Tensor) -> None:
        """key [N, H_kv, D], unrotated, of the step's packed tokens."""
        self._flat_key[index].index_copy_(0, new.copies, key[new.tokens])

    def apply(self, index: int, turn: Turn, pieces: Pieces) -> None:
        """Writes the turned keys into the slots of layer `layers[index]`, always from the native copies."""
        key, tables = self._flat_key[index][turn.copies], (turn.cos, turn.signed_sin)
        if self._codec.is_native:
            (rows,) = self._flat_slots[index]
            pieces.rotate_rows(key, *tables, key=rows, rows=turn.rows)
            return
        turned, _ = pieces.rotate(key, key[:, :0], *tables)
        for part, encoded in zip(self._flat_slots[index], self._codec.encode(turned.flatten(0, 1)), strict=True):
            part.index_copy_(0, turn.rows, encoded)

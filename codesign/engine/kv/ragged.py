"""RaggedGroup: layers whose KV heads keep different numbers of rows, in exactly the memory of equal ones.

A (layer, slot) is one arena of H_kv · (budget + pending) rows. When a prompt is cut, each head gets as many rows as its
policy gave it, head after head, each followed by its own pending rows:

    equal     head 0 [ budget | pending ]  head 1 [ budget | pending ]
    ragged    head 0 [ 11 rows        | pending ]  head 1 [ 5 rows | pending ]      sum H_kv · budget

Afterwards nothing grows: a new row takes the place of one of the newest rows, which every head has. Rows are counted
from a head's end, so that `row_start + budget` is its first pending row whatever its length; reserving, writing and
evicting are then those of equal heads.

How many rows a layer keeps is a function of lengths, as everywhere; how they are split over its heads is decided by
values. Nobody but attention needs the split: it is read from the device once per layer and prompt. Under tensor
parallelism a rank would split the budget of its own heads among them, and totals agree without talking; that is then
another algorithm than one split over all heads.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codesign.engine.kernels.kv_attention import row_starts
from codesign.engine.kv.group import LayerGroup
from codesign.engine.kv.policy import KVPolicy, Prompt, Rows


class Places(NamedTuple):
    """Where the rows of some slots' heads are, as a kernel takes it.

    Attributes:
        num_past: [B][H_kv] committed rows.
        first: [B, H_kv] where they begin, from the first row of the first slot on.
        longest: most rows of a head; more than the layer's budget where heads differ.
    """

    num_past: tuple[tuple[int, ...], ...]
    first: ctypes.Array[ctypes.c_int64]
    longest: int


class RaggedGroup(LayerGroup):
    """`key`, `value`, `position` show a slot's rows by head only as long as its heads are equal: ask `heads`."""

    def __init__(self, *args: Any, policy: KVPolicy, max_query_len: int, **kwargs: Any) -> None:
        super().__init__(*args, policy=policy, max_query_len=max_query_len, **kwargs)
        assert policy.key_space == "rotated" and policy.evidence != "column_sums" and not policy.needs_keys
        assert self.queue is None, "ragged heads name victims among their newest rows, as each commit needs them"
        self._max_query_len, self._num_newest = max_query_len, policy.evictable(self.budget)
        self._equal_start = self.row_start.clone()
        self._longest: dict[int, int] = {}  # slot -> rows of the longest head of any layer, where they differ
        self._num_kept: dict[tuple[int, int], list[int]] = {}  # (index, slot) -> rows of each head, where they differ
        # The same on the device, [L, S, H_kv] int32: rows of each head, or -1 where heads are equal, and its first row
        # among those of the layer.
        self._kept_rows = torch.full_like(self.row_start, -1, dtype=torch.int32)
        first_of_layer = self._equal_start[:, :1, :1]
        self._equal_first = (self._equal_start - first_of_layer).to(torch.int32)
        self._first_row = self._equal_first.clone()
        self._places: dict[int, tuple[object, Places]] = {}  # index -> what was last asked and said

    def is_ragged(self, index: int, slot: int) -> bool:
        return (index, slot) in self._num_kept

    @property
    def num_slot_rows(self) -> int:
        """Of a layer: the most that a single head can have."""
        return self._equal_start.shape[2] * self.capacity

    def planes(self, slots: Sequence[int], call_index: Tensor, num_queries: int) -> tuple[Tensor, int]:
        """[2, L, B * H_kv] int32 of each KV head: rows that the last of `num_queries` tokens sees, and the first of
        them among those of the layer; and how many rows the longest of these heads has.

        Args:
            call_index: [2, B] int32: what they would be if heads were equal, and the slots.
        """
        counts, where = call_index
        kept = self._kept_rows[:, where]
        seen = torch.where(kept < 0, counts[:, None], kept + num_queries)
        most = max((self._longest.get(slot, 0) for slot in slots), default=0)
        return torch.stack((seen, self._first_row[:, where])).flatten(2), most + num_queries

    def heads(self, index: int, slot: int, num_tokens: int) -> list[tuple[int, int]]:
        if not self.is_ragged(index, slot):
            return super().heads(index, slot, num_tokens)
        start, places = 0, []
        for num_kept in self._num_kept[index, slot]:
            places.append((start, num_kept))
            start += num_kept + self._max_query_len
        return places

    def places(self, index: int, slots: tuple[int, ...], num_past: tuple[int, ...]) -> Places:
        """Of these slots, which have so many committed rows a head or are ragged; kept, since the same is asked at each
        step once all are."""
        asked, last = (slots, num_past), self._places.get(index)
        if last is not None and last[0] == asked:
            return last[1]
        num_slot_rows = self.position.shape[2:].numel()
        heads = [self.heads(index, slot, count) for slot, count in zip(slots, num_past, strict=True)]
        counts = tuple(tuple(count for _, count in own) for own in heads)
        starts = ((slot - slots[0]) * num_slot_rows for slot in slots)
        first = row_starts(start + row for start, own in zip(starts, heads, strict=True) for row, _ in own)
        found = Places(counts, first, max(map(max, counts)))
        self._places[index] = asked, found
        return found

    def admit(self, index: int, slot: int, prompt: Prompt, kept: Tensor | None) -> None:
        """kept [H_kv * budget] as `KVPolicy.select` gives it for ragged heads, or None to keep all rows."""
        self._places.pop(index, None)
        if kept is None:
            super().admit(index, slot, prompt, None)
            return
        num_heads, num_tokens, _ = prompt.key.shape
        head = kept // num_tokens
        num_kept = torch.bincount(head, minlength=num_heads)
        row = torch.arange(len(kept), device=kept.device) + head * self._max_query_len
        for parts, rows in ((self.near_key[index], prompt.key), (self.near_value[index], prompt.value)):
            for part, new in zip(parts, self._codec.encode(rows.flatten(0, 1)[kept]), strict=True):
                part[slot].flatten(0, 1)[row] = new
        self.position[index, slot].view(-1)[row] = (kept % num_tokens).to(self.position.dtype)
        first_pending = num_kept.cumsum(0) + self._max_query_len * torch.arange(num_heads, device=kept.device)
        self.row_start[index, slot] = self._equal_start[index, slot, 0] + first_pending - self.budget
        self._num_kept[index, slot] = num_kept.tolist()
        self._longest[slot] = max(self._longest.get(slot, 0), *self._num_kept[index, slot])
        first_of_slot = self._equal_first[index, slot, 0]
        self._kept_rows[index, slot] = num_kept.to(torch.int32)
        self._first_row[index, slot] = (first_of_slot + first_pending - num_kept).to(torch.int32)

    def read_arena(self, index: int, slot: int, rows: slice) -> tuple[Tensor, Tensor]:
        """key, value [1, 1, n, D] of rows of a slot's arena, as attention reads them; views where stored so."""
        key, value = (
            self._codec.decode(tuple(part[slot].flatten(0, 1)[None, None, rows] for part in parts), self._dtype)
            for parts in (self.near_key[index], self.near_value[index])
        )
        return key, value

    def release(self, slot: int) -> None:
        super().release(slot)
        self._places.clear()
        for index in range(len(self.layers)):
            self._num_kept.pop((index, slot), None)
        self.row_start[:, slot] = self._equal_start[:, slot]
        self._longest.pop(slot, None)
        self._kept_rows[:, slot] = -1
        self._first_row[:, slot] = self._equal_first[:, slot]

    def _victims(self, policy: KVPolicy, slots: list[tuple[int, int]], num_new: int) -> Tensor:
        """Among the newest rows, which every head has: the last of its committed ones."""
        device = self._device
        next_position = torch.tensor([position for _, position in slots], device=device)
        newest = torch.arange(self.budget - self._num_newest, self.budget, device=device)
        row = self.row_start[:, torch.tensor([slot for slot, _ in slots], device=device)][..., None] + newest
        position = self.position.view(-1)[row - self._equal_start[0, 0, 0]]
        rows = Rows(
            position=position.flatten(0, 1).to(torch.int32),
            column=None,
            next_position=next_position.repeat(len(self.layers)),
        )
        return newest[0] + policy.victims(rows, num_new).view(*position.shape[:3], num_new)

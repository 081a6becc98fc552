"""LayerGroup: the layers of a store that keep equally many rows, as views [L, S, H_kv, C] of its tensors."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from codesign.engine.kv.codec import KVCodec, Parts
from codesign.engine.kv.encoded import EncodedTokens
from codesign.engine.kv.policy import KVPolicy, Prompt, Rows
from codesign.engine.kv.recent import RecentQueries, VictimQueue
from codesign.engine.kv.sinks import SinkKeys


class LayerGroup:
    """Attributes:
    layers: which layers, in the order of the first dimension.
    capacity: C, rows of a slot's KV head, pending ones included.
    budget: rows kept per KV head; `is_bounded` when rows are overwritten in place.
    is_staged: whether a prompt waits in native precision until its end.
    key, value: what the codec stores of rows, parts [L, S, H_kv, C, X], as they lie between steps.
    near_key, near_value: index -> parts [S, H_kv, C, X] of one layer, as it is computed; views of `key` and `value`
        unless these pass through buffers.
    encoded: tokens before those rows, where the codec encodes groups.
    position: [L, S, H_kv, C] int16 or int32.
    column: [L, S, H_kv, C] fp32, or None.
    pending_column: [L, S, H_kv, Q, C] fp32: what each pending query looked at, kept apart until it is accepted; None
        without scores, and where one token comes at a time: `column` moves at once then, since only the padding of a
        sequence that is done is ever rejected.
    row_start: [L, S, H_kv] first row in the store's tensors.
    recent: newest queries, or None; attention brings them for a policy that `needs_keys`.
    queue: victims named ahead, or None unless the policy looks ahead.
    """

    def __init__(
        self,
        key: Parts,
        value: Parts,
        position: Tensor | None,
        column: Tensor | None,
        *,
        layers: tuple[int, ...],
        budget: int,
        start: int,
        shape: tuple[int, int, int, int],
        head_dim: int,
        max_query_len: int,
        policy: KVPolicy,
        codec: KVCodec,
        device: torch.device,
        near: Sequence[tuple[Parts, Parts]],
        encoded: EncodedTokens | None,
        num_tokens: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self.layers, self.budget, self.is_bounded = layers, budget, position is not None
        self.is_staged = self.is_bounded or not codec.is_native
        self._codec, self._dtype, self._device = codec, dtype, device
        self.encoded, self._num_tokens = encoded, num_tokens
        num_layers, num_slots, num_kv_heads, capacity = shape
        self.capacity = capacity
        self.num_rows = num_layers * num_slots * num_kv_heads * capacity
        own = slice(start, start + self.num_rows)
        self.key, self.value = (tuple(part[own].view(*shape, -1) for part in parts) for parts in (key, value))
        self.near_key, self.near_value = (
            [tuple(part.view(*shape[1:], -1) for part in parts) for parts in layers]
            for layers in zip(*near, strict=True)
        )
        self.row_start = start + capacity * torch.arange(self.num_rows // capacity, device=device).view(shape[:3])
        row_is_position = torch.arange(budget, dtype=torch.int32, device=device).expand(*shape[:3], -1)
        self.position = row_is_position if position is None else position[own].view(shape)
        self.column = None if column is None else column[own].view(shape)
        self.pending_column: Tensor | None = None
        self.column_decay = policy.column_decay
        if self.column is not None and max_query_len > 1:
            self.pending_column = torch.zeros(*shape[:3], max_query_len, capacity, device=device)
        self.sinks: SinkKeys | None = None
        if self.is_bounded and policy.key_space == "pre_rope":
            self.sinks = SinkKeys(self.near_key, policy.num_sink_tokens, codec, head_dim=head_dim, dtype=dtype)
        self.recent: RecentQueries | None = None
        self.queue: VictimQueue | None = None
        if self.is_bounded and policy.lookahead(budget) > 1:
            length = max(policy.lookahead(budget), max_query_len)
            self.queue = VictimQueue(num_layers, num_slots, num_kv_heads, length, self.position.dtype, device)

    @property
    def beside(self) -> tuple[Tensor | None, ...]:
        """What the policy keeps beside the rows."""
        return (
            self.pending_column,
            None if self.sinks is None else self.sinks.key,
            None if self.recent is None else self.recent.query,
            None if self.queue is None else self.queue.named,
        )

    @property
    def is_credited_at_once(self) -> bool:
        return self.column is not None and self.pending_column is None

    def rows_after(self, num_tokens: int) -> int:
        """Rows that exist per KV head once `num_tokens` tokens are committed."""
        return min(num_tokens, self.budget)

    def stored(self, index: int, slots: slice) -> tuple[Parts, Parts]:
        """Parts of key and value of neighbouring slots, [B, H_kv, C, X] views."""
        near = self.near_key[index], self.near_value[index]
        key, value = (tuple(part[slots] for part in parts) for parts in near)
        return key, value

    def first_rows(self, slots: Iterable[int]) -> list[int]:
        """[B * H_kv] where the rows of each of these slots' KV heads begin among those of a layer."""
        num_heads = self.near_key[0][0].shape[1]
        return [(slot * num_heads + head) * self.capacity for slot in slots for head in range(num_heads)]

    def rows(self, slots: Tensor, positions: Tensor) -> Sequence[Tensor]:
        """[N * H_kv] rows of each layer for `write`, of slots and positions [N], where every row is kept."""
        return (self.row_start[:, slots] + positions[:, None]).flatten(1).unbind(0)

    def encoded_tokens(self, slots: slice) -> list[int]:
        """How many tokens of each of these slots lie in groups."""
        return [self._codec.encoded_tokens(self._num_tokens[slot]) for slot in range(slots.start, slots.stop)]

    def read(self, index: int, slots: slice, heads: slice, num_rows: int) -> tuple[Tensor, Tensor]:
        """key, value [B, H', num_rows, D] as attention reads them, pending rows included.

        Views where they are stored so. What a slot does not have is anything finite.
        """
        if self.encoded is not None:
            return self._read_groups(self.encoded, index, slots, heads, num_rows)
        where, near = (slots, heads, slice(num_rows)), (self.near_key[index], self.near_value[index])
        key, value = (self._codec.decode(tuple(part[where] for part in parts), self._dtype) for parts in near)
        return key, value

    def _read_groups(
        self, encoded: EncodedTokens, index: int, slots: slice, heads: slice, num_rows: int
    ) -> tuple[Tensor, Tensor]:
        num_encoded = self.encoded_tokens(slots)
        decoded = encoded.decode(index, slots, heads, max(num_encoded))
        for_each = []
        for (rows,), groups in zip((self.key, self.value), decoded, strict=True):
            out = groups.new_zeros(*groups.shape[:2], num_rows, groups.shape[3])
            out[:, :, : groups.shape[2]] = groups
            for slot, first in enumerate(num_encoded):
                count = min(num_rows - first, rows.shape[3])
                out[slot, :, first : first + count] = rows[index, slots.start + slot, heads, :count]
            for_each.append(out)
        return for_each[0], for_each[1]

    def heads(self, index: int, slot: int, num_tokens: int) -> list[tuple[int, int]]:
        """(first row, number of rows) of each KV head once `num_tokens` are committed, within the rows of the slot."""
        num_kv_heads, width = self.position.shape[2:]
        return [(head * width, self.rows_after(num_tokens)) for head in range(num_kv_heads)]

    def stretches(self, index: int, slot: int, num_tokens: int, *, first: int = 0) -> list[range]:
        """Rows that a slot has once `num_tokens` are committed, head by head from its row `first`, counted from the
        layer's first row."""
        start = slot * self.near_key[index][0][0].shape[:2].numel()
        return [range(start + row + first, start + row + count) for row, count in self.heads(index, slot, num_tokens)]

    def admit(self, index: int, slot: int, prompt: Prompt, kept: Tensor | None) -> None:
        """Moves a finished prompt into the slot: the rows `kept` [H_kv, K], or all of them."""
        num_heads, num_tokens, head_dim = prompt.key.shape
        first = self._codec.encoded_tokens(num_tokens)
        if self.encoded is not None and first:
            self.encoded.encode(
                slice(index, index + 1), slot, 0, prompt.key[None, :, :first], prompt.value[None, :, :first]
            )
        is_all = kept is None
        if kept is None:
            kept = torch.arange(first, num_tokens, device=self._device).expand(num_heads, -1)
        num_rows = kept.shape[1]
        wide = kept[:, :, None].expand(-1, -1, head_dim)
        for parts, rows in ((self.near_key[index], prompt.key), (self.near_value[index], prompt.value)):
            chosen = rows[:, first:] if is_all else rows.gather(1, wide)
            for part, new in zip(parts, self._codec.encode(chosen), strict=True):
                part[slot, :, :num_rows] = new
        if not self.is_bounded:
            return  # there rows stand in the order of positions
        self.position[index, slot, :, :num_rows] = kept
        if self.column is not None:
            assert prompt.column_sums is not None
            self.column[index, slot, :, :num_rows] = prompt.column_sums.gather(1, kept)
        if self.recent is not None:
            assert prompt.window_query is not None
            seen = prompt.window_query.transpose(0, 1)
            position = torch.arange(num_tokens - len(seen), num_tokens, device=self._device)
            self.recent.write(index, self.recent.rows(slot, position), seen)

    def release(self, slot: int) -> None:
        """Forgets what was decided for the sequence in this slot."""
        if self.queue is not None:
            self.queue.clear(slot)

    def flush(self, slot: int, num_tokens: int, count: int) -> None:
        """Encodes the groups that `count` more committed tokens complete; the rows after them move up."""
        first, last = self._codec.encoded_tokens(num_tokens), self._codec.encoded_tokens(num_tokens + count)
        if self.encoded is None or first == last:
            return
        (key,), (value,) = self.key, self.value
        num_done, num_left = last - first, num_tokens + count - last
        self.encoded.encode(slice(None), slot, first, key[:, slot, :, :num_done], value[:, slot, :, :num_done])
        for rows in (key[:, slot], value[:, slot]):
            rows[:, :, :num_left] = rows[:, :, num_done : num_done + num_left].clone()

    def note(self, index: int, slots: slice | Tensor, mass: Tensor) -> None:
        """mass [B, H_kv, Q, R] fp32: the weight that each row received from each pending query of these slots."""
        num_queries, num_rows = mass.shape[2:]
        if self.pending_column is not None:
            self.pending_column[index, slots, :, :num_queries, :num_rows] = mass
        elif self.column is not None:
            where = (index, slots, slice(None), slice(num_rows))
            if self.column_decay != 1:
                self.column[where] *= self.column_decay
            self.column[where] += mass[:, :, 0]

    def credit(self, slots: list[int], count: int) -> None:
        """Adds the attention mass of the first `count` pending queries of each slot to the rows they looked at."""
        if self.column is None or self.pending_column is None:
            return
        index, decay = _index(slots, self._device), self.column_decay
        for query in range(count):
            if decay != 1:
                self.column[:, index] *= decay
            self.column[:, index] += self.pending_column[:, index, :, query]

    def replace(self, policy: KVPolicy, slots: list[tuple[int, int]], num_new: int) -> tuple[Tensor, Tensor]:
        """Lets the policy name `num_new` rows per KV head of each full (slot, position of its first new row).

        Returns:
            rows to overwrite and the pending rows that go there, as rows of the store.
        """
        start = self.row_start[:, _index([slot for slot, _ in slots], self._device)]
        target = start[..., None] + self._victims(policy, slots, num_new)
        source = start[..., None] + torch.arange(self.budget, self.budget + num_new, device=self._device)
        return target.flatten(), source.flatten()

    def _victims(self, policy: KVPolicy, slots: list[tuple[int, int]], num_new: int) -> Tensor:
        """[L, B, H_kv, num_new] of each (slot, position of its first new row)."""
        if self.queue is None:
            return self._ask(policy, slots, num_new)
        stale = [item for item in slots if self.queue.needs(item[0], num_new)]
        if stale:
            self.queue.fill([slot for slot, _ in stale], self._ask(policy, stale, self.queue.length))
        return self.queue.take([slot for slot, _ in slots], num_new)

    def _committed_keys(self, index: slice | Tensor) -> Tensor:
        """[L * B, H_kv, budget, D] of full slots."""
        parts = tuple(part[:, index, :, : self.budget].flatten(0, 1) for part in self.key)
        return self._codec.decode(parts, self._dtype)

    def _ask(self, policy: KVPolicy, slots: list[tuple[int, int]], num_victims: int) -> Tensor:
        device, num_layers = self._device, len(self.layers)
        index = _index([slot for slot, _ in slots], device)
        next_position = torch.tensor([position for _, position in slots], device=device)
        window_query = None
        if self.recent is not None:
            slot = torch.tensor([slot for slot, _ in slots], device=device)
            window_query = self.recent.before(slot, next_position).flatten(0, 1)
        rows = Rows(
            position=self.position[:, index, :, : self.budget].flatten(0, 1).to(torch.int32),
            column=None if self.column is None else self.column[:, index, :, : self.budget].flatten(0, 1),
            next_position=next_position.repeat(num_layers),
            key=None if window_query is None else self._committed_keys(index),
            window_query=window_query,
            scale=None if self.recent is None else self.recent.scale,
        )
        return policy.victims(rows, num_victims).view(num_layers, len(slots), -1, num_victims)


def _index(slots: list[int], device: torch.device) -> slice | Tensor:
    """Neighbouring slots as a slice: views instead of copies."""
    if slots == list(range(slots[0], slots[-1] + 1)):
        return slice(slots[0], slots[-1] + 1)
    return torch.tensor(slots, device=device)

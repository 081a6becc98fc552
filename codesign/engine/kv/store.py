"""DenseStore: rows of every (layer, slot, KV head) in tensors that are allocated once and never move.

A slot's rows are `[committed | pending | unused]`. All layers lie in one tensor of rows, layers with equal budgets
side by side, so that a step's bookkeeping and its evictions are a few operations for all layers together:

    key, value [rows, X]        parts that the codec stores, layer by layer [S, H_kv, C]; C = budget + max_query_len, or
                                max_model_len where nothing is ever evicted: there row == position, and a pending row is
                                written where it stays. A codec of groups has these rows for the newest tokens only, in
                                order, and the tokens before them in storage of its own
    position   [rows] int16     of bounded layers; int32 where max_model_len needs it
    column     [rows] fp32      attention mass, only for a policy that asks (evidence "column_sums")

Keys and values lie where the place says, all else on the device. Where the device cannot read them there, each layer is
read and written in a buffer of `stream`; between steps they are moved where they lie.

How many rows exist is `min(tokens, budget)`: plain integers, the device is never asked. Rows past the count hold
anything finite.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from codesign.engine.kv import compose
from codesign.engine.kv.codec import KVCodec, Parts
from codesign.engine.kv.encoded import EncodedShape, EncodedTokens
from codesign.engine.kv.group import LayerGroup
from codesign.engine.kv.place import ON_DEVICE, KVPlace
from codesign.engine.kv.policy import KVPolicy
from codesign.engine.kv.ragged import RaggedGroup
from codesign.engine.kv.stream import LayerStream


class DenseStore:
    """Attributes:
    groups: layers with equal budgets, with views of their rows.
    num_tokens: [S] committed tokens of each slot (rows of a layer: `group.rows_after(num_tokens)`).
    num_pending: [S] rows written after them and not committed yet.
    layer_order: layers with equal budgets side by side, bounded ones first.
    stream: what brings layers to the device, or None where they lie there.

    Raises:
        ValueError: a budget that leaves too few rows to evict for what one step can commit.
        Unsupported: a codec whose rows cannot be overwritten with a policy that evicts, or heads that it cannot encode;
            a place that has no room, or that what is chosen does not go with.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        max_model_len: int,
        max_query_len: int,
        policy: KVPolicy,
        codec: KVCodec,
        rope_tables: tuple[Tensor, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        place: KVPlace = ON_DEVICE,
    ) -> None:
        self.policy, self.codec, self.place, self.device = policy, codec, place, device
        self.head_dim, self.dtype = head_dim, dtype
        self.budgets = policy.budgets(num_layers=num_layers, max_model_len=max_model_len)
        bounded = sorted({budget for budget in self.budgets if budget < max_model_len})
        for budget in bounded:
            if policy.evictable(budget) < max_query_len:
                raise ValueError(
                    f"kv_budget gives a layer {budget} rows, of which {policy.evictable(budget)} can be evicted; "
                    f"a step can commit {max_query_len} at once and needs as many"
                )
        compose.check(policy, codec, place, is_bounded=bool(bounded), device=device)
        capacity = {budget: budget + max_query_len for budget in bounded} | {
            max_model_len: codec.num_rows(max_model_len, max_query_len)
        }
        num_planes = num_slots * num_kv_heads
        num_rows = num_planes * sum(capacity[budget] for budget in self.budgets)
        num_bounded = num_planes * sum(capacity[budget] for budget in self.budgets if budget in bounded)
        # Zeros, not empty: masked rows are multiplied by 0, and 0 * NaN would reach a result.
        like = codec.encode(torch.zeros(1, head_dim, dtype=dtype, device=device))
        self.key, self.value = (
            tuple(place.zeros(num_rows, part.shape[1], dtype=part.dtype, device=device) for part in like)
            for _ in ("key", "value")
        )
        narrow = torch.int16 if max_model_len - 1 <= torch.iinfo(torch.int16).max else torch.int32
        self.position = torch.zeros(num_bounded, dtype=narrow, device=device)
        self.column: Tensor | None = None
        if bounded and policy.evidence == "column_sums":
            self.column = torch.zeros(num_bounded, dtype=torch.float32, device=device)
        encoded: EncodedTokens | None = None
        if codec.group_size:
            encoded = codec.groups(
                EncodedShape(
                    num_layers=num_layers,
                    num_slots=num_slots,
                    num_kv_heads=num_kv_heads,
                    num_tokens=codec.encoded_tokens(max_model_len),
                    head_dim=head_dim,
                    dtype=dtype,
                    device=device,
                    rope_tables=rope_tables,
                    place=place,
                )
            )
        self.num_tokens = [0] * num_slots
        layers_of = {
            budget: tuple(layer for layer, own in enumerate(self.budgets) if own == budget)
            for budget in (*bounded, *({max_model_len} & set(self.budgets)))
        }
        layer_rows, start = [range(0)] * num_layers, 0
        for budget, layers in layers_of.items():
            for layer in layers:
                layer_rows[layer] = range(start, start + num_planes * capacity[budget])
                start = layer_rows[layer].stop
        self.stream = self._stream(layer_rows, num_planes * max_query_len)
        groups, start = [], 0
        for budget, layers in layers_of.items():
            make = RaggedGroup if policy.head_budgets == "ragged" and budget in bounded else LayerGroup
            group = make(
                self.key,
                self.value,
                self.position if budget in bounded else None,
                self.column if budget in bounded else None,
                layers=layers,
                budget=budget,
                start=start,
                shape=(len(layers), num_slots, num_kv_heads, capacity[budget]),
                head_dim=head_dim,
                max_query_len=max_query_len,
                policy=policy,
                codec=codec,
                device=device,
                near=[self._near(layer, layer_rows[layer]) for layer in layers],
                encoded=encoded,
                num_tokens=self.num_tokens,
                dtype=dtype,
            )
            groups.append(group)
            start += group.num_rows
        self.groups = tuple(groups)
        self.layer_order = tuple(layer for group in self.groups for layer in group.layers)
        self._num_bounded_layers = sum(len(group.layers) for group in self.groups if group.is_bounded)
        self._row_start = torch.cat([group.row_start for group in self.groups])  # [L, S, H_kv] first row
        own_layers = [len(group.layers) for group in self.groups]
        for group, row_start in zip(self.groups, torch.split(self._row_start, own_layers), strict=True):
            group.row_start = row_start  # a view: ragged heads move theirs
        self._budget = torch.tensor([self.budgets[layer] for layer in self.layer_order], device=device)[:, None]
        self.num_pending = [0] * num_slots
        self.next_position = [0] * num_slots
        self._misled: set[int] = set()

    def _stream(self, layer_rows: Sequence[range], num_new: int) -> LayerStream | None:
        lanes = self.place.lanes(self.device)
        if lanes is None:
            return None
        far = (*self.key, *self.value)
        strip = [
            self.place.zeros(len(layer_rows), num_new, part.shape[1], dtype=part.dtype, device=self.device)
            for part in far
        ]
        return LayerStream(far, layer_rows, tuple(strip), lanes, device=self.device)

    def _near(self, layer: int, rows: range) -> tuple[Parts, Parts]:
        """A layer's parts [rows, X] of key and value, where they are when it is computed."""
        if self.stream is not None:
            parts = self.stream.near[layer]
            return parts[: len(self.key)], parts[len(self.key) :]
        own = slice(rows.start, rows.stop)
        return tuple(part[own] for part in self.key), tuple(part[own] for part in self.value)

    def append(self, slot: int, num_tokens: int) -> None:
        """Prompt tokens, committed as they come."""
        self.num_tokens[slot] += num_tokens

    def reserve(self, pending: Sequence[tuple[int, int]], first_positions: Sequence[int], positions: Tensor) -> Tensor:
        """Where the pending rows of each (slot, number of rows) go.

        Args:
            first_positions: of the first row of each.
            positions: [N] of all rows, slot after slot.
        Returns:
            [L, N * H_kv] rows for `write`, layers in `layer_order`. Labels them with their positions; they have no
            attention mass yet.
        """
        existing = self.num_tokens
        if self.codec.group_size:
            existing = [num_tokens - self.codec.encoded_tokens(num_tokens) for num_tokens in self.num_tokens]
        facts = [(slot, existing[slot], row) for slot, count in pending for row in range(count)]
        slot, num_rows, row = torch.tensor(facts, device=self.device).unbind(1)
        past = torch.minimum(num_rows, self._budget) + row  # [L, N]
        rows = self._row_start[:, slot] + past[..., None]  # [L, N, H_kv]
        if self._num_bounded_layers:
            bounded = rows[: self._num_bounded_layers]
            self.position[bounded] = positions.to(self.position.dtype)[:, None]
            if self.column is not None:
                self.column[bounded] = 0.0
        for (own, count), first in zip(pending, first_positions, strict=True):
            self.num_pending[own], self.next_position[own] = count, first
        return rows.flatten(1)

    def fetch(self, slots: Sequence[int], is_prompt: Sequence[bool]) -> None:
        """Starts a step that reads what these slots hold; a prompt that is staged is not read from its slot."""
        if self.stream is None:
            return
        stretches: list[list[range]] = [[] for _ in self.budgets]
        for group in self.groups:
            read = [slot for slot, is_own in zip(slots, is_prompt, strict=True) if not (is_own and group.is_staged)]
            for index, layer in enumerate(group.layers):
                stretches[layer] = [
                    own for slot in sorted(read) for own in group.stretches(index, slot, self.num_tokens[slot])
                ]
        self.stream.begin(stretches)

    def write(self, layer: int, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """key, value [N, H_kv, D] into the rows of the layer that `reserve` named."""
        if self.stream is not None:
            values = [self.codec.encode(new.reshape(-1, new.shape[-1])) for new in (key, value)]
            self.stream.write(layer, rows, (*values[0], *values[1]))
            return
        for parts, new in ((self.key, key), (self.value, value)):
            for part, encoded in zip(parts, self.codec.encode(new.reshape(-1, new.shape[-1])), strict=True):
                part.index_copy_(0, rows, encoded)

    def commit(self, commits: Sequence[tuple[int, int]]) -> None:
        """Accepts the first n pending rows of each (slot, n) and drops its others.

        Raises:
            ValueError: n is negative or more than are pending; or scores that moved at once hold what a dropped query
                looked at.
        """
        for slot, count in commits:
            if not 0 <= count <= self.num_pending[slot]:
                raise ValueError(f"slot {slot}: cannot commit {count} of {self.num_pending[slot]} pending rows")
            if count and slot in self._misled:
                raise ValueError(f"slot {slot}: its scores hold a query that was dropped; free it")
        if self.stream is not None:
            self.stream.drain()
        accepted = [(slot, count) for slot, count in commits if count]
        moves = [
            move for group in self.groups if group.is_bounded and accepted for move in self._evict(group, accepted)
        ]
        if moves:
            target = torch.cat([move[0] for move in moves])
            source = torch.cat([move[1] for move in moves])
            for tensor in (self.position, self.column):
                if tensor is not None:
                    tensor.index_copy_(0, target, tensor[source])
            if self.stream is not None:
                target, source = target.cpu(), source.cpu()
            for tensor in (*self.key, *self.value):
                tensor.index_copy_(0, target, tensor[source])
        if self.codec.group_size:
            for slot, count in accepted:
                self.groups[0].flush(slot, self.num_tokens[slot], count)
        for slot, count in commits:
            if count < self.num_pending[slot] and any(group.is_credited_at_once for group in self.groups):
                self._misled.add(slot)
            self.num_tokens[slot] += count
            self.num_pending[slot] = 0

    def _evict(self, group: LayerGroup, accepted: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """(rows to overwrite, pending rows that go there); before that the scores are moved, since they decide."""
        by_count: dict[int, list[int]] = {}
        by_excess: dict[int, list[tuple[int, int]]] = {}
        for slot, count in accepted:
            by_count.setdefault(count, []).append(slot)
            excess = group.rows_after(self.num_tokens[slot]) + count - group.budget
            if excess > 0:
                by_excess.setdefault(excess, []).append((slot, self.next_position[slot] + count - excess))
        for count, slots in by_count.items():
            group.credit(slots, count)
        return [group.replace(self.policy, full, excess) for excess, full in by_excess.items()]

    def truncate(self, slot: int, num_tokens: int) -> None:
        """Keeps the first `num_tokens` committed tokens of a slot.

        Raises:
            ValueError: there are fewer, or rows whose order is lost: evicted ones, or encoded in groups.
        """
        if self.codec.group_size or any(group.is_bounded for group in self.groups):
            raise ValueError("only a cache that keeps every row, each encoded by itself, can take tokens back")
        if not 0 <= num_tokens <= self.num_tokens[slot]:
            raise ValueError(f"slot {slot}: cannot keep {num_tokens} of {self.num_tokens[slot]} tokens")
        self.num_tokens[slot] = num_tokens

    def release(self, slot: int) -> None:
        self.num_tokens[slot] = self.num_pending[slot] = 0
        self._misled.discard(slot)
        for group in self.groups:
            group.release(slot)

    @property
    def num_bytes(self) -> int:
        """Sum of unique storages of what holds rows and their scores."""
        return _num_bytes(self._rows) + _num_bytes(self._beside)

    @property
    def num_bytes_in(self) -> dict[str, int]:
        """Memory -> bytes of the cache that lie there. Buffers of a stream are copies, beside those of `num_bytes`."""
        device = ON_DEVICE.memory(self.device)
        found = {self.place.memory(self.device): _num_bytes(self._rows)}
        found[device] = found.get(device, 0) + _num_bytes(self._beside)
        if self.stream is not None:
            found[f"{device}, buffers"] = _num_bytes(self.stream.buffers)
            found[f"{self.place.memory(self.device)}, buffers"] = _num_bytes(self.stream.strip)
        return found

    @property
    def _rows(self) -> list[Tensor]:
        encoded = self.groups[0].encoded
        return [*self.key, *self.value, *(() if encoded is None else encoded.tensors)]

    @property
    def _beside(self) -> list[Tensor]:
        tensors = [self.position, self.column, *(tensor for group in self.groups for tensor in group.beside)]
        return [tensor for tensor in tensors if tensor is not None]


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

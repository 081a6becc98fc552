"""DenseStore: rows of every (layer, slot, KV head) in tensors that are allocated once and never move.

A slot's rows are `[committed | pending | unused]`. Layers that keep equally many rows share one LayerGroup, so that a
step's bookkeeping is done once per group, not once per layer:

    key, value [L, S, H_kv, C, D]     C = budget + max_query_len; an unbounded layer has room for every position, C =
                                      max_model_len, and a pending row is written where it stays
    position   [L, S, H_kv, C]        int32; one plane for all layers and heads where no row is ever evicted
    column     [L, S, H_kv, C]        fp32 attention mass, only for a policy that asks (evidence "column_sums")
    pending_column [L, S, H_kv, Q, C] what each pending query added, kept apart until it is accepted

How many rows exist is `min(tokens, budget)`: plain integers, the device is never asked. Rows past the count hold
anything finite.
"""

import torch
from torch import Tensor

from codesign.engine.kv.policy import KVPolicy, Prompt, Rows


class LayerGroup:
    """Layers with the same budget. `is_bounded`: prompts are staged and rows are overwritten in place."""

    def __init__(
        self,
        *,
        layers: tuple[int, ...],
        budget: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        max_model_len: int,
        max_query_len: int,
        policy: KVPolicy,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = layers
        self.budget = budget
        self.is_bounded = budget < max_model_len
        self.num_kv_heads = num_kv_heads
        self.num_rows = budget + max_query_len if self.is_bounded else max_model_len
        planes = (len(layers), num_slots, num_kv_heads)
        shape = (*planes, self.num_rows)
        # Zeros, not empty: masked rows are multiplied by 0, and 0 * NaN would reach a result.
        self.key = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.value = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        position_shape = shape if self.is_bounded else (1, num_slots, 1, self.num_rows)
        self._position = torch.zeros(position_shape, dtype=torch.int32, device=device)
        self.position = self._position.expand(shape)
        self.column: Tensor | None = None
        self.pending_column: Tensor | None = None
        self.sink_key: Tensor | None = None
        if self.is_bounded and policy.evidence == "column_sums":
            self.column = torch.zeros(shape, dtype=torch.float32, device=device)
            self.pending_column = torch.zeros(*planes, max_query_len, self.num_rows, device=device)
        if self.is_bounded and policy.key_space == "pre_rope":
            self.sink_key = torch.zeros(*planes, policy.sink_tokens, head_dim, dtype=dtype, device=device)
        self._head_start = torch.arange(num_kv_heads, device=device) * self.num_rows
        self._plane_start = torch.arange(len(layers) * num_slots * num_kv_heads, device=device).view(planes)
        self._plane_start *= self.num_rows
        self._flat_key = [self.key[index].view(-1, head_dim) for index in range(len(layers))]
        self._flat_value = [self.value[index].view(-1, head_dim) for index in range(len(layers))]

    def rows_after(self, num_tokens: int) -> int:
        """Rows that exist per KV head once `num_tokens` tokens are committed."""
        return min(num_tokens, self.budget)

    def flat_rows(self, slots_rows: list[tuple[int, int]]) -> Tensor:
        """[N * H_kv] where `write` puts N tokens, given the (slot, row) of each."""
        starts = [slot * self.num_kv_heads * self.num_rows + row for slot, row in slots_rows]
        return (torch.tensor(starts, device=self.key.device)[:, None] + self._head_start).flatten()

    def place(self, flat_rows: Tensor, slots_rows: list[tuple[int, int]], positions: Tensor) -> None:
        """Labels the rows that the step is about to write in every layer: positions [N], no attention mass yet."""
        device = self.key.device
        if self.is_bounded:
            num_layers = len(self.layers)
            labels = positions.to(torch.int32).repeat_interleave(self.num_kv_heads).expand(num_layers, -1)
            self._position.view(num_layers, -1).index_copy_(1, flat_rows, labels)
            if self.column is not None:
                self.column.view(num_layers, -1).index_fill_(1, flat_rows, 0.0)
        else:
            plane_rows = torch.tensor([slot * self.num_rows + row for slot, row in slots_rows], device=device)
            self._position.view(-1).index_copy_(0, plane_rows, positions.to(torch.int32))

    def write(self, index: int, flat_rows: Tensor, key: Tensor, value: Tensor) -> None:
        """key, value [N, H_kv, D] into the rows of layer `layers[index]`."""
        self._flat_key[index].index_copy_(0, flat_rows, key.flatten(0, 1))
        self._flat_value[index].index_copy_(0, flat_rows, value.flatten(0, 1))

    def admit(
        self, index: int, slot: int, kept: Tensor | None, key: Tensor, value: Tensor, column: Tensor | None
    ) -> None:
        """Moves a finished prompt [H_kv, T, D] into the slot: the rows `kept` [H_kv, K], or all of them."""
        num_heads, num_tokens, head_dim = key.shape
        if kept is None:
            kept = torch.arange(num_tokens, device=self.key.device).expand(num_heads, -1)
        num_rows = kept.shape[1]
        wide = kept[:, :, None].expand(-1, -1, head_dim)
        self.key[index, slot, :, :num_rows] = prompt.key.gather(1, wide)
        self.value[index, slot, :, :num_rows] = prompt.value.gather(1, wide)
        self._position[index, slot, :, :num_rows] = kept
        if self.column is not None:
            assert prompt.column_sums is not None
            self.column[index, slot, :, :num_rows] = prompt.column_sums.gather(1, kept)

    def credit(self, accepted: list[tuple[int, int]]) -> None:
        """Adds the attention mass of the first n pending queries of each (slot, n) to the rows they looked at."""
        if self.column is None or self.pending_column is None:
            return
        slots = torch.tensor([slot for slot, _ in accepted], device=self.key.device)
        counts = torch.tensor([count for _, count in accepted], device=self.key.device)
        pending = self.pending_column[:, slots]
        is_accepted = torch.arange(pending.shape[3], device=self.key.device) < counts[:, None]
        self.column[:, slots] += (pending * is_accepted[None, :, None, :, None]).sum(dim=3)

    def overwrite(self, policy: KVPolicy, slots: list[int], num_new: int, next_positions: list[int]) -> None:
        """Lets the policy name `num_new` rows per KV head of each full slot, and puts the pending rows there."""
        device, num_layers = self.key.device, len(self.layers)
        index = torch.tensor(slots, device=device)
        full, new = slice(0, self.budget), slice(self.budget, self.budget + num_new)
        position = self._position[:, index]
        column = None if self.column is None else self.column[:, index]
        rows = Rows(
            position=position[..., full].flatten(0, 1),
            column=None if column is None else column[..., full].flatten(0, 1),
            next_position=torch.tensor(next_positions, device=device).repeat(num_layers),
        )
        victims = policy.victims(rows, num_new).view(num_layers, len(slots), self.num_kv_heads, num_new)
        target = (self._plane_start[:, index, :, None] + victims).flatten()
        for tensor in (self.key, self.value):
            tensor.view(-1, tensor.shape[-1]).index_copy_(
                0, target, tensor[:, index, :, new].reshape(-1, tensor.shape[-1])
            )
        self._position.view(-1).index_copy_(0, target, position[..., new].flatten())
        if self.column is not None and column is not None:
            self.column.view(-1).index_copy_(0, target, column[..., new].flatten())

    def tensors(self) -> list[Tensor]:
        optional = (self.column, self.pending_column, self.sink_key)
        return [self.key, self.value, self._position, *(tensor for tensor in optional if tensor is not None)]


class DenseStore:
    """Attributes:
    num_tokens: [S] committed tokens of each slot (rows of a layer: `group.rows_after(num_tokens)`).
    num_pending: [S] rows written after them and not committed yet.
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
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.policy = policy
        self.budgets = policy.budgets(num_layers=num_layers, max_model_len=max_model_len)
        for budget in sorted(set(self.budgets)):
            if budget < max_model_len and policy.evictable(budget) < max_query_len:
                raise ValueError(
                    f"kv_budget gives a layer {budget} rows, of which {policy.evictable(budget)} can be evicted; "
                    f"a step can commit {max_query_len} at once and needs as many"
                )
        self.groups = tuple(
            LayerGroup(
                layers=tuple(layer for layer, own in enumerate(self.budgets) if own == budget),
                budget=budget,
                num_slots=num_slots,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                max_model_len=max_model_len,
                max_query_len=max_query_len,
                policy=policy,
                dtype=dtype,
                device=device,
            )
            for budget in dict.fromkeys(self.budgets)
        )
        self.num_tokens = [0] * num_slots
        self.num_pending = [0] * num_slots
        self.next_position = [0] * num_slots

    def append(self, slot: int, num_tokens: int) -> None:
        """Prompt tokens, committed as they come."""
        self.num_tokens[slot] += num_tokens

    def write_pending(self, slot: int, num_tokens: int, first_position: int) -> None:
        if self.num_pending[slot]:
            raise ValueError(f"slot {slot} has {self.num_pending[slot]} pending rows; commit or free it first")
        self.num_pending[slot], self.next_position[slot] = num_tokens, first_position

    def commit(self, commits: tuple[tuple[int, int], ...]) -> None:
        """Accepts the first n pending rows of each (slot, n) and drops its others.

        Raises:
            ValueError: n is negative or more than are pending.
        """
        for slot, count in commits:
            if not 0 <= count <= self.num_pending[slot]:
                raise ValueError(f"slot {slot}: cannot commit {count} of {self.num_pending[slot]} pending rows")
        accepted = [(slot, count) for slot, count in commits if count]
        for group in self.groups:
            if group.is_bounded and accepted:
                self._commit_bounded(group, accepted)
        for slot, count in commits:
            self.num_tokens[slot] += count
            self.num_pending[slot] = 0

    def _commit_bounded(self, group: LayerGroup, accepted: list[tuple[int, int]]) -> None:
        group.credit(accepted)
        by_count: dict[int, list[tuple[int, int]]] = {}
        for slot, count in accepted:
            num_appended = min(count, group.budget - group.rows_after(self.num_tokens[slot]))
            if count > num_appended:
                first = self.next_position[slot] + num_appended
                by_count.setdefault(count - num_appended, []).append((slot, first))
        for count, slots in by_count.items():
            group.overwrite(self.policy, [slot for slot, _ in slots], count, [first for _, first in slots])

    def release(self, slot: int) -> None:
        self.num_tokens[slot] = self.num_pending[slot] = self.next_position[slot] = 0

    @property
    def num_bytes(self) -> int:
        """Sum of unique storages."""
        storages = [tensor.untyped_storage() for group in self.groups for tensor in group.tensors()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

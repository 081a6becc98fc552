"""PagedStore: rows of all slots in blocks of 32 that are allocated once and found through a table per slot.

    key, value [L, num_blocks, H_kv, 32, X]     parts that the codec stores, each row by itself
    table      [S, max_blocks] int32            one for all layers and KV heads: nothing is ever evicted, so that every
                                                head has the same rows, and row == position

A slot's rows are `[committed | pending | unused]` as in DenseStore; a rejected row is overwritten by the next. What
stands in a table past a slot's own blocks is some block or other: finite rows that nobody may see.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from codesign.engine.kv.codec import KVCodec, Parts
from codesign.engine.kv.place import ON_DEVICE
from codesign.engine.kv.tables import BlockTables, num_blocks_of
from codesign.engine.step import BLOCK_TOKENS, StepPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockUse:
    """What the blocks of a store hold at this moment.

    Attributes:
        rows_allocated: rows of blocks that sequences hold, per layer and KV head.
        rows_used: those of them with a token in them, pending ones included.
        shared_bytes: what the same sequences would need more if each had blocks of its own.
    """

    num_blocks: int
    blocks_used: int
    rows_allocated: int
    rows_used: int
    shared_bytes: int

    @property
    def fragmentation(self) -> float:
        """Share of the allocated rows that is not used."""
        return 1 - self.rows_used / self.rows_allocated if self.rows_allocated else 0.0


class PagedStore:
    """Attributes:
    num_tokens: [S] committed tokens of each slot.
    num_pending: [S] rows written after them and not committed yet.
    tables: who holds which block.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        max_model_len: int,
        codec: KVCodec,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert not codec.group_size, "only rows that are encoded one by one fit in blocks"
        self.codec, self.dtype, self.device, self.head_dim = codec, dtype, device, head_dim
        self.num_blocks, self._num_kv_heads = num_blocks, num_kv_heads
        # Zeros, not empty: masked rows are multiplied by 0, and 0 * NaN would reach a result.
        like = codec.encode(torch.zeros(1, head_dim, dtype=dtype, device=device))
        shape = (num_layers, num_blocks, num_kv_heads, BLOCK_TOKENS)
        self._key, self._value = (
            tuple(ON_DEVICE.zeros(*shape, part.shape[1], dtype=part.dtype, device=device) for part in like)
            for _ in ("key", "value")
        )
        max_blocks = num_blocks_of(max_model_len)
        self.table = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=device)
        self.tables = BlockTables(num_blocks, num_slots, max_blocks)
        self._head = torch.arange(num_kv_heads, device=device)
        self.num_tokens, self.num_pending = [0] * num_slots, [0] * num_slots

    def parts(self, layer: int) -> tuple[Parts, Parts]:
        """What is stored of key and value of a layer, parts [num_blocks, H_kv, 32, X]."""
        key, value = (tuple(part[layer] for part in parts) for parts in (self._key, self._value))
        return key, value

    def grow(self, plan: StepPlan) -> None:
        """Tables of the plan's sequences grow, and those that come in have what their first blocks hold.

        Raises:
            ValueError: as `BlockTables.grow`.
        """
        if not plan.blocks:
            return
        cells: list[tuple[int, int, int]] = []
        for slot, blocks, num_cached in zip(
            plan.slots, plan.blocks, plan.num_cached or [0] * len(plan.slots), strict=True
        ):
            if not blocks and not num_cached:
                continue
            first = len(self.tables.blocks[slot])
            self.tables.grow(slot, blocks, num_cached)
            cells += [(slot, first + index, block) for index, block in enumerate(blocks)]
            self.num_tokens[slot] += num_cached
        if cells:
            row, column, block = torch.tensor(cells, device=self.device).unbind(1)
            self.table[row, column] = block.to(torch.int32)

    def reserve(self, slot: int, count: int, *, is_pending: bool, is_staged: bool = False) -> None:
        """Room for the next `count` tokens of a slot, pending or of a prompt, which may be staged first.

        Raises:
            ValueError: as `BlockTables.write`.
        """
        self.tables.write(slot, self.num_tokens[slot], count, is_staged=is_staged)
        if is_pending:
            self.num_pending[slot] = count

    def table_of(self, slots: Sequence[int] | Tensor, num_rows: int) -> Tensor:
        """[B, H_kv, n] int32 blocks of the first `num_rows` rows of each slot; heads share theirs."""
        index = slots if isinstance(slots, Tensor) else torch.tensor(slots, device=self.device)
        return self.table[index, : num_blocks_of(num_rows)][:, None].expand(-1, self._num_kv_heads, -1)

    def rows(self, slot: Tensor, position: Tensor) -> Tensor:
        """[N * H_kv] rows for `write`, of slot and position [N]."""
        block = self.table[slot, position // BLOCK_TOKENS].long()
        row = (block[:, None] * self._num_kv_heads + self._head) * BLOCK_TOKENS
        return (row + position[:, None] % BLOCK_TOKENS).flatten()

    def write(self, layer: int, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """key, value [N, H_kv, D] into rows [N * H_kv] of the layer."""
        for parts, new in zip(self.parts(layer), (key, value), strict=True):
            for part, encoded in zip(parts, self.codec.encode(new.reshape(-1, new.shape[-1])), strict=True):
                part.view(-1, part.shape[-1]).index_copy_(0, rows, encoded)

    def read(self, layer: int, table: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """key, value [B, H_kv, num_rows, D] copied together out of the blocks in table [B, H_kv, n].

        What a slot does not have is anything finite.
        """
        block = (table.long() * self._num_kv_heads + self._head[:, None]).flatten()
        key, value = (
            self.codec.decode(tuple(_gathered(part, block, table.shape, num_rows) for part in parts), self.dtype)
            for parts in self.parts(layer)
        )
        return key, value

    def commit(self, commits: Sequence[tuple[int, int]]) -> None:
        """Accepts the first n pending rows of each (slot, n) and drops its others.

        Raises:
            ValueError: n is negative or more than are pending.
        """
        for slot, count in commits:
            if not 0 <= count <= self.num_pending[slot]:
                raise ValueError(f"slot {slot}: cannot commit {count} of {self.num_pending[slot]} pending rows")
        for slot, count in commits:
            self.num_tokens[slot] += count
            if count < self.num_pending[slot]:
                self.tables.rewind(slot, self.num_tokens[slot])
            self.num_pending[slot] = 0

    def truncate(self, slot: int, num_tokens: int) -> None:
        """Keeps the first `num_tokens` committed tokens of a slot, and all its blocks.

        Raises:
            ValueError: there are fewer, or tokens after them lie in blocks that are shared.
        """
        if not 0 <= num_tokens <= self.num_tokens[slot]:
            raise ValueError(f"slot {slot}: cannot keep {num_tokens} of {self.num_tokens[slot]} tokens")
        if num_tokens == self.num_tokens[slot]:
            return
        if self.tables.is_shared_after(slot, num_tokens):
            raise ValueError(f"slot {slot}: cannot keep {num_tokens} tokens; others share what comes after them")
        self.num_tokens[slot] = num_tokens
        self.tables.rewind(slot, num_tokens)

    def append(self, slot: int, num_tokens: int) -> None:
        """Prompt tokens, committed as they come."""
        self.num_tokens[slot] += num_tokens

    def release(self, slot: int) -> None:
        self.num_tokens[slot] = self.num_pending[slot] = 0
        self.tables.release(slot)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return sum(part.nbytes for part in (*self._key, *self._value)) // self.num_blocks

    @property
    def num_bytes(self) -> int:
        """Sum of unique storages: the blocks and the table on the device."""
        storages = [tensor.untyped_storage() for tensor in (*self._key, *self._value, self.table)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def use(self) -> BlockUse:
        tables, num_rows = self.tables, sum(self.num_tokens) + sum(self.num_pending)
        return BlockUse(
            num_blocks=self.num_blocks,
            blocks_used=tables.num_used,
            rows_allocated=tables.num_used * BLOCK_TOKENS,
            rows_used=num_rows - tables.num_shared * BLOCK_TOKENS,
            shared_bytes=tables.num_shared * self.block_bytes,
        )


def _gathered(part: Tensor, block: Tensor, shape: torch.Size, num_rows: int) -> Tensor:
    """[B, H_kv, num_rows, X] from the blocks of one KV head each that `block` counts in [num_blocks * H_kv]."""
    found = part.view(-1, BLOCK_TOKENS * part.shape[-1]).index_select(0, block)
    return found.view(*shape[:2], -1, part.shape[-1])[:, :, :num_rows]

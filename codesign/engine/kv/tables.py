"""BlockTables: which blocks of a paged cache each slot holds, in order, and how many slots read each. Plain integers.

    slot 0   [ 7  2  9 ]        7 and 2: full, shared by reference, never written again while both hold them
    slot 1   [ 7  2  4 ]        9 and 4: rows of one slot alone

Which block a slot gets is the scheduler's decision; here it is checked, because a block that is wrongly given shows one
sequence the rows of another and nothing else would tell. Tables only grow until the slot is released.
"""

from collections.abc import Sequence

from codesign.engine.step import BLOCK_TOKENS


def num_blocks_of(num_tokens: int) -> int:
    """Blocks that hold so many rows."""
    return -(-num_tokens // BLOCK_TOKENS)


class BlockTables:
    """Attributes:
    blocks: [S] block ids of each slot; row of position p: block p // 32, row p % 32 in it.
    num_used: blocks that at least one slot holds.
    num_shared: how many more there would be if every slot had blocks of its own.
    """

    def __init__(self, num_blocks: int, num_slots: int, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self.blocks: list[list[int]] = [[] for _ in range(num_slots)]
        self._num_cached = [0] * num_slots  # first blocks of each slot that others wrote
        self._num_readers = [0] * num_blocks
        self._num_written = [0] * num_blocks  # rows, from the first, since the block was last given as empty
        self.num_used = self.num_shared = 0

    def grow(self, slot: int, blocks: Sequence[int], num_cached: int) -> None:
        """Appends blocks, the first of which hold `num_cached` tokens already; a shared block never counts as empty.

        Raises:
            ValueError: more than a sequence can need, no such block, an empty one that is in use, a cached one that is
                not full, or cached tokens that are no whole blocks at the beginning.
        """
        table, (num_full, rest) = self.blocks[slot], divmod(num_cached, BLOCK_TOKENS)
        if len(table) + len(blocks) > self._max_blocks:
            raise ValueError(f"slot {slot}: a table of more than {self._max_blocks} blocks")
        if num_cached and (rest or table or not 0 < num_full <= len(blocks)):
            raise ValueError(
                f"slot {slot}: {num_cached} cached tokens in {len(blocks)} blocks after {len(table)}; they must be "
                f"whole blocks of {BLOCK_TOKENS} at the beginning of a sequence"
            )
        for index, block in enumerate(blocks):
            if not 0 <= block < len(self._num_readers):
                raise ValueError(f"slot {slot}: block {block} of {len(self._num_readers)}")
            if block in table:
                raise ValueError(f"slot {slot}: block {block} twice")
            if index < num_full:
                if self._num_written[block] < BLOCK_TOKENS:
                    raise ValueError(
                        f"slot {slot}: block {block} is given as cached, and {self._num_written[block]} of its "
                        f"{BLOCK_TOKENS} rows have been written"
                    )
            elif self._num_readers[block]:
                raise ValueError(f"slot {slot}: block {block} is in use")
            else:
                self._num_written[block] = 0
            self._count(block, 1)
            table.append(block)
        if num_full:
            self._num_cached[slot] = num_full

    def write(self, slot: int, first: int, count: int, *, is_staged: bool = False) -> None:
        """Rows of positions first .. first + count - 1 are about to be written; if staged, later.

        Raises:
            ValueError: the table is too short for them, or another slot reads a block of theirs.
        """
        table, stop = self.blocks[slot], first + count
        if num_blocks_of(stop) > len(table):
            raise ValueError(f"slot {slot}: {stop} tokens, and a table of {len(table)} blocks of {BLOCK_TOKENS}")
        for index in range(first // BLOCK_TOKENS, num_blocks_of(stop)):
            block = table[index]
            if index < self._num_cached[slot] or self._num_readers[block] > 1:
                raise ValueError(f"slot {slot}: block {block} is shared, and position {first} would be written there")
            if not is_staged:
                self._num_written[block] = min(BLOCK_TOKENS, stop - index * BLOCK_TOKENS)

    def rewind(self, slot: int, num_tokens: int) -> None:
        """What a slot has written past its first `num_tokens` tokens no longer counts."""
        for index in range(num_tokens // BLOCK_TOKENS, len(self.blocks[slot])):
            block = self.blocks[slot][index]
            left = max(0, num_tokens - index * BLOCK_TOKENS)
            self._num_written[block] = min(self._num_written[block], left)

    def is_shared_after(self, slot: int, num_tokens: int) -> bool:
        """Whether a block with rows past the first `num_tokens` tokens is another slot's too, or its work."""
        first = num_tokens // BLOCK_TOKENS
        blocks = self.blocks[slot][first:]
        return first < self._num_cached[slot] or any(self._num_readers[block] > 1 for block in blocks)

    def release(self, slot: int) -> None:
        """Gives up the blocks of a slot. Their rows stay until a block is given as empty."""
        for block in self.blocks[slot]:
            self._count(block, -1)
        self.blocks[slot], self._num_cached[slot] = [], 0

    def _count(self, block: int, change: int) -> None:
        before, after = self._num_readers[block], self._num_readers[block] + change
        self.num_used += min(after, 1) - min(before, 1)
        self.num_shared += max(after - 1, 0) - max(before - 1, 0)
        self._num_readers[block] = after

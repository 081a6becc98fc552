"""BlockAllocator: which blocks each sequence gets, and whether there are enough; the logical half of a paged cache.

A sequence's table is `sequence.blocks`: the row of position p is row p % BLOCK_TOKENS of block p // BLOCK_TOKENS, in
every layer and KV head. It comes with blocks for what is prefilled and grows when the next output needs it, so that
nothing is set aside for output that may not come. `Unpaged` stands for a cache whose slots have room for everything.
"""

from collections.abc import Collection
from typing import Protocol

from codesign.engine.block_pool import BlockPool
from codesign.engine.prefix_cache import PrefixCache
from codesign.engine.sequence import Sequence
from codesign.engine.step import BLOCK_TOKENS


class Allocator(Protocol):
    """What a scheduler asks about memory."""

    def check(self, sequence: Sequence) -> None:
        """Raises ValueError for a sequence that never has room."""

    def admit(self, sequence: Sequence, *, num_rows: int, beside: Collection[Sequence]) -> bool:
        """Whether there are blocks for the first `num_rows` rows of a sequence, and one more for each `beside` it that
        can still grow; then it has them. Those that hold the beginning of it already come first, and count as
        computed."""

    def room(self, sequence: Sequence) -> int:
        """How many tokens can come behind those that a sequence has computed."""

    def grow(self, sequence: Sequence, num_rows: int) -> bool:
        """Whether a table can hold so many rows; then it does."""

    def learn(self, sequence: Sequence) -> None:
        """Takes notice that a sequence has computed more tokens."""

    def release(self, sequence: Sequence) -> None:
        """Takes a sequence's blocks back."""

    def stats(self) -> dict[str, int]:
        """Counters since the start, and how many blocks there are of each kind now."""


class Unpaged:
    """Room for everything, nothing to share."""

    def check(self, sequence: Sequence) -> None:
        pass

    def admit(self, sequence: Sequence, *, num_rows: int, beside: Collection[Sequence]) -> bool:
        return True

    def room(self, sequence: Sequence) -> int:
        return sequence.most_tokens - sequence.num_computed

    def grow(self, sequence: Sequence, num_rows: int) -> bool:
        return True

    def learn(self, sequence: Sequence) -> None:
        pass

    def release(self, sequence: Sequence) -> None:
        pass

    def stats(self) -> dict[str, int]:
        return {}


UNPAGED = Unpaged()


class BlockAllocator:
    """Args:
    cache: what finds blocks that hold the beginning of a prompt already; None shares nothing.
    """

    def __init__(self, pool: BlockPool, cache: PrefixCache | None = None) -> None:
        self._pool, self._cache = pool, cache

    def check(self, sequence: Sequence) -> None:
        needed, num_blocks = _blocks_for(sequence.most_tokens), self._pool.num_blocks
        if needed > num_blocks:
            raise ValueError(f"request {sequence.request_id!r}: needs {needed} blocks, there are {num_blocks}")

    def admit(self, sequence: Sequence, *, num_rows: int, beside: Collection[Sequence]) -> bool:
        pool, found = self._pool, list[int]()
        if self._cache is not None and sequence.shares_prefix:
            found = self._cache.match(sequence)
        num_new = _blocks_for(num_rows) - len(found)
        spare = sum(len(own.blocks) < _blocks_for(own.most_tokens) for own in beside)
        if num_new + spare > pool.num_free - sum(map(pool.is_free, found)):
            return False
        for block in found:
            pool.share(block)
        sequence.blocks = found + pool.take(num_new)
        sequence.num_known_blocks, sequence.num_computed = len(found), len(found) * BLOCK_TOKENS
        if self._cache is not None and sequence.shares_prefix:
            self._cache.count(sequence, len(found))
        return True

    def room(self, sequence: Sequence) -> int:
        return (len(sequence.blocks) + self._pool.num_free) * BLOCK_TOKENS - sequence.num_computed

    def grow(self, sequence: Sequence, num_rows: int) -> bool:
        num_new = max(_blocks_for(num_rows) - len(sequence.blocks), 0)
        if num_new > self._pool.num_free:
            return False
        sequence.blocks += self._pool.take(num_new)
        return True

    def learn(self, sequence: Sequence) -> None:
        if self._cache is not None and sequence.shares_prefix:
            self._cache.learn(sequence)

    def release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks, sequence.num_known_blocks, sequence.num_sent_blocks = [], 0, 0

    def stats(self) -> dict[str, int]:
        pool, cache = self._pool, self._cache
        found = {
            "blocks": pool.num_blocks,
            "blocks_used": pool.num_blocks - pool.num_free,
            "blocks_free": pool.num_free,
            "blocks_shared": pool.num_shared,
        }
        if cache is not None:
            found |= {
                "prefix_lookups": cache.num_lookups,
                "prompt_tokens": cache.prompt_tokens,
                "prefix_hit_tokens": cache.hit_tokens,
                "prefix_evictions": pool.num_evictions,
            }
        return found


def _blocks_for(num_rows: int) -> int:
    return -(-num_rows // BLOCK_TOKENS)

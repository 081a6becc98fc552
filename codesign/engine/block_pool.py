"""BlockPool: which blocks of a paged cache are in use, by whom, and which goes next. Plain integers, no tensor.

    free list    oldest <-> ... <-> newest      intrusive and doubly linked, so that a block leaves it in O(1)
    take         the oldest ones; what was known of their rows is forgotten (evicted)
    share        a block whose rows are known, free or not: one reference more
    release      a sequence's blocks, last to first: the tail of a prompt ages before its head, which others may share,
                 so the order is least recently used over the leaves of all chains

Free does not mean forgotten: a labelled block keeps its rows until it is taken. One without a label is of no use to
anybody, and goes first. Kwon et al., PagedAttention, SOSP 2023; the list is vLLM's.
"""

from collections.abc import Sequence


class BlockPool:
    """Args:
    num_blocks: their ids are 0 .. num_blocks - 1.

    Attributes:
        num_evictions: labelled blocks that were taken for something else.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = self.num_free = num_blocks
        self.num_evictions = 0
        self._references = [0] * num_blocks
        self._labels: list[bytes | None] = [None] * num_blocks
        self._labelled: dict[bytes, int] = {}
        # Entry `num_blocks` is the list's two ends: after it comes the oldest, before it the newest.
        self._next: list[int] = [*range(1, num_blocks + 1), 0]
        self._previous: list[int] = [num_blocks, *range(num_blocks)]

    @property
    def num_shared(self) -> int:
        """Blocks that more than one sequence reads."""
        return sum(count > 1 for count in self._references)

    def is_free(self, block: int) -> bool:
        return not self._references[block]

    def find(self, label: bytes) -> int | None:
        """The block with this label, whether in use or free."""
        return self._labelled.get(label)

    def label(self, block: int, label: bytes) -> None:
        """Says what the rows of a block in use are. The first block with a label keeps it: a copy gets none."""
        if label not in self._labelled and self._labels[block] is None:
            self._labels[block] = label
            self._labelled[label] = block

    def take(self, count: int) -> list[int]:
        """Raises ValueError when fewer are free."""
        if count > self.num_free:
            raise ValueError(f"{count} blocks wanted, {self.num_free} free")
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        block = self._next[self.num_blocks]
        self._unlink(block)
        label = self._labels[block]
        if label is not None:
            self._labels[block] = None
            del self._labelled[label]
            self.num_evictions += 1
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more sequence reads a labelled block."""
        if not self._references[block]:
            self._unlink(block)
        self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Takes back one reference of each block of a sequence's table."""
        for block in reversed(blocks):
            assert self._references[block], "a block is released once for each time that it was given"
            self._references[block] -= 1
            if not self._references[block]:
                end = self.num_blocks
                self._link(block, after=end if self._labels[block] is None else self._previous[end])

    def _unlink(self, block: int) -> None:
        before, behind = self._previous[block], self._next[block]
        self._next[before], self._previous[behind] = behind, before
        self.num_free -= 1

    def _link(self, block: int, *, after: int) -> None:
        behind = self._next[after]
        self._next[after] = self._previous[behind] = block
        self._previous[block], self._next[block] = after, behind
        self.num_free += 1

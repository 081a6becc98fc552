"""The pool against the plainest model of it: a list of free blocks, oldest first, and a count for each."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from codesign.engine.block_pool import BlockPool

NUM_BLOCKS = 7
LABELS = [bytes([number]) for number in range(5)]


class PoolMachine(RuleBasedStateMachine):
    """Tables of several owners; what is free is a plain list, searched and cut from end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.free = list(range(NUM_BLOCKS))
        self.owned: list[list[int]] = []
        self.labels: dict[bytes, int] = {}
        self.num_evictions = 0

    def forget(self, block: int) -> None:
        for label, own in list(self.labels.items()):
            if own == block:
                del self.labels[label]
                self.num_evictions += 1

    @rule(count=st.integers(0, 4))
    def take(self, count: int) -> None:
        if count > len(self.free):
            with pytest.raises(ValueError, match=f"{count} blocks wanted, {len(self.free)} free"):
                self.pool.take(count)
            return
        expected, self.free = self.free[:count], self.free[count:]
        for block in expected:
            self.forget(block)
        assert self.pool.take(count) == expected, "the oldest go first"
        self.owned.append(expected)

    @precondition(lambda self: any(self.owned))
    @rule(data=st.data(), label=st.sampled_from(LABELS))
    def label(self, data: st.DataObject, label: bytes) -> None:
        block = data.draw(st.sampled_from([block for table in self.owned for block in table]))
        self.pool.label(block, label)
        if label not in self.labels and block not in self.labels.values():
            self.labels[label] = block

    @rule(labels=st.lists(st.sampled_from(LABELS), unique=True))
    def share(self, labels: list[bytes]) -> None:
        found = [self.labels[label] for label in labels if label in self.labels]
        for block in found:
            self.pool.share(block)
        self.free = [block for block in self.free if block not in found]
        self.owned.append(found)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        self.pool.release(table)
        still_used = {block for other in self.owned for block in other}
        for block in reversed(table):
            if block not in still_used:
                known = block in self.labels.values()
                self.free.insert(len(self.free) if known else 0, block)

    @invariant()
    def counts_agree(self) -> None:
        held = [block for table in self.owned for block in table]
        assert self.pool.num_free == len(self.free) == NUM_BLOCKS - len(set(held))
        assert [self.pool.is_free(block) for block in range(NUM_BLOCKS)] == [b in self.free for b in range(NUM_BLOCKS)]
        assert not set(held) & set(self.free)
        assert self.pool.num_shared == sum(held.count(block) > 1 for block in set(held))
        assert {label: self.pool.find(label) for label in LABELS} == {label: self.labels.get(label) for label in LABELS}
        assert self.pool.num_evictions == self.num_evictions


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_tail_of_a_table_is_taken_before_its_head() -> None:
    pool = BlockPool(4)
    table = pool.take(3)
    for number, block in enumerate(table):
        pool.label(block, bytes([number]))

    pool.release(table)

    assert pool.take(4) == [3, 2, 1, 0]


def test_block_that_nobody_knows_is_taken_before_one_that_somebody_may_ask_for() -> None:
    pool = BlockPool(3)
    known, unknown, other = (pool.take(1) for _ in range(3))
    for block in (*known, *other):
        pool.label(block, bytes([block]))

    for block in (known, other, unknown):
        pool.release(block)

    assert pool.take(3) == [*unknown, *known, *other]


def test_a_block_released_more_often_than_given_is_noticed() -> None:
    pool = BlockPool(2)
    table = pool.take(1)
    pool.release(table)

    with pytest.raises(AssertionError, match="released once for each time"):
        pool.release(table)

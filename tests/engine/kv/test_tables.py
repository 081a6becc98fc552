"""Block tables: what shared blocks are safe from, and figures that agree with counting."""

import random

import pytest

from codesign.engine.kv.tables import BlockTables, num_blocks_of


def sharing() -> BlockTables:
    tables = BlockTables(num_blocks=8, num_slots=3, max_blocks=4)
    tables.grow(0, [5, 2], 0)
    tables.write(0, 0, 40)
    tables.grow(1, [5, 6], 32)
    return tables


@pytest.mark.parametrize(("slot", "first", "count"), [(0, 0, 1), (0, 31, 2), (1, 0, 1), (1, 31, 1), (1, 30, 10)])
def test_nothing_is_written_into_a_shared_block(slot: int, first: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"slot {slot}: block 5 is shared, and position {first} would be written"):
        sharing().write(slot, first, count)


def test_nor_by_who_was_given_it_as_cached_once_its_writer_is_gone() -> None:
    tables = sharing()
    tables.release(0)
    with pytest.raises(ValueError, match="block 5 is shared"):
        tables.write(1, 31, 1)
    tables.write(1, 32, 1)


def test_a_writer_goes_on_in_its_own_blocks() -> None:
    tables = sharing()
    tables.write(0, 40, 24)
    tables.write(1, 32, 32)
    tables.grow(2, [5, 2, 7], 64)

    assert tables.blocks == [[5, 2], [5, 6], [5, 2, 7]]


def test_a_refused_sequence_leaves_counts_of_others_right() -> None:
    tables = sharing()
    with pytest.raises(ValueError, match="slot 2: block 2 is in use"):
        tables.grow(2, [5, 2], 32)
    tables.release(2)

    assert (tables.num_used, tables.num_shared) == (3, 1)


@pytest.mark.parametrize("seed", range(5))
def test_figures_agree_with_counting_the_tables(seed: int) -> None:
    rng, tables = random.Random(seed), BlockTables(num_blocks=20, num_slots=6, max_blocks=3)
    for _ in range(300):
        slot = rng.randrange(6)
        others = [own for own in tables.blocks if own]
        free = sorted(set(range(20)) - {block for own in others for block in own})
        if tables.blocks[slot]:
            tables.release(slot)
        elif others and rng.random() < 0.6:
            tables.grow(slot, [rng.choice(others)[0], *rng.sample(free, 1)], 32)
        else:
            tables.grow(slot, rng.sample(free, 2), 0)
            tables.write(slot, 0, 32)
        held = [block for own in tables.blocks for block in own]

        assert tables.num_used == len(set(held))
        assert tables.num_shared == len(held) - len(set(held))


def test_blocks_of_tokens() -> None:
    assert [num_blocks_of(tokens) for tokens in (0, 1, 32, 33)] == [0, 1, 1, 2]

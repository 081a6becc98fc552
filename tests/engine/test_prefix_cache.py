"""What a prompt finds, against a search through everything that was ever computed and is still there."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from codesign.engine.block_allocator import BlockAllocator
from codesign.engine.block_pool import BlockPool
from codesign.engine.prefix_cache import PrefixCache
from codesign.engine.sequence import Sequence
from codesign.engine.step import BLOCK_TOKENS
from codesign.spec.request import Request, SamplingParams

NUM_BLOCKS = 12


def sequence(tokens: list[int], *, max_tokens: int = 1) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens)
    return Sequence(Request(request_id="a", prompt_token_ids=tuple(tokens), sampling=sampling))


def admit(blocks: BlockAllocator, own: Sequence) -> bool:
    return blocks.admit(own, num_rows=own.num_prefill, beside=())


class PrefixMachine(RuleBasedStateMachine):
    """Few prompts over few kinds of blocks, so that beginnings meet. The oracle keeps, of every block, the tokens from
    the start of the sequence that wrote it, and compares whole token lists.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.cache = PrefixCache(self.pool, seed=b"x")
        self.blocks = BlockAllocator(self.pool, self.cache)
        self.running: list[Sequence] = []
        self.written: dict[int, list[int]] = {}  # block -> all tokens up to its end, by whoever filled it
        self.hit_tokens = self.prompt_tokens = 0

    def longest_common_prefix(self, tokens: list[int]) -> int:
        """Tokens of the longest beginning, in whole blocks and short of the last token, every block of which is there.

        Which copy of a block is known does not matter, nor does it to a prompt.
        """
        known = [self.written[block] for block in self.written if self.is_known(block)]
        length = 0
        while length + BLOCK_TOKENS < len(tokens) and tokens[: length + BLOCK_TOKENS] in known:
            length += BLOCK_TOKENS
        return length

    def is_known(self, block: int) -> bool:
        return self.pool._labels[block] is not None

    @rule(
        kinds=st.lists(st.integers(0, 1), min_size=0, max_size=4),
        rest=st.integers(0, BLOCK_TOKENS - 1),
        max_tokens=st.integers(1, 2 * BLOCK_TOKENS),
    )
    def come(self, kinds: list[int], rest: int, max_tokens: int) -> None:
        tokens = [kind for kind in kinds for _ in range(BLOCK_TOKENS)] + [5] * rest
        own = sequence(tokens or [5], max_tokens=max_tokens)
        expected, free = self.longest_common_prefix(own.token_ids), self.pool.num_free
        has_room = admit(self.blocks, own)
        if not has_room:
            assert not own.blocks and self.pool.num_free == free
            return
        assert own.num_computed == expected
        for index in range(expected // BLOCK_TOKENS):
            assert self.written[own.blocks[index]] == own.token_ids[: (index + 1) * BLOCK_TOKENS]
        for block in own.blocks[expected // BLOCK_TOKENS :]:
            self.written.pop(block, None)
        self.hit_tokens += expected
        self.prompt_tokens += own.num_prompt
        self.running.append(own)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 2 * BLOCK_TOKENS))
    def compute(self, data: st.DataObject, count: int) -> None:
        """Prompt tokens first; then outputs, one kind of block like a prompt's, so that a later prompt meets them."""
        own = data.draw(st.sampled_from(self.running))
        for _ in range(count):
            if own.num_computed == len(own.token_ids):
                if own.num_left <= 0 or not self.blocks.grow(own, own.num_computed + 1):
                    break
                own.append(own.token_ids[0])
            if own.num_computed // BLOCK_TOKENS == len(own.blocks):
                if not self.blocks.grow(own, own.num_computed + 1):
                    break
                self.written.pop(own.blocks[-1], None)
            own.num_computed += 1
            if own.num_computed % BLOCK_TOKENS == 0:
                self.written[own.blocks[own.num_computed // BLOCK_TOKENS - 1]] = own.token_ids[: own.num_computed]
        for block in own.blocks[-(-own.num_computed // BLOCK_TOKENS) :]:
            self.written.pop(block, None)
        self.blocks.learn(own)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        own = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.blocks.release(own)

    @invariant()
    def nothing_is_lost(self) -> None:
        held = {block for own in self.running for block in own.blocks}
        stats = self.blocks.stats()
        assert stats["blocks_used"] == len(held) == NUM_BLOCKS - stats["blocks_free"]
        assert (stats["prefix_hit_tokens"], stats["prompt_tokens"]) == (self.hit_tokens, self.prompt_tokens)
        for own in self.running:
            for block in own.blocks[own.num_computed // BLOCK_TOKENS :]:
                assert not self.is_known(block), "a block that is not full is known"
                assert sum(block in other.blocks for other in self.running) == 1, "a block to write in is shared"


PrefixMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestPrefix = PrefixMachine.TestCase


def known_to(blocks: BlockAllocator, tokens: list[int]) -> None:
    own = sequence(tokens)
    assert admit(blocks, own)
    own.num_computed = len(tokens)
    blocks.learn(own)
    blocks.release(own)


def make(num_blocks: int = 40, seed: bytes = b"x") -> tuple[BlockAllocator, PrefixCache]:
    pool = BlockPool(num_blocks)
    cache = PrefixCache(pool, seed=seed)
    return BlockAllocator(pool, cache), cache


@pytest.mark.parametrize(
    ("num_tokens", "num_found"),
    [(1, 0), (BLOCK_TOKENS, 0), (BLOCK_TOKENS + 1, 1), (3 * BLOCK_TOKENS, 2), (3 * BLOCK_TOKENS + 1, 3)],
)
def test_the_last_token_of_a_prompt_is_never_found(num_tokens: int, num_found: int) -> None:
    blocks, _ = make()
    tokens = random.Random(0).choices(range(99), k=num_tokens)
    known_to(blocks, tokens)

    again = sequence(tokens)
    admit(blocks, again)

    assert again.num_computed == num_found * BLOCK_TOKENS < num_tokens


def test_the_same_block_after_another_beginning_is_another_block() -> None:
    blocks, _ = make()
    same = [7] * BLOCK_TOKENS
    known_to(blocks, [1] * BLOCK_TOKENS + same)

    other = sequence([2] * BLOCK_TOKENS + same + [0])
    moved = sequence([*same, 0])
    admit(blocks, other)
    admit(blocks, moved)

    assert other.num_computed == moved.num_computed == 0


def test_keys_depend_on_the_seed() -> None:
    keys = []
    for seed in (b"fp32", b"bf16", b"fp32"):
        blocks, _ = make(seed=seed)
        known = sequence([3] * BLOCK_TOKENS)
        admit(blocks, known)
        known.num_computed = BLOCK_TOKENS
        blocks.learn(known)
        keys.append(known.block_keys)

    assert keys[0] == keys[2] != keys[1]


def test_tokens_above_32_bits_do_not_meet() -> None:
    blocks, _ = make()
    known_to(blocks, [2**32 + 1] * BLOCK_TOKENS)

    other = sequence([1] * BLOCK_TOKENS + [0])
    admit(blocks, other)

    assert other.num_computed == 0


def test_looking_up_costs_the_prompt_and_not_what_is_known() -> None:
    """Operations, not time: blocks asked for are those of the prompt, whether 10 prompts are known or 1000."""
    length, counts = 4 * BLOCK_TOKENS, []
    shared = [1] * (2 * BLOCK_TOKENS)
    for num_known in (10, 1000):
        blocks, cache = make(num_blocks=5 * 1000)
        for number in range(num_known):
            known_to(blocks, shared + random.Random(number).choices(range(2, 999), k=length - len(shared)))
        before = cache.num_probes
        for number in range(20):
            asked = sequence(shared + random.Random(f"asked {number}").choices(range(2, 999), k=length))
            admit(blocks, asked)
            assert asked.num_computed == len(shared)
        counts.append(cache.num_probes - before)

    assert counts == [20 * 3, 20 * 3]


def test_rows_of_drafts_behind_the_end_of_an_output_get_no_key() -> None:
    blocks, _ = make()
    own = sequence([1] * 30)
    admit(blocks, own)
    own.append(2)
    own.num_computed = BLOCK_TOKENS  # one draft more was accepted than its output had room for

    blocks.learn(own)

    assert own.num_known_blocks == 0 and not own.block_keys


def test_a_prompt_asked_about_again_and_again_is_hashed_once() -> None:
    """The first in the queue is looked up at every step until it has room."""
    blocks, _ = make(num_blocks=4)
    waiting = sequence([1] * (4 * BLOCK_TOKENS))
    holder = sequence([2] * BLOCK_TOKENS)
    admit(blocks, holder)

    assert not admit(blocks, waiting)
    keys = list(waiting.block_keys)
    assert not admit(blocks, waiting)

    assert len(keys) == 3 and all(old is new for old, new in zip(keys, waiting.block_keys, strict=True))


def test_a_refused_prompt_takes_no_reference_of_what_it_found() -> None:
    blocks, cache = make(num_blocks=4)
    known_to(blocks, [1] * (2 * BLOCK_TOKENS))
    holder = sequence([2] * BLOCK_TOKENS)
    admit(blocks, holder)

    assert not admit(blocks, sequence([1] * (4 * BLOCK_TOKENS)))

    assert blocks.stats()["blocks_free"] == 3 and cache.num_lookups == 2


def test_a_sequence_that_keeps_to_itself_neither_finds_nor_leaves_anything() -> None:
    blocks, cache = make()
    tokens = tuple([1] * (2 * BLOCK_TOKENS))
    sampling = SamplingParams(max_tokens=1)
    for shares in (False, True, False):
        own = Sequence(Request(request_id="a", prompt_token_ids=tokens, sampling=sampling), shares_prefix=shares)
        admit(blocks, own)
        assert own.num_computed == 0
        own.num_computed = len(tokens)
        blocks.learn(own)
        blocks.release(own)

    assert cache.num_lookups == 1

"""A model and its cache in plain integers: replays plans, asserts their contract, and says what comes next.

Each row holds (token, state), where the state hashes all tokens up to it, read from the row before. A row that is
missing, stale, or somebody else's therefore changes every later token, as it would in a real cache.
"""

import dataclasses
import random
from collections.abc import Sequence as Items

from codesign.engine.block_allocator import UNPAGED, Allocator, BlockAllocator
from codesign.engine.block_pool import BlockPool
from codesign.engine.prefix_cache import PrefixCache
from codesign.engine.sequence import Sequence
from codesign.engine.step import BLOCK_TOKENS, StepPlan
from codesign.spec.request import Request, SamplingParams

VOCAB_SIZE = 1000


def _state(before: int, token: int) -> int:
    return hash((before, token))  # of integers: the same in every process


def _next_token(state: int) -> int:
    return state % VOCAB_SIZE


def sequence(name: str, num_prompt: int, max_tokens: int, *, prefix: Items[int] = (), **sampling: object) -> Sequence:
    """A prompt of `prefix` and tokens that depend on `name` only."""
    prompt = (*prefix, *random.Random(name).choices(range(VOCAB_SIZE), k=num_prompt - len(prefix)))
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return Sequence(Request(request_id=name, prompt_token_ids=prompt, sampling=params))


def alone(prompt: Items[int], max_tokens: int, stop: int | None = None) -> list[int]:
    """The output of a request that has the machine to itself."""
    state, output = 0, list[int]()
    for token in prompt:
        state = _state(state, token)
    while len(output) < max_tokens:
        output.append(_next_token(state))
        if output[-1] == stop:
            break
        state = _state(state, output[-1])
    return output


def allocator(num_blocks: int, *, shares: bool) -> Allocator:
    """0 blocks: not paged."""
    if not num_blocks:
        return UNPAGED
    pool = BlockPool(num_blocks)
    return BlockAllocator(pool, PrefixCache(pool, seed=b"") if shares else None)


@dataclasses.dataclass
class Slot:
    """What the cache knows: how many rows are committed, how many pending, and where they are."""

    num_rows: int = 0
    num_pending: int = 0
    blocks: list[int] = dataclasses.field(default_factory=list)


class FakeModel:
    """Args:
    num_blocks: of the paged cache; 0 is a cache with room in every slot.
    """

    def __init__(self, num_slots: int, max_step_tokens: int, num_blocks: int = 0) -> None:
        self.slots = {slot: Slot() for slot in range(num_slots)}
        self.max_step_tokens, self.num_blocks = max_step_tokens, num_blocks
        self._cells: dict[tuple[int, int], tuple[int, int]] = {}  # (block, row) -> (token, state)

    def run(self, plan: StepPlan) -> list[int]:
        """The token after each logits row."""
        assert 0 < len(plan.token_ids) <= self.max_step_tokens
        self._settle(plan)
        assert not plan.truncates
        starts, rows, states = plan.query_starts, list[int](), dict[int, int]()
        outputs = [slot for slot, is_prompt in zip(plan.slots, plan.is_prompt, strict=True) if not is_prompt]
        assert list(plan.is_prompt) == sorted(plan.is_prompt), "outputs come before prompt chunks"
        assert outputs == sorted(outputs)
        self._grow(plan)
        for index, slot in enumerate(plan.slots):
            held, length = self.slots[slot], plan.query_lens[index]
            assert held.num_pending == 0, "queried with pending rows that nobody committed"
            tokens = range(starts[index], starts[index + 1])
            assert plan.positions[tokens.start : tokens.stop] == tuple(range(held.num_rows, held.num_rows + length))
            for token in tokens:
                states[token] = self._write(slot, plan.positions[token], plan.token_ids[token])
            if plan.is_prompt[index]:
                held.num_rows += length
            else:
                assert not plan.is_prompt_end[index]
                held.num_pending = length
            wants_logits = set(tokens) & set(plan.logits_rows)
            if plan.is_prompt[index]:
                assert wants_logits == ({tokens[-1]} if plan.is_prompt_end[index] else set())
            else:
                assert wants_logits in (set(tokens), set()), "of all output tokens, or of padding"
            rows += sorted(wants_logits)
        assert plan.logits_rows == tuple(rows)
        return [_next_token(states[row]) for row in rows]

    def _settle(self, plan: StepPlan) -> None:
        for slot, count in plan.commits:
            assert slot not in plan.frees
            assert 0 <= count <= self.slots[slot].num_pending
            self.slots[slot].num_rows += count
            self.slots[slot].num_pending = 0
        assert len({slot for slot, _ in plan.commits}) == len(plan.commits)
        for slot in plan.frees:
            self._check_rows(slot)
            self.slots[slot] = Slot()

    def _grow(self, plan: StepPlan) -> None:
        assert self.num_blocks or not (plan.blocks or plan.num_cached)
        nothing = [()] * len(plan.slots), [0] * len(plan.slots)
        cached = zip(plan.slots, plan.blocks or nothing[0], plan.num_cached or nothing[1], strict=True)
        for slot, blocks, num_cached in cached:
            held, num_full = self.slots[slot], num_cached // BLOCK_TOKENS
            assert num_cached % BLOCK_TOKENS == 0 and num_full <= len(blocks)
            assert not num_cached or not held.blocks, "only who comes in finds rows"
            used = {block for other in self.slots.values() for block in other.blocks}
            assert not used & set(blocks[num_full:]), "a block to write in belongs to nobody else"
            assert len(set(blocks)) == len(blocks) and set(blocks) <= set(range(self.num_blocks))
            held.blocks += blocks
            held.num_rows += num_cached
            self._check_rows(slot)

    def _write(self, slot: int, position: int, token: int) -> int:
        block, _ = where = self._where(slot, position)
        assert sum(block in held.blocks for held in self.slots.values()) == (1 if self.num_blocks else 0)
        before = self._cells[self._where(slot, position - 1)][1] if position else 0
        self._cells[where] = token, _state(before, token)
        return self._cells[where][1]

    def _where(self, slot: int, position: int) -> tuple[int, int]:
        if not self.num_blocks:
            return slot, position
        return self.slots[slot].blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS

    def _check_rows(self, slot: int) -> None:
        """Each row of a slot follows from the one before it."""
        before = 0
        for position in range(self.slots[slot].num_rows):
            token, state = self._cells[self._where(slot, position)]
            assert state == _state(before, token), f"row {position} of slot {slot} is not what was written there"
            before = state

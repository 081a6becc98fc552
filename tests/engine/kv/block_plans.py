"""Random plans with blocks: ids in any order and used again, prefixes shared with sequences that live or lived."""

import dataclasses
import random
from collections.abc import Iterable, Iterator

from codesign.engine.step import BLOCK_TOKENS, StepPlan


class Allocator:
    """The smallest one that can: a free list in random order; who is freed gives its blocks back at once.

    A block that is not held keeps its rows until it is given as empty, so that a cached one may come from it.
    """

    def __init__(self, num_blocks: int, num_slots: int, rng: random.Random) -> None:
        self.rng, self.held = rng, [0] * num_blocks
        self.tables: list[list[int]] = [[] for _ in range(num_slots)]

    def release(self, slot: int) -> None:
        for block in self.tables[slot]:
            self.held[block] -= 1
        self.tables[slot] = []

    def take(self, slot: int, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.held[block] += 1
            self.tables[slot].append(block)

    def grow(self, slot: int, num_tokens: int) -> tuple[int, ...]:
        """Empty blocks, as many as the first `num_tokens` tokens still need."""
        missing = -(-num_tokens // BLOCK_TOKENS) - len(self.tables[slot])
        free = [block for block, count in enumerate(self.held) if not count]
        blocks = tuple(self.rng.sample(free, max(0, missing)))
        self.take(slot, blocks)
        return blocks


def in_blocks(plans: Iterable[StepPlan], *, num_blocks: int, num_slots: int, seed: int) -> Iterator[StepPlan]:
    """The same plans with blocks; nothing is shared."""
    allocator = Allocator(num_blocks, num_slots, random.Random(seed))
    for plan in plans:
        for slot in plan.frees:
            allocator.release(slot)
        starts = plan.query_starts
        lasts = [plan.positions[stop - 1] for stop in starts[1:]]
        blocks = tuple(allocator.grow(slot, last + 1) for slot, last in zip(plan.slots, lasts, strict=True))
        yield dataclasses.replace(plan, blocks=blocks)


@dataclasses.dataclass
class _Sequence:
    prompt_left: int
    num_tokens: int = 0
    num_pending: int = 0


def sharing_plans(
    seed: int, *, num_steps: int, num_slots: int, num_blocks: int, max_model_len: int, max_query_len: int
) -> Iterator[StepPlan]:
    """Most sequences begin with full blocks of one that lives or lived, as a prefix cache would give them."""
    rng = random.Random(seed)
    allocator = Allocator(num_blocks, num_slots, rng)
    live: dict[int, _Sequence] = {}
    prefixes: list[list[int]] = []  # chains of full blocks, each begun by a sequence's first
    for _ in range(num_steps):
        commits: list[tuple[int, int]] = []
        frees: list[int] = []
        for slot, sequence in list(live.items()):
            if sequence.num_pending and rng.random() < 0.85:
                accepted = rng.randint(0, sequence.num_pending)
                commits.append((slot, accepted))
                sequence.num_tokens += accepted
                sequence.num_pending = 0
            if rng.random() < 0.06 or sequence.num_tokens + max_query_len > max_model_len:
                frees.append(slot)
                del live[slot]
        for slot in frees:
            allocator.release(slot)
        parts: list[tuple[int, int, int, bool, bool, tuple[int, ...], int]] = []
        for slot in rng.sample(range(num_slots), num_slots):
            num_cached = 0
            blocks: tuple[int, ...] = ()
            if slot not in live:
                if rng.random() < 0.5:
                    continue
                live[slot] = _Sequence(prompt_left=rng.randint(1, max_model_len * 3 // 4))
                prefix = rng.choice(prefixes) if prefixes and rng.random() < 0.7 else []
                prefix = prefix[: rng.randint(0, len(prefix))]
                if prefix:
                    blocks = tuple(prefix)
                    allocator.take(slot, prefix)
                    num_cached = live[slot].num_tokens = len(prefix) * BLOCK_TOKENS
                    live[slot].prompt_left = rng.randint(1, max(1, max_model_len - max_query_len - num_cached))
            elif live[slot].num_pending or rng.random() < 0.1:
                continue
            sequence = live[slot]
            first, is_prompt = sequence.num_tokens, bool(sequence.prompt_left)
            if is_prompt:
                length = min(sequence.prompt_left, rng.choice((1, 2, 13, 32, 64)))
                sequence.prompt_left -= length
                sequence.num_tokens += length
            else:
                length = sequence.num_pending = rng.choice((1, 1, max_query_len))
            grown = allocator.grow(slot, first + length)
            prefixes = [own for own in prefixes if not set(grown) & set(own)]  # what they held is gone
            is_end = is_prompt and not sequence.prompt_left
            parts.append((slot, first, length, is_prompt, is_end, blocks + grown, num_cached))
        positions = [first + step for _, first, length, *_ in parts for step in range(length)]
        yield StepPlan(
            commits=tuple(commits),
            frees=tuple(frees),
            slots=tuple(part[0] for part in parts),
            query_lens=tuple(part[2] for part in parts),
            token_ids=(0,) * len(positions),
            positions=tuple(positions),
            is_prompt=tuple(part[3] for part in parts),
            is_prompt_end=tuple(part[4] for part in parts),
            blocks=tuple(part[5] for part in parts),
            num_cached=tuple(part[6] for part in parts),
        )
        full = [allocator.tables[slot][: own.num_tokens // BLOCK_TOKENS] for slot, own in live.items()]
        prefixes += [own for own in full if own and own not in prefixes]

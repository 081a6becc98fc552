"""Random but legal traffic: prompts in chunks of any size, output, verification with rejects, aborts, slots reused."""

import dataclasses
import random
from collections.abc import Iterator

from codesign.engine.step import StepPlan


@dataclasses.dataclass
class _Sequence:
    prompt_left: int
    num_tokens: int = 0
    num_pending: int = 0


def random_plans(
    seed: int, *, num_steps: int, num_slots: int, max_model_len: int, max_query_len: int, accepts_all: bool = False
) -> Iterator[StepPlan]:
    """accepts_all: whatever is pending is committed by the next plan, whole."""
    rng = random.Random(seed)
    live: dict[int, _Sequence] = {}
    for _ in range(num_steps):
        commits, frees = [], []
        for slot, sequence in list(live.items()):
            if rng.random() < 0.04:
                frees.append(slot)
                del live[slot]
            elif sequence.num_pending and (accepts_all or rng.random() < 0.85):
                if accepts_all:
                    accepted = sequence.num_pending
                else:
                    accepted = rng.randint(1, sequence.num_pending) if rng.random() < 0.9 else 0
                commits.append((slot, accepted))
                sequence.num_tokens += accepted
                sequence.num_pending = 0
                if sequence.num_tokens + max_query_len > max_model_len:
                    frees.append(slot)
                    del live[slot]
        for slot in range(num_slots):
            if slot not in live and rng.random() < 0.5:
                live[slot] = _Sequence(prompt_left=rng.randint(1, rng.choice((6, max_model_len * 3 // 4))))
        parts = []
        for slot in sorted(live) if rng.random() < 0.8 else rng.sample(sorted(live), len(live)):
            sequence = live[slot]
            if sequence.num_pending or rng.random() < 0.1:
                continue
            if sequence.prompt_left:
                length = min(sequence.prompt_left, rng.choice((1, 2, 5, 13, 64)))
                sequence.prompt_left -= length
                parts.append((slot, sequence.num_tokens, length, True, sequence.prompt_left == 0))
                sequence.num_tokens += length
            else:
                length = rng.choice((1, 1, max_query_len))
                parts.append((slot, sequence.num_tokens, length, False, False))
                sequence.num_pending = length
        positions = [first + step for _, first, length, _, _ in parts for step in range(length)]
        yield StepPlan(
            commits=tuple(commits),
            frees=tuple(frees),
            slots=tuple(part[0] for part in parts),
            query_lens=tuple(part[2] for part in parts),
            token_ids=(0,) * len(positions),
            positions=tuple(positions),
            is_prompt=tuple(part[3] for part in parts),
            is_prompt_end=tuple(part[4] for part in parts),
        )

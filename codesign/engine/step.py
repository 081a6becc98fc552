"""StepPlan: everything one step of the engine needs, as plain integers.

    plan = scheduler.plan();  logits = runner.run(plan);  scheduler.commit(plan, sampler(plan, logits))

A plan holds no tensor and no pointer, so ranks can broadcast it, a test can replay it, and one loop serves decode
(`query_lens` 1), verification of K drafts (K + 1) and a prefill chunk (n). Four invariants carry the engine:

1. The sequence owns logical truth (token ids, positions). Nobody derives a position from a cache length.
2. Rows of (layer, slot, KV head) are an unordered set, each with its own position; causality is
   `row.position <= query.position`. Eviction overwrites in place.
3. Which rows go is decided by values; how many rows exist is a function of lengths only.
4. Write is not commit: a slot's rows are `[committed | pending]`; rejecting drafts means not advancing.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One step: first `commits`, then `frees`, then the packed queries of S sequences (N tokens in all).

    Attributes:
        commits: (slot, how many of its pending rows to accept); the rest of that slot's pending rows are dropped.
            Every slot with pending rows is listed once before it is queried again.
        frees: slots whose rows are released before anything is written.
        slots: [S] slot of each sequence of this step, each at most once.
        query_lens: [S] query tokens of each.
        token_ids: [N] packed, sequence after sequence.
        positions: [N] logical position of each token.
        is_prompt_end: [S] whether this chunk ends the sequence's prompt: after it the policy selects and the rows
            move from the staging area into the slot. Prompt chunks commit by themselves (a prompt is never rejected).
        is_prompt: [S] whether the chunk belongs to the prompt (staged) or to the output (pending rows).
        logits_rows: indices into [N] of the tokens whose logits are wanted.
    """

    commits: tuple[tuple[int, int], ...] = ()
    frees: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    query_lens: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    is_prompt: tuple[bool, ...] = ()
    is_prompt_end: tuple[bool, ...] = ()
    logits_rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        num_tokens = sum(self.query_lens)
        if not len(self.slots) == len(self.query_lens) == len(self.is_prompt) == len(self.is_prompt_end):
            raise ValueError("slots, query_lens, is_prompt and is_prompt_end must have one entry per sequence")
        if not len(self.token_ids) == len(self.positions) == num_tokens:
            raise ValueError("token_ids and positions must have one entry per query token")
        if len(set(self.slots)) != len(self.slots):
            raise ValueError("a slot can appear only once in a plan")

    @property
    def query_starts(self) -> tuple[int, ...]:
        """[S + 1] where each sequence's queries begin in the packed [N]; the last entry is N."""
        starts = [0]
        for length in self.query_lens:
            starts.append(starts[-1] + length)
        return tuple(starts)


def decode_plan(
    slots: Sequence[int],
    token_ids: Sequence[int],
    positions: Sequence[int],
    *,
    commits: Sequence[tuple[int, int]] = (),
    frees: Sequence[int] = (),
) -> StepPlan:
    """The plain decode step: one output token and one logits row for every slot."""
    ones = (1,) * len(slots)
    falses = (False,) * len(slots)
    return StepPlan(
        commits=tuple(commits),
        frees=tuple(frees),
        slots=tuple(slots),
        query_lens=ones,
        token_ids=tuple(token_ids),
        positions=tuple(positions),
        is_prompt=falses,
        is_prompt_end=falses,
        logits_rows=tuple(range(len(slots))),
    )

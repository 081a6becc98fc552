"""StepPlan: everything one step of the engine needs, as plain integers.

    plan, sampled = scheduler.plan(drafts);  logits = runner.run(plan);  scheduler.commit(sampled, tokens)

A plan holds no tensor and no pointer, so ranks can broadcast it, a test can replay it, and one loop serves decode
(`query_lens` 1), verification of K drafts (K + 1) and a prefill chunk (n). Four invariants carry the engine:

1. The sequence owns logical truth (token ids, positions). Nobody derives a position from a cache length.
2. Rows of (layer, slot, KV head) are an unordered set, each with its own position; causality is
   `row.position <= query.position`. Eviction overwrites in place.
3. Which rows go is decided by values; how many rows exist is a function of lengths only.
4. Write is not commit: a slot's rows are `[committed | pending]`; rejecting drafts means not advancing.
"""

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

BLOCK_TOKENS = 32  # rows of one block of a paged cache
NO_DRAFTS: Mapping[str, Sequence[int]] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One step: first `commits`, then `truncates`, then `frees`, then the packed queries of S sequences (N tokens).

    Attributes:
        commits: (slot, how many of its pending rows to accept); the rest of that slot's pending rows are dropped.
            Every slot with pending rows is listed once before it is queried again.
        truncates: (slot, how many of its committed tokens to keep), where a cache keeps every row: what a draft model
            ran ahead of its target is taken back.
        frees: slots whose rows are released before anything is written.
        slots: [S] slot of each sequence of this step, each at most once.
        query_lens: [S] query tokens of each.
        token_ids: [N] packed, sequence after sequence.
        positions: [N] logical position of each token.
        is_prompt_end: [S] whether this chunk ends the sequence's prompt: after it the policy selects and the rows
            move from the staging area into the slot. Prompt chunks commit by themselves (a prompt is never rejected).
        is_prompt: [S] whether the chunk belongs to the prompt (staged) or to the output (pending rows). Of a sequence
            that was preempted, the output so far belongs to the prompt that is prefilled again.
        logits_rows: indices into [N] of the tokens whose logits are wanted.
        blocks: [S] blocks of a paged cache that each sequence's table grows by before its tokens are written; empty
            where the cache is not paged.
        num_cached: [S] tokens before the first of this step that those blocks hold already, from another sequence with
            the same beginning; not 0 only in the step that admits a sequence. Empty means none.
    """

    commits: tuple[tuple[int, int], ...] = ()
    truncates: tuple[tuple[int, int], ...] = ()
    frees: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    query_lens: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    is_prompt: tuple[bool, ...] = ()
    is_prompt_end: tuple[bool, ...] = ()
    logits_rows: tuple[int, ...] = ()
    blocks: tuple[tuple[int, ...], ...] = ()
    num_cached: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        num_tokens = sum(self.query_lens)
        if not len(self.slots) == len(self.query_lens) == len(self.is_prompt) == len(self.is_prompt_end):
            raise ValueError("slots, query_lens, is_prompt and is_prompt_end must have one entry per sequence")
        if not len(self.token_ids) == len(self.positions) == num_tokens:
            raise ValueError("token_ids and positions must have one entry per query token")
        if any(len(own) not in (0, len(self.slots)) for own in (self.blocks, self.num_cached)):
            raise ValueError("blocks and num_cached must have one entry per sequence, or none")
        if len(set(self.slots)) != len(self.slots):
            raise ValueError("a slot can appear only once in a plan")

    @property
    def query_starts(self) -> tuple[int, ...]:
        """[S + 1] where each sequence's queries begin in the packed [N]; the last entry is N."""
        starts = [0]
        for length in self.query_lens:
            starts.append(starts[-1] + length)
        return tuple(starts)

    @property
    def num_logits(self) -> tuple[int, ...]:
        """Logits rows of each sequence that has any, in order: 1, or K + 1 where K drafts are verified."""
        starts, counts = self.query_starts, [0] * len(self.slots)
        for row in self.logits_rows:
            counts[bisect.bisect_right(starts, row) - 1] += 1
        return tuple(count for count in counts if count)


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

"""DraftPlans: what the draft's cache holds of each slot, and the plans that bring it up to date.

The draft runs ahead of the target. What it ran on beside the sequence's own tokens is remembered, and compared with
them when the sequence comes again: that is all there is to rolling back.

    sequence   a b c            draft ran on   a b c | x y        (and proposed x y z)
    sequence   a b c x w        keeps          a b c x            y is taken back, w comes next
    sequence   a b c x y z v    keeps          a b c x y          z and v come next, together
"""

import dataclasses
from collections.abc import Sequence as Items

from codesign.engine.sequence import Sequence
from codesign.engine.step import StepPlan, decode_plan

CATCH_UP_TOKENS = 2  # what a slot lacks after a step that kept every draft; more than that goes in like a prompt


@dataclasses.dataclass(slots=True)
class _Held:
    """Attributes:
    owner: whose rows these are; a slot that changed hands begins anew.
    num_tokens: rows of the owner's first tokens.
    ahead: tokens that it was run on after those, the owner's or not.
    num_pending: of all these rows, how many are not committed.
    """

    owner: Sequence | None = None
    num_tokens: int = 0
    ahead: list[int] = dataclasses.field(default_factory=list)
    num_pending: int = 0


class DraftPlans:
    """Args:
    max_step_tokens: most query tokens of one plan, at least one for each slot.
    """

    def __init__(self, num_slots: int, max_step_tokens: int) -> None:
        self._held = [_Held() for _ in range(num_slots)]
        self._max_step_tokens = max_step_tokens

    def release(self, request_id: str) -> None:
        for held in self._held:
            if held.owner is not None and held.owner.request_id == request_id:
                held.owner = None

    def first(self, sequences: Items[Sequence]) -> tuple[StepPlan, list[Sequence]]:
        """The plan that ingests what the draft has not seen of each sequence, and those that it is then done with:
        one logits row each, in order. A long text is ingested in several such plans, with nothing proposed meanwhile.
        """
        commits, truncates, frees = [], [], []
        for own in sequences:
            held = self._held[own.slot]
            if held.owner is not own:
                frees.append(own.slot)
                self._held[own.slot] = _Held(own)
                continue
            if held.num_pending:
                commits.append((own.slot, held.num_pending))
            num_rows = held.num_tokens + len(held.ahead)
            seen = own.token_ids[held.num_tokens : num_rows]
            num_right = next((i for i, (x, y) in enumerate(zip(held.ahead, seen, strict=False)) if x != y), len(seen))
            keep = min(held.num_tokens + num_right, len(own.token_ids) - 1)  # the last one's logits are wanted
            if keep < num_rows:
                truncates.append((own.slot, keep))
            self._held[own.slot] = _Held(own, keep)

        missing = {own.slot: len(own.token_ids) - self._held[own.slot].num_tokens for own in sequences}
        is_prompt = {slot: count > CATCH_UP_TOKENS for slot, count in missing.items()}
        budget, chosen = self._max_step_tokens, []
        # Outputs first and by slot, as attention batches them; then the shortest, which are drafted for soonest.
        for own in sorted(sequences, key=lambda s: (is_prompt[s.slot], is_prompt[s.slot] * missing[s.slot], s.slot)):
            count = min(missing[own.slot], budget)
            if count:
                chosen.append((own, count))
                budget -= count
        starts = [self._held[own.slot].num_tokens for own, _ in chosen]
        rows, done, num_queries = [], [], 0
        for own, count in chosen:
            num_queries += count
            held = self._held[own.slot]
            held.num_tokens += count
            if not is_prompt[own.slot]:
                held.num_pending = count
            if count == missing[own.slot]:
                rows.append(num_queries - 1)
                done.append(own)
        spans = [(own, start, start + count) for (own, count), start in zip(chosen, starts, strict=True)]
        plan = StepPlan(
            commits=tuple(commits),
            truncates=tuple(truncates),
            frees=tuple(frees),
            slots=tuple(own.slot for own, _ in chosen),
            query_lens=tuple(count for _, count in chosen),
            token_ids=tuple(token for own, start, stop in spans for token in own.token_ids[start:stop]),
            positions=tuple(position for _, start, stop in spans for position in range(start, stop)),
            is_prompt=tuple(is_prompt[own.slot] for own, _ in chosen),
            is_prompt_end=(False,) * len(chosen),
            logits_rows=tuple(rows),
        )
        return plan, done

    def next(self, sequences: Items[Sequence], token_ids: Items[int]) -> StepPlan:
        """The plan that runs each sequence on the token just proposed for it."""
        slots, positions, commits = [], [], []
        for own, token_id in zip(sequences, token_ids, strict=True):
            held = self._held[own.slot]
            if held.num_pending:
                commits.append((own.slot, held.num_pending))
            slots.append(own.slot)
            positions.append(held.num_tokens + len(held.ahead))
            held.ahead.append(token_id)
            held.num_pending = 1
        return decode_plan(slots, token_ids, positions, commits=commits)

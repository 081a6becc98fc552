"""continuous: who takes part is decided anew at every step.

Iteration-level scheduling (Yu et al., Orca, OSDI 2022): a request enters as soon as a slot is free and leaves when it
is done. One token budget per step (Agrawal et al., Sarathi-Serve, OSDI 2024): all running outputs first, one token
each, then prompt chunks fill what is left, so that a long prompt delays others by one bounded step at most.
"""

import dataclasses
import heapq
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Items

from codesign.engine.sequence import Sequence, StepOutput
from codesign.engine.step import NO_DRAFTS, StepPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuous:
    """First come, first served; lowest free slot first, so that running slots stay together."""

    def start(self, *, num_slots: int, max_step_tokens: int) -> "ContinuousScheduler":
        """Raises ValueError when one step could not hold one token of every slot."""
        return ContinuousScheduler(num_slots, max_step_tokens)


class ContinuousScheduler:
    """plan() -> run it -> commit(plan, tokens), in turns.

    Args:
        num_slots: most sequences at once.
        max_step_tokens: most query tokens of one step.
    """

    def __init__(self, num_slots: int, max_step_tokens: int) -> None:
        if max_step_tokens < num_slots:
            raise ValueError(
                f"max_step_tokens {max_step_tokens} cannot hold one token of each of {num_slots} sequences"
            )
        self._max_step_tokens = max_step_tokens
        self._free_slots = list(range(num_slots))
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._accepted: dict[int, int] = {}  # slot -> how many of its pending rows the next plan commits
        self._to_free: list[int] = []
        self._planned: list[tuple[Sequence, int]] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> bool:
        """Whether such a request was waiting or running; its slot is free for the next plan."""
        for sequence in (*self._waiting, *self._running.values()):
            if sequence.request_id == request_id:
                if sequence.slot < 0:
                    self._waiting.remove(sequence)
                else:
                    self._release(sequence)
                return True
        return False

    def decoding(self) -> list[Sequence]:
        """The sequences whose output the next plan goes on with, by slot: those that drafts can be proposed for."""
        return [self._running[slot] for slot in sorted(self._running) if not self._running[slot].is_prefilling]

    def plan(self, drafts: Mapping[str, Items[int]] = NO_DRAFTS) -> tuple[StepPlan, list[Sequence]]:
        """The next step, and the sequence behind its logits rows; the plan is empty when nothing has work.

        Args:
            drafts: request id -> tokens to verify behind its newest one. A plan takes as many of them, from the first,
                as its tokens allow; such a sequence has a logits row for each and one before them, in order.
        """
        budget = self._max_step_tokens
        commits: list[tuple[int, int]] = []
        slots: list[int] = []
        lengths: list[int] = []
        tokens: list[int] = []
        positions: list[int] = []
        sampled = self.decoding()
        unfinished = [own for own in self._running.values() if own.is_prefilling]  # at most one: one after the other
        num_decodes = len(sampled)
        budget -= num_decodes
        for sequence in sampled:
            slot, num_left = sequence.slot, sequence.num_left
            if slot in self._accepted:
                commits.append((slot, self._accepted[slot]))
            draft = list(drafts.get(sequence.request_id, ()))[: min(budget, num_left - 1)]
            budget -= len(draft)
            slots.append(slot)
            lengths.append(1 + len(draft))
            tokens += [sequence.token_ids[-1], *draft]
            positions += range(sequence.num_computed, sequence.num_computed + 1 + len(draft))
        rows = list(range(len(tokens)))
        self._planned = []
        ends = [False] * num_decodes

        while budget:
            sequence_or_none = unfinished.pop() if unfinished else self._admit()
            if sequence_or_none is None:
                break
            sequence = sequence_or_none
            start, stop = sequence.num_computed, min(sequence.num_computed + budget, sequence.num_prompt)
            budget -= stop - start
            slots.append(sequence.slot)
            lengths.append(stop - start)
            tokens.extend(sequence.token_ids[start:stop])
            positions.extend(range(start, stop))
            ends.append(stop == sequence.num_prompt)
            if ends[-1]:
                rows.append(len(tokens) - 1)
                sampled.append(sequence)
            self._planned.append((sequence, stop - start))

        if not slots:
            return StepPlan(), []  # what is to be freed waits for the next plan that runs
        plan = StepPlan(
            commits=tuple(commits),
            frees=tuple(self._to_free),
            slots=tuple(slots),
            query_lens=tuple(lengths),
            token_ids=tuple(tokens),
            positions=tuple(positions),
            is_prompt=(False,) * num_decodes + (True,) * (len(slots) - num_decodes),
            is_prompt_end=tuple(ends),
            logits_rows=tuple(rows),
        )
        self._to_free = []
        self._accepted = {}
        return plan, sampled

    def commit(self, sampled: Items[Sequence], tokens: Items[Items[int]]) -> list[StepOutput]:
        """Takes the new tokens of each sequence of the last plan that has logits rows: the drafts that it keeps, then
        one more. Who is done gives up its slot, and what comes after its last token is dropped."""
        is_decoding = {own.request_id for own in sampled if not own.is_prefilling}
        for sequence, num_tokens in self._planned:
            sequence.num_computed += num_tokens
        self._planned = []
        outputs = []
        for sequence, own in zip(sampled, tokens, strict=True):
            if sequence.request_id in is_decoding:
                sequence.num_computed += len(own)
                self._accepted[sequence.slot] = len(own)
            for token_id in own:
                output = sequence.append(token_id)
                outputs.append(output)
                if output.finish_reason:
                    self._release(sequence)
                    break
        return outputs

    def _admit(self) -> Sequence | None:
        if not self._waiting or not self._free_slots:
            return None
        sequence = self._waiting.popleft()
        sequence.slot = heapq.heappop(self._free_slots)
        self._running[sequence.slot] = sequence
        return sequence

    def _release(self, sequence: Sequence) -> None:
        del self._running[sequence.slot]
        self._accepted.pop(sequence.slot, None)
        self._to_free.append(sequence.slot)
        heapq.heappush(self._free_slots, sequence.slot)

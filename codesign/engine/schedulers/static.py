"""static: a batch enters together and leaves together; the plain comparison for `continuous`.

Request-level batching, as servers did it before Orca: nobody is admitted while a batch runs, all prompts are prefilled
before the first output goes on, and the batch is padded to its longest output: sequences that are done are computed on,
a query each and no row kept, until the last one is. Their outputs have ended all the same. Memory is set aside for the
longest output that each may have, so nothing is ever preempted. Cost: the batch's time is its longest output's.

Padding takes no logits row, which flatters this scheduler by the head's share of a step.
"""

import dataclasses
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Items

from codesign.engine.block_allocator import UNPAGED, Allocator
from codesign.engine.sequence import Sequence, StepOutput
from codesign.engine.slots import Slots
from codesign.engine.step import NO_DRAFTS, StepPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """First come, first served, batch by batch."""

    def start(self, *, num_slots: int, max_step_tokens: int, allocator: Allocator = UNPAGED) -> "StaticScheduler":
        """Raises ValueError when one step could not hold one token of every slot."""
        return StaticScheduler(num_slots, max_step_tokens, allocator)


class StaticScheduler:
    """Args: as those of ContinuousScheduler."""

    def __init__(self, num_slots: int, max_step_tokens: int, allocator: Allocator) -> None:
        self._max_step_tokens = max_step_tokens
        self._waiting: deque[Sequence] = deque()
        self._slots, self._allocator = Slots(num_slots, max_step_tokens, allocator), allocator

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._slots.running)

    def add(self, sequence: Sequence) -> None:
        """Raises ValueError for a sequence that would not have room if it were alone."""
        self._allocator.check(sequence)
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> bool:
        """Whether such a request was waiting or running; an aborted one is not padded."""
        for sequence in (*self._waiting, *self._running()):
            if sequence.request_id == request_id and not sequence.finish_reason:
                if sequence.slot < 0:
                    self._waiting.remove(sequence)
                else:
                    self._slots.leave(sequence)
                    self._end_batch()
                return True
        return False

    def decoding(self) -> list[Sequence]:
        """The sequences whose output the next plan goes on with, by slot: none while prompts come in."""
        if any(own.is_prefilling for own in self._running()):
            return []
        return [own for own in self._running() if not own.finish_reason]

    def plan(self, drafts: Mapping[str, Items[int]] = NO_DRAFTS) -> tuple[StepPlan, list[Sequence]]:
        """As that of ContinuousScheduler."""
        if not self._slots.running:
            self._admit_batch()
        budget = self._max_step_tokens
        unfinished = [own for own in self._running() if own.is_prefilling]
        for sequence in unfinished:
            length = min(budget, sequence.num_prefill - sequence.num_computed)
            if length:
                self._slots.add_prompt(sequence, length)
                budget -= length
        if not unfinished:
            budget -= len(self._slots.running)
            for sequence in self._running():
                if sequence.finish_reason:
                    self._slots.add_padding(sequence)
                    continue
                draft = drafts.get(sequence.request_id, ())[: min(budget, sequence.num_left - 1)]
                budget -= len(draft)
                self._slots.add_output(sequence, draft)
        return self._slots.finish_plan()

    def commit(self, sampled: Items[Sequence], tokens: Items[Items[int]]) -> list[StepOutput]:
        """As that of ContinuousScheduler; the slots are given up when the whole batch is done."""
        outputs = self._slots.take(sampled, tokens)
        self._end_batch()
        return outputs

    def stats(self) -> dict[str, int]:
        """Counters since the start, and the blocks of a paged cache as they are now."""
        return {"preemptions": 0, **self._allocator.stats()}

    def _running(self) -> list[Sequence]:
        return [self._slots.running[slot] for slot in sorted(self._slots.running)]

    def _admit_batch(self) -> None:
        """As many as there are slots, and blocks for the longest output of each."""
        while self._waiting and self._slots.has_free:
            sequence = self._waiting[0]
            if not self._allocator.admit(
                sequence, num_rows=sequence.most_tokens, beside=()
            ):  # the last row is padding's
                return
            self._slots.enter(self._waiting.popleft())

    def _end_batch(self) -> None:
        if all(own.finish_reason for own in self._slots.running.values()):
            for sequence in self._running():
                self._slots.leave(sequence)

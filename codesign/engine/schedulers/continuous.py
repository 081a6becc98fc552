"""continuous: who takes part is decided anew at every step.

Iteration-level scheduling (Yu et al., Orca, OSDI 2022): a request enters as soon as a slot is free and leaves when it
is done. One token budget per step (Agrawal et al., Sarathi-Serve, OSDI 2024): all running outputs first, one token
each, then prompt chunks fill what is left, so that a long prompt delays others by one bounded step at most.

Where the cache is paged, memory is given out block by block, and may run out (Kwon et al., PagedAttention, SOSP 2023).
Then the sequence that was admitted last gives up its blocks and waits in front of all others; later it prefills its
prompt and its output so far again, and goes on as if nothing had happened. The oldest is never the one, so that it
gets through whatever comes after it: strictly first come, first served, and nobody starves.
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
class Continuous:
    """First come, first served.

    Args:
        prefill_chunk_tokens: most prompt tokens in one step, so that outputs wait less for a long prompt; None: as many
            as `max_step_tokens` leaves room for.
    """

    prefill_chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        chunk = self.prefill_chunk_tokens
        if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
            raise ValueError(f"prefill_chunk_tokens must be a whole number from 1, got {chunk!r}")

    def start(self, *, num_slots: int, max_step_tokens: int, allocator: Allocator = UNPAGED) -> "ContinuousScheduler":
        """Raises ValueError when one step could not hold one token of every slot."""
        chunk = max_step_tokens if self.prefill_chunk_tokens is None else self.prefill_chunk_tokens
        return ContinuousScheduler(num_slots, max_step_tokens, chunk, allocator)


class ContinuousScheduler:
    """plan() -> run it -> commit(sampled, tokens), in turns.

    Args:
        num_slots: most sequences at once.
        max_step_tokens: most query tokens of one step.
        chunk_tokens: most prompt tokens of one step.
        allocator: the blocks of a paged cache.
    """

    def __init__(self, num_slots: int, max_step_tokens: int, chunk_tokens: int, allocator: Allocator) -> None:
        self._max_step_tokens, self._chunk_tokens = max_step_tokens, chunk_tokens
        self._waiting: deque[Sequence] = deque()
        self._slots, self._allocator = Slots(num_slots, max_step_tokens, allocator), allocator
        self._num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._slots.running)

    def add(self, sequence: Sequence) -> None:
        """Raises ValueError for a sequence that would not have room if it were alone."""
        self._allocator.check(sequence)
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> bool:
        """Whether such a request was waiting or running; its slot is free for the next plan."""
        for sequence in (*self._waiting, *self._slots.running.values()):
            if sequence.request_id == request_id:
                if sequence.slot < 0:
                    self._waiting.remove(sequence)
                else:
                    self._slots.leave(sequence)
                return True
        return False

    def decoding(self) -> list[Sequence]:
        """The sequences whose output the next plan goes on with, by slot: those that drafts can be proposed for. Where
        memory runs out, it leaves some of them out."""
        running = self._slots.running
        return [running[slot] for slot in sorted(running) if not running[slot].is_prefilling]

    def plan(self, drafts: Mapping[str, Items[int]] = NO_DRAFTS) -> tuple[StepPlan, list[Sequence]]:
        """The next step, and the sequence behind its logits rows; the plan is empty when nothing has work.

        Args:
            drafts: request id -> tokens to verify behind its newest one. A plan takes as many of them, from the first,
                as its tokens and free blocks allow; such a sequence has a logits row for each and one before them, in
                order.
        """
        num_preemptions = self._num_preemptions
        self._make_room()
        decoding = self.decoding()
        budget = self._max_step_tokens - len(decoding)
        for sequence in decoding:
            draft = drafts.get(sequence.request_id, ())
            if draft:
                draft = draft[: min(budget, sequence.num_left - 1, self._allocator.room(sequence) - 1)]
                self._allocator.grow(sequence, sequence.num_computed + 1 + len(draft))
                budget -= len(draft)
            self._slots.add_output(sequence, draft)

        # At most one is unfinished: the one admitted last, since prompts come one after the other.
        unfinished = [own for own in self._slots.running.values() if own.is_prefilling]
        budget = min(budget, self._chunk_tokens)
        while budget:
            if unfinished:
                sequence = unfinished.pop()
            elif self._num_preemptions > num_preemptions or not self._admit_next():
                break
            else:
                sequence = next(reversed(self._slots.running.values()))
            length = min(budget, sequence.num_prefill - sequence.num_computed)
            budget -= length
            self._slots.add_prompt(sequence, length)
        return self._slots.finish_plan()

    def commit(self, sampled: Items[Sequence], tokens: Items[Items[int]]) -> list[StepOutput]:
        """Takes the new tokens of each sequence of the last plan that has logits rows: the drafts that it keeps, then
        one more. Who is done gives up its slot, and what comes after its last token is dropped."""
        outputs = self._slots.take(sampled, tokens)
        for sequence in sampled:
            if sequence.finish_reason:
                self._slots.leave(sequence)
        return outputs

    def stats(self) -> dict[str, int]:
        """Counters since the start, and the blocks of a paged cache as they are now."""
        return {"preemptions": self._num_preemptions, **self._allocator.stats()}

    def _make_room(self) -> None:
        """A row for the next token of every running output, the oldest first; the youngest give way where it must be.

        Drafts come after this: nobody is preempted for a guess.
        """
        for sequence in list(self._slots.running.values()):
            if sequence.slot < 0 or sequence.is_prefilling:
                continue
            while not self._allocator.grow(sequence, sequence.num_computed + 1):
                youngest = next(reversed(self._slots.running.values()))
                self._preempt(youngest)
                if youngest is sequence:
                    break

    def _preempt(self, sequence: Sequence) -> None:
        self._num_preemptions += 1
        self._slots.leave(sequence)
        sequence.preempt()
        self._waiting.appendleft(sequence)

    def _admit_next(self) -> bool:
        """Only the first in the queue may be admitted, and only when its blocks leave one for each that runs: those
        will want it within BLOCK_TOKENS steps, and admitting somebody to preempt him soon gains nothing."""
        if not self._waiting or not self._slots.has_free:
            return False
        sequence = self._waiting[0]
        if not self._allocator.admit(sequence, num_rows=sequence.num_prefill, beside=self._slots.running.values()):
            return False
        self._slots.enter(self._waiting.popleft())
        return True

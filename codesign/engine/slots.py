"""Slots: who holds a slot of the cache, and the step that is being put together for them.

What every scheduler does alike; whom it admits, and when, is its own.

    slots.enter(sequence)                                                 admission
    slots.add_output(sequence, draft)  .add_padding  .add_prompt          one step, sequence after sequence
    plan, sampled = slots.finish_plan()
    outputs = slots.take(sampled, tokens)                                 its results
    slots.leave(sequence)                                                 done, aborted or preempted
"""

import dataclasses
import heapq
from collections.abc import Sequence as Items

from codesign.engine.block_allocator import Allocator
from codesign.engine.sequence import Sequence, StepOutput
from codesign.engine.step import StepPlan


@dataclasses.dataclass
class _Step:
    """A StepPlan on its way; the lists are its fields."""

    slots: list[int] = dataclasses.field(default_factory=list)
    query_lens: list[int] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    is_prompt: list[bool] = dataclasses.field(default_factory=list)
    is_prompt_end: list[bool] = dataclasses.field(default_factory=list)
    logits_rows: list[int] = dataclasses.field(default_factory=list)
    blocks: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    num_cached: list[int] = dataclasses.field(default_factory=list)
    commits: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    sampled: list[Sequence] = dataclasses.field(default_factory=list)
    chunks: list[tuple[Sequence, int]] = dataclasses.field(default_factory=list)


class Slots:
    """Lowest free slot first, so that running slots stay together.

    Args:
        num_slots: most sequences at once.
        max_step_tokens: most query tokens of one step. ValueError when it cannot hold one of each slot.

    Attributes:
        running: slot -> sequence, in the order of admission.
        allocator: the blocks of each, where the cache is paged.
    """

    def __init__(self, num_slots: int, max_step_tokens: int, allocator: Allocator) -> None:
        if max_step_tokens < num_slots:
            raise ValueError(
                f"max_step_tokens {max_step_tokens} cannot hold one token of each of {num_slots} sequences"
            )
        self.running: dict[int, Sequence] = {}
        self.allocator = allocator
        self._free = list(range(num_slots))
        self._to_free: list[int] = []
        self._accepted: dict[int, int] = {}  # slot -> how many of its pending rows the next plan commits
        self._step = _Step()
        self._chunks: list[tuple[Sequence, int]] = []  # prompt tokens of the plan that runs

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    def enter(self, sequence: Sequence) -> None:
        sequence.slot = heapq.heappop(self._free)
        self.running[sequence.slot] = sequence

    def leave(self, sequence: Sequence) -> None:
        """The next plan that runs frees the slot before anybody uses it again."""
        del self.running[sequence.slot]
        self._accepted.pop(sequence.slot, None)
        self.allocator.release(sequence)
        self._to_free.append(sequence.slot)
        heapq.heappush(self._free, sequence.slot)

    def add_output(self, sequence: Sequence, draft: Items[int] = ()) -> None:
        """Its newest token, and drafts to verify behind it: as many logits rows."""
        first = len(self._step.token_ids)
        self._add_pending(sequence, [sequence.token_ids[-1], *draft])
        self._step.logits_rows += range(first, len(self._step.token_ids))
        self._step.sampled.append(sequence)

    def add_padding(self, sequence: Sequence) -> None:
        """A query of a sequence that is done: computed like the others, its row never accepted."""
        self._add_pending(sequence, sequence.token_ids[-1:])
        self._accepted[sequence.slot] = 0

    def _add_pending(self, sequence: Sequence, token_ids: list[int]) -> None:
        if sequence.slot in self._accepted:
            self._step.commits.append((sequence.slot, self._accepted.pop(sequence.slot)))
        self._add(sequence, token_ids, is_prompt=False, is_prompt_end=False)

    def add_prompt(self, sequence: Sequence, num_tokens: int) -> None:
        """The next tokens of what it has to prefill; a logits row when they are the last."""
        start, stop = sequence.num_computed, sequence.num_computed + num_tokens
        is_end = stop == sequence.num_prefill
        self._add(sequence, sequence.token_ids[start:stop], is_prompt=True, is_prompt_end=is_end)
        self._step.chunks.append((sequence, num_tokens))
        if is_end:
            self._step.logits_rows.append(len(self._step.token_ids) - 1)
            self._step.sampled.append(sequence)

    def _add(self, sequence: Sequence, token_ids: list[int], *, is_prompt: bool, is_prompt_end: bool) -> None:
        step, first = self._step, sequence.num_computed
        new_blocks: tuple[int, ...] = ()
        num_cached = 0
        if len(sequence.blocks) > sequence.num_sent_blocks:
            new_blocks = tuple(sequence.blocks[sequence.num_sent_blocks :])
            num_cached = 0 if sequence.num_sent_blocks else first
            sequence.num_sent_blocks = len(sequence.blocks)
        step.blocks.append(new_blocks)
        step.num_cached.append(num_cached)
        step.slots.append(sequence.slot)
        step.query_lens.append(len(token_ids))
        step.token_ids += token_ids
        step.positions += range(first, first + len(token_ids))
        step.is_prompt.append(is_prompt)
        step.is_prompt_end.append(is_prompt_end)

    def finish_plan(self) -> tuple[StepPlan, list[Sequence]]:
        """The step, and the sequence behind its logits rows; it is empty when nobody was added."""
        step, self._step = self._step, _Step()
        self._chunks = step.chunks
        if not step.slots:
            return StepPlan(), []  # what is to be freed waits for the next plan that runs
        plan = StepPlan(
            commits=tuple(step.commits),
            frees=tuple(self._to_free),
            slots=tuple(step.slots),
            query_lens=tuple(step.query_lens),
            token_ids=tuple(step.token_ids),
            positions=tuple(step.positions),
            is_prompt=tuple(step.is_prompt),
            is_prompt_end=tuple(step.is_prompt_end),
            logits_rows=tuple(step.logits_rows),
            blocks=tuple(step.blocks) if any(step.blocks) else (),
            num_cached=tuple(step.num_cached) if any(step.num_cached) else (),
        )
        self._to_free = []
        return plan, step.sampled

    def take(self, sampled: Items[Sequence], tokens: Items[Items[int]]) -> list[StepOutput]:
        """What the plan gave: for each sequence with logits rows the drafts that it keeps, then one more token. What
        comes after the last token of a sequence is dropped."""
        is_decoding = {own.request_id for own in sampled if not own.is_prefilling}
        for sequence, num_tokens in self._chunks:
            sequence.num_computed += num_tokens
        outputs = []
        for sequence, own in zip(sampled, tokens, strict=True):
            if sequence.request_id in is_decoding:
                sequence.num_computed += len(own)
                self._accepted[sequence.slot] = len(own)
            for token_id in own:
                outputs.append(sequence.append(token_id))
                if sequence.finish_reason:
                    break
        for sequence in (*(sequence for sequence, _ in self._chunks), *sampled):
            self.allocator.learn(sequence)
        self._chunks = []
        return outputs

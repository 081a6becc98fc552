"""Step costs, measured on the built engine before its first request: the only place of it that reads a clock.

Random sequences go through the engine's own scheduler and runner. For each batch size (powers of two and the largest)
rounds over all K are interleaved, so that a machine that gets slower meanwhile does so for every K. After a round of
warm-up the least of the others counts: whatever else the machine does only ever adds, and one of a few rounds is mostly
free of it where their median is not (beside other work on both of two cores, medians of seven rounds chose K = 1 where
3 was best). Afterwards nothing of it is left in a slot.
"""

import random
import time
from collections.abc import Sequence as Items

from codesign.engine.engine import Scheduler
from codesign.engine.runner import SingleRunner
from codesign.engine.sequence import Sequence
from codesign.engine.speculate.adaptive import StepCosts
from codesign.engine.speculate.exact import Draft, verify
from codesign.engine.speculate.proposer import Proposer
from codesign.spec.request import Request, SamplingParams

_PROMPT_TOKENS = 64
_MIN_ROUNDS, _MAX_ROUNDS = 3, 15
_MAX_S = 2.0  # for one batch size, once it has its least number of rounds
_MAX_STEPS_TO_FILL = 1000


def calibrate(
    scheduler: Scheduler,
    runner: SingleRunner,
    proposer: Proposer,
    *,
    num_slots: int,
    num_draft_tokens: int,
    max_step_tokens: int,
    max_model_len: int,
    vocab_size: int,
) -> StepCosts:
    """Costs in milliseconds for batch sizes up to `num_slots`, as far as they fit."""
    bench = _Bench(scheduler, runner, proposer, max_model_len=max_model_len, vocab_size=vocab_size)
    target: dict[int, dict[int, float]] = {}
    draft: dict[int, dict[int, float]] = {}
    for batch_size in _up_to(num_slots):
        counts = [0, *(k for k in _up_to(num_draft_tokens) if batch_size * (k + 1) <= max_step_tokens)]
        seen: list[dict[int, tuple[float, float]]] = []
        deadline = time.perf_counter() + _MAX_S
        while len(seen) <= _MIN_ROUNDS or (len(seen) <= _MAX_ROUNDS and time.perf_counter() < deadline):
            if not bench.fill(batch_size, max(counts)):
                break
            seen.append({k: bench.cycle(k) for k in counts})
        if len(seen) < 2:
            break  # so many do not fit: their size is never asked for
        rounds = seen[1:]
        draft[batch_size] = {k: 1e3 * min(own[k][0] for own in rounds) for k in counts}
        target[batch_size] = {k: 1e3 * min(own[k][1] for own in rounds) for k in counts}
    bench.clear()
    return StepCosts(target=target, draft=draft)


def _up_to(most: int) -> list[int]:
    """Powers of two, and `most`."""
    return sorted({*(1 << i for i in range(most.bit_length()) if 1 << i <= most), most})


class _Bench:
    """Sequences of random tokens that decode, and steps of them with the clock around."""

    def __init__(
        self, scheduler: Scheduler, runner: SingleRunner, proposer: Proposer, *, max_model_len: int, vocab_size: int
    ) -> None:
        self._scheduler, self._runner, self._proposer = scheduler, runner, proposer
        self._num_prompt = max(1, min(_PROMPT_TOKENS, max_model_len // 4))
        self._max_tokens = max(1, max_model_len - self._num_prompt)
        self._rng, self._vocab_size = random.Random(0), vocab_size
        self._names: list[str] = []

    def fill(self, batch_size: int, num_drafts: int) -> bool:
        """Sees to it that so many sequences decode, and have room for a round; whether they do."""
        decoding = self._scheduler.decoding()
        if len(decoding) == batch_size and all(own.num_left > 2 * (num_drafts + 1) for own in decoding):
            return True
        self.clear()
        for index in range(batch_size):
            self._names.append(f"calibration {index}")
            request = Request(
                request_id=self._names[-1],
                prompt_token_ids=tuple(self._tokens(self._num_prompt)),
                sampling=SamplingParams(max_tokens=self._max_tokens, ignore_eos=True),
            )
            self._scheduler.add(Sequence(request, shares_prefix=False))
        for _ in range(_MAX_STEPS_TO_FILL):
            decoding = self._scheduler.decoding()
            if len(decoding) == batch_size:
                self._proposer.propose([(own, 1) for own in decoding])  # takes in the prompts
                return True
            plan, sampled = self._scheduler.plan()
            if not plan.slots:
                return False
            self._runner.run(plan)
            self._scheduler.commit(sampled, [self._tokens(1) for _ in sampled])
        return False

    def cycle(self, num_drafts: int) -> tuple[float, float]:
        """Seconds of proposing so many tokens for each sequence, and of the step that verifies as many; none stays."""
        decoding = self._scheduler.decoding()
        started = time.perf_counter()
        if num_drafts:
            self._proposer.propose([(own, num_drafts) for own in decoding])
        proposed = time.perf_counter()
        drafts = {own.request_id: Draft(tuple(self._tokens(num_drafts))) for own in decoding} if num_drafts else {}
        plan, sampled = self._scheduler.plan({name: own.token_ids for name, own in drafts.items()})
        verify(self._runner.run(plan), plan.num_logits, sampled, drafts)
        verified = time.perf_counter()
        self._scheduler.commit(sampled, [self._tokens(1) for _ in sampled])
        return proposed - started, verified - proposed

    def clear(self) -> None:
        for name in self._names:
            self._scheduler.abort(name)
            self._proposer.release(name)
        self._names = []

    def _tokens(self, count: int) -> Items[int]:
        return self._rng.choices(range(self._vocab_size), k=count)

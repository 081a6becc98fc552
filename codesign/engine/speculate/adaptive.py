"""How many tokens to draft: as many as pay, by measured acceptance and measured step costs.

    E[tokens per step] = (1 - a^(K + 1)) / (1 - a)        a = chance that a draft is accepted when those before were
    K(B) = argmax over K of  E[tokens per step] / (draft cost(B, K) + target cost(B, K))        K = 0: plain decoding

Leviathan et al., ICML 2023, https://arxiv.org/abs/2211.17192, section 3. Costs are measured once, when the engine is
built; a is a running estimate over all requests, so the table of batch size -> K follows what the engine is used for.
K decides how much is drafted and never which token is accepted, so it cannot touch the output's law.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

# The first estimate is worth this many tests of this chance: it speaks until the engine knows better.
PRIOR_TESTS, PRIOR_ACCEPTANCE = 8.0, 0.6
# Each test counts this much less with every test after it: what is estimated is the last thousand or so.
FORGETTING = 1 - 1 / 1024
# Drafting must promise this much more than decoding plainly. What costs leave out, such as the draft's own prefill and
# laws of drawn tokens, made a promise of 1.04 come out as 0.71 (batch 32, outputs of 48 tokens, two CPU cores).
LEAST_GAIN = 1.1
# Where nothing pays, one token is drafted all the same at each so many-th step, so that a change is noticed. Seldom:
# the draft has to take in all that has come since.
PROBE_STEPS = 256


def tokens_per_step(acceptance: float, num_drafts: int) -> float:
    """Expected output tokens of one step that verifies `num_drafts` tokens, between 1 and num_drafts + 1."""
    return sum(acceptance**count for count in range(num_drafts + 1))


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """Milliseconds by batch size and number of drafts per sequence.

    Attributes:
        target: batch size -> {K: one step that verifies K drafts of each sequence}; K = 0 is plain decoding.
        draft: batch size -> {K: proposing K tokens for each}.
    """

    target: Mapping[int, Mapping[int, float]]
    draft: Mapping[int, Mapping[int, float]]

    def measured(self, batch_size: int) -> int:
        """The measured batch size that stands for this one: the next larger, or the largest."""
        return min((own for own in self.target if own >= batch_size), default=max(self.target))

    def cycle_ms(self, batch_size: int, num_drafts: int) -> float:
        """Drafting and verifying, between measured K interpolated; both keys are measured ones at their ends."""
        return _between(self.target[batch_size], num_drafts) + _between(self.draft[batch_size], num_drafts)

    def best(self, batch_size: int, acceptance: float, most: int) -> int:
        """The K up to `most` that gives most tokens per second, the smallest of equals; 0 unless it gains enough."""
        own = self.measured(batch_size)
        most = min(most, *(max(costs[own]) for costs in (self.target, self.draft)))
        rates = [tokens_per_step(acceptance, k) / self.cycle_ms(own, k) for k in range(most + 1)]
        return rates.index(max(rates)) if max(rates) >= LEAST_GAIN * rates[0] else 0


def _between(costs: Mapping[int, float], num_drafts: int) -> float:
    below = max(k for k in costs if k <= num_drafts)
    above = min(k for k in costs if k >= num_drafts)
    share = (num_drafts - below) / (above - below) if above > below else 0.0
    return costs[below] + share * (costs[above] - costs[below])


class Adaptive:
    """Args:
    most: K never exceeds it (num_draft_tokens).
    """

    def __init__(self, costs: StepCosts, most: int) -> None:
        self.costs, self._most = costs, most
        self._num_tested, self._num_accepted = 0.0, 0.0  # with forgetting
        self._num_idle = 0  # steps since something was drafted

    @property
    def acceptance(self) -> float:
        return (PRIOR_TESTS * PRIOR_ACCEPTANCE + self._num_accepted) / (PRIOR_TESTS + self._num_tested)

    def choose(self, batch_size: int) -> int:
        """K of the next step."""
        chosen = self.costs.best(batch_size, self.acceptance, self._most)
        if chosen:
            self._num_idle = 0
            return chosen
        self._num_idle += 1
        # Where not even drafts that are always right would pay, there is nothing to find out.
        if self._num_idle >= PROBE_STEPS and self.costs.best(batch_size, 1.0, self._most):
            self._num_idle = 0
            return 1
        return 0

    def observe(self, num_tested: int, num_accepted: int) -> None:
        """What one step found out about its drafts, all sequences together."""
        fading = FORGETTING**num_tested
        self._num_tested = self._num_tested * fading + num_tested
        self._num_accepted = self._num_accepted * fading + num_accepted

    def table(self) -> dict[int, int]:
        """Measured batch size -> K, as of now."""
        return {size: self.costs.best(size, self.acceptance, self._most) for size in self.costs.target}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record."""

        def plain(costs: Mapping[int, Mapping[int, float]]) -> dict[str, dict[str, float]]:
            return {str(size): {str(k): round(ms, 4) for k, ms in own.items()} for size, own in costs.items()}

        return {
            "table": {str(size): k for size, k in self.table().items()},
            "acceptance": round(self.acceptance, 4),
            "target_ms": plain(self.costs.target),
            "draft_ms": plain(self.costs.draft),
        }

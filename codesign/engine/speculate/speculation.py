"""Speculation: between scheduler and proposer: how much is drafted for whom, and what became of it.

drafts = speculation.propose(scheduler.decoding());  ...  speculation.observe(verdicts)
"""

from collections.abc import Sequence as Items
from typing import Any

from codesign.engine.kv.codec import KVCodec
from codesign.engine.sequence import Sequence
from codesign.engine.speculate.adaptive import Adaptive
from codesign.engine.speculate.exact import Draft, Verdict
from codesign.engine.speculate.proposer import Proposer


class Speculation:
    """Args:
    codec: of the target's cache. One that encodes groups of tokens when they are committed would let drafts read
        tokens that decoding one by one had encoded by then; so no draft goes past such a point.
    adaptive: chooses K; None: always `num_draft_tokens`.
    """

    def __init__(
        self,
        proposer: Proposer,
        codec: KVCodec,
        *,
        num_draft_tokens: int,
        max_step_tokens: int,
        adaptive: Adaptive | None,
    ) -> None:
        self.proposer, self.adaptive = proposer, adaptive
        self._codec, self._num_draft_tokens, self._max_step_tokens = codec, num_draft_tokens, max_step_tokens
        self._num_steps = self._num_verifying = self._num_drafted = self._num_tested = self._num_accepted = 0

    def propose(self, sequences: Items[Sequence]) -> dict[str, Draft]:
        """Request id -> drafts, for those of these decoding sequences that any can be verified for."""
        if not sequences:
            return {}
        chosen = self._num_draft_tokens if self.adaptive is None else self.adaptive.choose(len(sequences))
        most = min(chosen, (self._max_step_tokens - len(sequences)) // len(sequences))
        wanted = [(own, min(most, own.num_left - 1, self._num_alike(own, most))) for own in sequences]
        wanted = [(own, count) for own, count in wanted if count > 0]
        return self.proposer.propose(wanted) if wanted else {}

    def _num_alike(self, sequence: Sequence, most: int) -> int:
        """How many drafts read every token before them in the form in which plain decoding would."""
        encoded = self._codec.encoded_tokens(sequence.num_computed)
        count = most
        while count > 0 and self._codec.encoded_tokens(sequence.num_computed + count) != encoded:
            count -= 1
        return count

    def observe(self, verdicts: Items[Verdict], num_logits: Items[int]) -> None:
        """What one step with sequences that decode has given."""
        tested, accepted = sum(v.num_tested for v in verdicts), sum(v.num_accepted for v in verdicts)
        self._num_steps += 1
        self._num_verifying += tested > 0
        self._num_drafted += sum(count - 1 for count in num_logits)
        self._num_tested += tested
        self._num_accepted += accepted
        if self.adaptive is not None:
            self.adaptive.observe(tested, accepted)

    def release(self, request_id: str) -> None:
        self.proposer.release(request_id)

    def stats(self) -> dict[str, Any]:
        """Plain data since the engine was built.

        `num_steps` of the target gave output tokens and `num_verifying_steps` of them verified drafts; of
        `num_drafted` tokens `num_tested` were looked at and `num_accepted` kept. With adaptive K also the present
        `table` of batch size -> K, the estimated `acceptance`, and the costs that they follow from.
        """
        found: dict[str, Any] = {
            "num_draft_tokens": self._num_draft_tokens,
            "num_steps": self._num_steps,
            "num_verifying_steps": self._num_verifying,
            "num_drafted": self._num_drafted,
            "num_tested": self._num_tested,
            "num_accepted": self._num_accepted,
        }
        return found if self.adaptive is None else found | self.adaptive.to_dict()

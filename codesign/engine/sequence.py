"""Sequence: the logical truth about one request while it runs. Positions come from here, never from a cache."""

import dataclasses
import random

from codesign.spec.request import FinishReason, Request


@dataclasses.dataclass(frozen=True, slots=True)
class StepOutput:
    """One output token of one request.

    Attributes:
        finish_reason: "" while the request goes on.
        logprobs: (token, log of its probability) of the chosen one, then of the likeliest, where they were asked for.
    """

    request_id: str
    token_id: int
    finish_reason: FinishReason | str = ""
    logprobs: tuple[tuple[int, float], ...] = ()


class Sequence:
    """Attributes:
    token_ids: prompt, then output.
    num_computed: how many of them have been run through the model; the next query has this position.
    slot: where its rows live, -1 before admission.
    stream: the request's own random numbers, so that what is drawn does not depend on who else is in the batch.
    """

    __slots__ = (
        "_streams",
        "num_computed",
        "num_prompt",
        "request_id",
        "sampling",
        "slot",
        "stop_ids",
        "stream",
        "token_ids",
    )

    def __init__(self, request: Request, *, eos_token_ids: frozenset[int] = frozenset()) -> None:
        self.request_id, self.sampling = request.request_id, request.sampling
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt = len(self.token_ids)
        self.num_computed, self.slot = 0, -1
        ignores = self.sampling.ignore_eos
        self.stop_ids = frozenset() if ignores else eos_token_ids | frozenset(self.sampling.stop_token_ids)
        self.stream = random.Random(self.sampling.seed)
        self._streams: dict[str, random.Random] = {}

    def stream_for(self, purpose: str) -> random.Random:
        """Random numbers that are independent of `stream` and of those for other purposes. It lives as long as the
        request: a number is never used twice, whatever is computed again."""
        if purpose not in self._streams:
            self._streams[purpose] = random.Random(f"{self.sampling.seed} {purpose}")
        return self._streams[purpose]

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < self.num_prompt

    @property
    def num_left(self) -> int:
        """Output tokens that may still come."""
        return self.sampling.max_tokens - (len(self.token_ids) - self.num_prompt)

    def append(self, token_id: int) -> StepOutput:
        """Takes the next output token; says whether it is the last."""
        self.token_ids.append(token_id)
        reason = ""
        if token_id in self.stop_ids:
            reason = "stop"
        elif self.num_left <= 0:
            reason = "length"
        return StepOutput(self.request_id, token_id, reason)

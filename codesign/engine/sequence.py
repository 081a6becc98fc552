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
    num_prefill: how many of them are prefilled before the next output token: the prompt, and after a preemption all
        that came out before it too.
    slot: where its rows live, -1 before admission.
    stream: the request's own random numbers, so that what is drawn does not depend on who else is in the batch.
    finish_reason: "" while it goes on.
    num_preemptions: how often it lost its rows to somebody else.
    blocks: its table, where the cache is paged: the block of rows 0..31, of rows 32..63, ...
    num_sent_blocks: how many of them the cache has been told of.
    block_keys: of its full blocks, as far as the prefix cache has had to compute them.
    num_known_blocks: how many of its blocks the prefix cache knows by their keys.
    shares_prefix: whether it takes rows from others and gives them its own.
    """

    __slots__ = (
        "_streams",
        "block_keys",
        "blocks",
        "finish_reason",
        "num_computed",
        "num_known_blocks",
        "num_preemptions",
        "num_prefill",
        "num_prompt",
        "num_sent_blocks",
        "request_id",
        "sampling",
        "shares_prefix",
        "slot",
        "stop_ids",
        "stream",
        "token_ids",
    )

    def __init__(
        self, request: Request, *, eos_token_ids: frozenset[int] = frozenset(), shares_prefix: bool = True
    ) -> None:
        self.request_id, self.sampling = request.request_id, request.sampling
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt = self.num_prefill = len(self.token_ids)
        self.num_computed, self.slot = 0, -1
        ignores = self.sampling.ignore_eos
        self.stop_ids = frozenset() if ignores else eos_token_ids | frozenset(self.sampling.stop_token_ids)
        self.stream = random.Random(self.sampling.seed)
        self.finish_reason = ""
        self.shares_prefix = shares_prefix
        self.blocks: list[int] = []
        self.block_keys: list[bytes] = []
        self.num_sent_blocks = self.num_known_blocks = self.num_preemptions = 0
        self._streams: dict[str, random.Random] = {}

    def stream_for(self, purpose: str) -> random.Random:
        """Random numbers that are independent of `stream` and of those for other purposes. It lives as long as the
        request: a number is never used twice, whatever is computed again."""
        if purpose not in self._streams:
            self._streams[purpose] = random.Random(f"{self.sampling.seed} {purpose}")
        return self._streams[purpose]

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < self.num_prefill

    @property
    def most_tokens(self) -> int:
        """Tokens that it has if it goes on to its last."""
        return self.num_prompt + self.sampling.max_tokens

    @property
    def num_left(self) -> int:
        """Output tokens that may still come."""
        return self.sampling.max_tokens - (len(self.token_ids) - self.num_prompt)

    def append(self, token_id: int) -> StepOutput:
        """Takes the next output token; says whether it is the last."""
        self.token_ids.append(token_id)
        if token_id in self.stop_ids:
            self.finish_reason = "stop"
        elif self.num_left <= 0:
            self.finish_reason = "length"
        return StepOutput(self.request_id, token_id, self.finish_reason)

    def preempt(self) -> None:
        """Its rows are gone: prompt and output so far have to be prefilled again before it can go on."""
        self.num_computed, self.slot, self.num_prefill = 0, -1, len(self.token_ids)
        self.num_preemptions += 1

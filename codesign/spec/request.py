"""What a client asks an engine for: token ids in, a stream of token ids out."""

import dataclasses
from typing import Literal

FinishReason = Literal["stop", "length", "aborted"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn.

    Args:
        max_tokens: most output tokens.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set with at least this probability, in (0, 1].
        seed: of this request's own stream of random numbers.
        stop_token_ids: end the output (the stop token itself is emitted).
        logprobs: how many of the likeliest tokens to report beside the chosen one, with the logarithms of their
            probabilities at temperature 1; None reports nothing.
        ignore_eos: go on to `max_tokens` whatever is drawn; a workload of fixed lengths needs this, records stamp it.
    """

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs must be at least 0, got {self.logprobs}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError("a prompt needs at least one token")

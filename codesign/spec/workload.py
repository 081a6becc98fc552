"""Workload: what is asked of the engine, as a person writes it.

scenario: server
prompt_tokens: {lognormal: {median: 300, p90: 900, max: 2048}}      lengths: see spec.lengths
output_tokens: 64
arrival: {process: poisson, rate_per_s: 4}
shared_prefix: {num_groups: 8, share: 0.5}          prompts of a group begin with the same tokens

scenario: interactive
concurrency: 16
conversation: {turns: 4, user_tokens: 32}           each turn's prompt is the conversation so far and 32 new tokens

scenario: server
trace: {file: azure.csv, speed: 0.5}                lengths, arrivals and shared prefixes as they were observed
"""

import random
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from codesign.spec.lengths import LengthsField, OptionalLengthsField
from codesign.spec.section import NotNegative, Positive, Section, Share
from codesign.spec.trace import Trace, trace_field

Scenario = Literal["single_stream", "offline", "server", "interactive"]


class Arrival(Section):
    """When requests of an open-loop server workload come.

    Attributes:
        process: poisson (independent clients), constant (evenly spaced), gamma (bursts).
        rate_per_s: mean requests per second.
        burstiness: gamma only: squared coefficient of variation of the gaps; 1 is poisson, more is burstier.
    """

    process: Literal["poisson", "constant", "gamma"]
    rate_per_s: Positive
    burstiness: Annotated[float, Field(gt=0, le=100)] | None = None

    @model_validator(mode="after")
    def _burstiness_belongs_to_gamma(self) -> Self:
        if (self.process == "gamma") != (self.burstiness is not None):
            raise ValueError("burstiness belongs to process: gamma, and gamma needs it")
        return self

    def gaps_s(self, rng: random.Random, count: int) -> tuple[float, ...]:
        """Seconds from each arrival to the next, `count` of them, with mean 1 / rate_per_s."""
        mean = 1.0 / self.rate_per_s
        if self.process == "constant":
            return (mean,) * count
        if self.process == "poisson":
            return tuple(rng.expovariate(self.rate_per_s) for _ in range(count))
        assert self.burstiness is not None
        shape = 1.0 / self.burstiness
        return tuple(rng.gammavariate(shape, mean / shape) for _ in range(count))


class SharedPrefix(Section):
    """Prompts that begin alike, as behind one system prompt. A group's tokens stay the same for a whole trial.

    Attributes:
        num_groups: each request belongs to one of them, drawn evenly.
        tokens: length of the shared beginning. It is part of the prompt, whose last token is always its own.
        share: instead of `tokens`: the shared part of each prompt's tokens.
    """

    num_groups: Annotated[int, Field(ge=1, le=100_000)] = 1
    tokens: Annotated[int, Field(ge=1, le=2**24)] | None = None
    share: Share | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.tokens is None) == (self.share is None):
            raise ValueError("needs either tokens or share")
        return self

    def of(self, prompt_tokens: int) -> int:
        """How many of a prompt's tokens are its group's."""
        wanted = self.tokens if self.tokens is not None else round((self.share or 0.0) * prompt_tokens)
        return min(wanted, prompt_tokens - 1)


class Conversation(Section):
    """Several turns: each prompt after the first is the conversation so far, with the model's real output, and more.

    Attributes:
        turns: requests of one conversation; `num_requests` counts turns.
        user_tokens: new tokens of each turn after the first, whose length is `prompt_tokens`.
        think_time_s: mean time from an answer to the next turn, exponentially distributed; 0: at once.
    """

    turns: Annotated[int, Field(ge=2, le=1000)]
    user_tokens: LengthsField
    think_time_s: Annotated[NotNegative, Field(le=3600)] = 0.0


class Sampling(Section):
    """How output tokens are drawn; the default is greedy."""

    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_k: Annotated[int, Field(ge=0, le=2**24)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _greedy_draws_nothing(self) -> Self:
        if self.temperature == 0 and (self.top_k != 0 or self.top_p != 1):
            raise ValueError("top_k and top_p have no effect at temperature 0 (greedy); set temperature too")
        return self


class Workload(Section):
    """What one trial asks of an engine.

    Attributes:
        scenario: single_stream (one request after another), offline (all at once), server (open loop: requests come
            by `arrival` or as in the trace, whether or not the engine keeps up), interactive (closed loop:
            `concurrency` clients, each sends its next request when the last one is answered).
        trace: takes the place of `prompt_tokens` and `output_tokens`; its requests come in its order.
        num_requests: measured requests; with `min_duration_s`, the load goes on until both are reached.
        ignore_eos: each output has exactly its drawn length; records stamp it.
        seed: of lengths, prompts and arrivals.
    """

    scenario: Scenario
    prompt_tokens: OptionalLengthsField = None
    output_tokens: OptionalLengthsField = None
    trace: Annotated[Trace, BeforeValidator(trace_field)] | None = None
    arrival: Arrival | None = None
    concurrency: Annotated[int, Field(ge=1, le=100_000)] | None = None
    shared_prefix: SharedPrefix | None = None
    conversation: Conversation | None = None
    num_requests: Annotated[int, Field(ge=1, le=1_000_000)]
    min_duration_s: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    sampling: Sampling = Sampling()
    ignore_eos: bool = True
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0

    @model_validator(mode="after")
    def _lengths_come_from_one_place(self) -> Self:
        for name in ("prompt_tokens", "output_tokens"):
            if self.trace is None and getattr(self, name) is None:
                raise ValueError(f"{name} is missing: a number of tokens, a distribution, or a trace in its place")
        for name in ("prompt_tokens", "output_tokens", "shared_prefix", "conversation"):
            if self.trace is not None and getattr(self, name) is not None:
                raise ValueError(f"takes no `{name}` beside a trace, which says what the requests are")
        return self

    @model_validator(mode="after")
    def _belongs_to_scenario(self) -> Self:
        has_times = self.trace is not None and self.trace.has_times
        keys = (("arrival", "server", not has_times), ("concurrency", "interactive", True))
        for name, owner, is_needed in (*keys, ("conversation", "interactive", False)):
            is_given = getattr(self, name) is not None
            if is_given and self.scenario != owner:
                raise ValueError(f"scenario {self.scenario} takes no `{name}` (it belongs to {owner})")
            if is_needed and not is_given and self.scenario == owner:
                raise ValueError(f"scenario {self.scenario} needs `{name}` (it belongs to {owner})")
        if self.trace is not None and self.trace.speed is not None and not self.replays_arrivals:
            raise ValueError("trace.speed has no effect here: the trace's arrivals are not used")
        return self

    @property
    def replays_arrivals(self) -> bool:
        """Whether requests come when they came in the trace."""
        return self.scenario == "server" and self.arrival is None

    @property
    def max_model_len(self) -> int:
        """Tokens that the longest request can come to, prompt and output."""
        if self.trace is not None:
            return self.trace.max_model_len
        assert self.prompt_tokens is not None and self.output_tokens is not None
        length = self.prompt_tokens.max + self.output_tokens.max
        if self.conversation is not None:
            more = self.conversation.user_tokens.max + self.output_tokens.max
            length += (self.conversation.turns - 1) * more
        return length

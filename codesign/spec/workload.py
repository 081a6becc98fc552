"""Workload: what is asked of the engine, as a person writes it, and how lengths are drawn from it.

prompt_tokens: 512
prompt_tokens: {uniform: [128, 1024]}
prompt_tokens: {lognormal: {median: 300, p90: 900, max: 2048}}
prompt_tokens: {choices: [64, 512, 2048]}           # equally likely; list a value twice to weigh it
"""

import math
import random
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from codesign.spec.section import Positive, Section

Scenario = Literal["single_stream", "offline", "server", "interactive"]
Tokens = Annotated[int, Field(ge=1, le=2**24)]

_Z90 = 1.2815515655446004  # 90th percentile of the standard normal distribution


class LogNormal(Section):
    """Most lengths short, a few long: given by its median and 90th percentile, cut off at `max`."""

    median: Tokens
    p90: Tokens
    max: Tokens

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.median < self.p90 <= self.max:
            raise ValueError(f"needs median < p90 <= max, got {self.median}, {self.p90}, {self.max}")
        return self


class Lengths(Section):
    """A distribution of whole numbers of tokens; exactly one of the fields is set."""

    fixed: Tokens | None = None
    uniform: Annotated[tuple[Tokens, Tokens], Field(strict=False)] | None = None
    lognormal: LogNormal | None = None
    choices: Annotated[tuple[Tokens, ...], Field(strict=False, min_length=1, max_length=1000)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "must be a number of tokens or one of uniform: [low, high], lognormal: {...}, choices: [...]"
            )
        if self.uniform is not None and self.uniform[0] > self.uniform[1]:
            raise ValueError(f"uniform needs low <= high, got {list(self.uniform)}")
        return self

    @property
    def max(self) -> int:
        """The longest that can be drawn."""
        if self.uniform is not None:
            return self.uniform[1]
        if self.lognormal is not None:
            return self.lognormal.max
        if self.choices is not None:
            return max(self.choices)
        assert self.fixed is not None
        return self.fixed

    def sample(self, rng: random.Random, count: int) -> tuple[int, ...]:
        """`count` independent lengths. The same generator state gives the same lengths."""
        return tuple(self._draw(rng) for _ in range(count))

    def _draw(self, rng: random.Random) -> int:
        if self.uniform is not None:
            return rng.randint(*self.uniform)
        if self.choices is not None:
            return rng.choice(self.choices)
        if self.lognormal is not None:
            sigma = math.log(self.lognormal.p90 / self.lognormal.median) / _Z90
            drawn = self.lognormal.median * math.exp(rng.gauss(0.0, sigma))
            return max(1, min(self.lognormal.max, round(drawn)))
        assert self.fixed is not None
        return self.fixed


def _fixed(value: Any) -> Any:
    """A bare number means that length every time."""
    return value if isinstance(value, dict | Lengths) else {"fixed": value}


LengthsField = Annotated[Lengths, BeforeValidator(_fixed)]


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
            by `arrival` whether or not the engine keeps up), interactive (closed loop: `concurrency` clients, each
            sends its next request when the last one is answered).
        num_requests: measured requests; with `min_duration_s`, the load goes on until both are reached.
        ignore_eos: each output has exactly its drawn length; records stamp it.
        seed: of lengths, prompts and arrivals.
    """

    scenario: Scenario
    prompt_tokens: LengthsField
    output_tokens: LengthsField
    arrival: Arrival | None = None
    concurrency: Annotated[int, Field(ge=1, le=100_000)] | None = None
    num_requests: Annotated[int, Field(ge=1, le=1_000_000)]
    min_duration_s: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    sampling: Sampling = Sampling()
    ignore_eos: bool = True
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0

    @model_validator(mode="after")
    def _belongs_to_scenario(self) -> Self:
        for name, owner in (("arrival", "server"), ("concurrency", "interactive")):
            if (getattr(self, name) is not None) != (self.scenario == owner):
                need = "needs" if self.scenario == owner else "takes no"
                raise ValueError(f"scenario {self.scenario} {need} `{name}` (it belongs to {owner})")
        return self

    @property
    def max_model_len(self) -> int:
        """Tokens that the longest request can come to, prompt and output."""
        return self.prompt_tokens.max + self.output_tokens.max

"""Lengths: a distribution of whole numbers of tokens, as a person writes it.

512                                                 always
{uniform: [128, 1024]}
{lognormal: {median: 300, p90: 900, max: 2048}}
{choices: [64, 512, 2048]}                          equally likely; list a value twice to weigh it
{empirical: lengths.txt}                            observed lengths, one a line; drawn with replacement
{empirical: {file: lengths.txt, in_order: true}}    one after the other; prompts and outputs that belong together
"""

import math
import random
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from codesign.spec.section import Section

Tokens = Annotated[int, Field(ge=1, le=2**24)]

MAX_OBSERVED = 2_000  # two such lists still fit into one YAML document of at most 5,000 values
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


class Empirical(Section):
    """Observed lengths, from the list itself or from a file.

    Attributes:
        file: relative to the file that names it; read by `spec.workload_files`, which puts its `lengths` in its place.
        in_order: go through them one after the other and start again at the end, instead of drawing.
    """

    lengths: Annotated[tuple[Tokens, ...], Field(strict=False, min_length=1, max_length=MAX_OBSERVED)] | None = None
    file: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    in_order: bool = False

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.lengths is None) == (self.file is None):
            raise ValueError("needs either lengths: [...] or file: PATH")
        return self


def _empirical(value: Any) -> Any:
    """A bare list is the lengths, a bare text the file."""
    if isinstance(value, list | tuple):
        return {"lengths": value}
    return {"file": value} if isinstance(value, str) else value


class Lengths(Section):
    """A distribution; exactly one of the fields is set."""

    fixed: Tokens | None = None
    uniform: Annotated[tuple[Tokens, Tokens], Field(strict=False)] | None = None
    lognormal: LogNormal | None = None
    choices: Annotated[tuple[Tokens, ...], Field(strict=False, min_length=1, max_length=1000)] | None = None
    empirical: Annotated[Empirical, BeforeValidator(_empirical)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "must be a number of tokens or one of uniform: [low, high], lognormal: {...}, choices: [...], "
                "empirical: ..."
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
        if self.empirical is not None:
            return max(_observed(self.empirical))
        assert self.fixed is not None
        return self.fixed

    def sample(self, rng: random.Random, count: int, *, start: int = 0) -> tuple[int, ...]:
        """`count` lengths. The same generator state gives the same lengths.

        Args:
            start: what `in_order` lengths begin with; the others are independent draws.
        """
        if self.empirical is not None and self.empirical.in_order:
            observed = _observed(self.empirical)
            return tuple(observed[(start + index) % len(observed)] for index in range(count))
        return tuple(self._draw(rng) for _ in range(count))

    def _draw(self, rng: random.Random) -> int:
        if self.uniform is not None:
            return rng.randint(*self.uniform)
        if self.choices is not None:
            return rng.choice(self.choices)
        if self.empirical is not None:
            return rng.choice(_observed(self.empirical))
        if self.lognormal is not None:
            sigma = math.log(self.lognormal.p90 / self.lognormal.median) / _Z90
            drawn = self.lognormal.median * math.exp(rng.gauss(0.0, sigma))
            return max(1, min(self.lognormal.max, round(drawn)))
        assert self.fixed is not None
        return self.fixed


def _observed(empirical: Empirical) -> tuple[int, ...]:
    if empirical.lengths is None:
        raise ValueError(f"{empirical.file} has not been read yet (spec.workload_files)")
    return empirical.lengths


def _fixed(value: Any) -> Any:
    """A bare number means that length every time."""
    return value if isinstance(value, dict | Lengths) else {"fixed": value}


LengthsField = Annotated[Lengths, BeforeValidator(_fixed)]
OptionalLengthsField = Annotated[Lengths | None, BeforeValidator(_fixed)]  # may be left out; null is no number

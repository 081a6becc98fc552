"""Domain: what one knob may be. A list of values, or a range, as a person writes them in a search space.

[1, 2, 4, 8]                              Values
{low: 128, high: 2048, step: 128}         Range of whole numbers
{low: 0.05, high: 0.5, log: true}         Range of fractions, continuous
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from codesign.errors import shown
from codesign.spec.engine_config import Scalar
from codesign.spec.yaml import Document, Key


@dataclasses.dataclass(frozen=True)
class Values:
    """A choice from a list; the first is the one that defaults fall back to."""

    values: tuple[Scalar, ...]

    @property
    def size(self) -> int:
        return len(self.values)

    @property
    def examples(self) -> tuple[Scalar, ...]:
        """Values whose check vouches for the whole domain."""
        return self.values

    def __contains__(self, value: object) -> bool:
        return any(_same(value, item) for item in self.values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """`low` to `high`, both included; whole numbers when `low` and `high` are."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @property
    def is_integer(self) -> bool:
        return isinstance(self.low, int)

    @property
    def size(self) -> int | None:
        """How many values there are; None where they are continuous."""
        if not self.is_integer and self.step is None:
            return None
        return round((self.high - self.low) / (self.step or 1)) + 1

    @property
    def examples(self) -> tuple[Scalar, ...]:
        return (self.low, self.high)

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        if self.is_integer and not isinstance(value, int):
            return False
        steps = (value - self.low) / self.step if self.step else 0.0
        return math.isclose(steps, round(steps), abs_tol=1e-9)


Domain = Values | Range


def read_domain(document: Document, key: Key) -> Domain:
    """The domain that stands at `key`; a bare value is a list of one.

    Raises:
        InputError: an empty list, equal values, nested values, a range without sense.
    """
    plain = document.at(key)
    if isinstance(plain, Mapping):
        return _range(plain, document, key)
    listed = plain if isinstance(plain, list) else [plain]
    if not listed:
        raise document.error("an empty list leaves nothing to choose", key)
    for index, value in enumerate(listed):
        if not isinstance(value, Scalar):
            raise document.error(
                f"must be a plain value, a list of values or {{low, high, log, step}}, got {shown(value)}", key
            )
        if any(_same(value, other) for other in listed[:index]):
            raise document.error(f"{shown(value)} is listed twice", key)
    return Values(tuple(listed))


def _same(a: object, b: object) -> bool:
    """Equal and of the same kind: 1 is not true, and 1.0 as a fraction is not 1 as a count."""
    return type(a) is type(b) and a == b


def _range(plain: Mapping[str, Any], document: Document, key: Key) -> Range:
    known = ("low", "high", "log", "step")
    for name in plain:
        if name not in known:
            raise document.error("unknown key of a range", (*key, name), got=name, known=known)
    for name in ("low", "high"):
        if name not in plain:
            raise document.error("is missing", (*key, name))
    low, high, step, log = plain["low"], plain["high"], plain.get("step"), plain.get("log", False)
    for name, value in (("low", low), ("high", high), ("step", step)):
        if not (isinstance(value, int | float) and not isinstance(value, bool)) and not (
            name == "step" and value is None
        ):
            raise document.error(f"must be a number, got {shown(value)}", (*key, name))
    if not isinstance(log, bool):
        raise document.error(f"must be true or false, got {shown(log)}", (*key, "log"))
    if isinstance(low, int) != isinstance(high, int):
        low, high = float(low), float(high)
    if low >= high:
        raise document.error(f"needs low < high, got {low} and {high}", key)
    if log and low <= 0:
        raise document.error(f"a log range must start above 0, got {low}", (*key, "low"))
    if step is not None:
        if log:
            raise document.error("a log range takes no step; list the values instead", (*key, "step"))
        if isinstance(low, int) and not isinstance(step, int):
            raise document.error(f"must be a whole number like low and high, got {step}", (*key, "step"))
        steps = (high - low) / step if step > 0 else 0.0
        if step <= 0 or not math.isclose(steps, round(steps), rel_tol=1e-9):
            raise document.error(f"must divide high - low = {high - low:g}, got {step}", (*key, "step"))
    return Range(low=low, high=high, log=log, step=step)

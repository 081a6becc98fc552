"""A StepPlan as integers, so that it can be broadcast, and back: field after field, each tuple after its length."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from codesign.engine.step import StepPlan


def to_ints(plan: StepPlan) -> list[int]:
    return [number for field in dataclasses.fields(plan) for number in _flat(getattr(plan, field.name))]


def from_ints(numbers: list[int]) -> StepPlan:
    left, kinds = iter(numbers), typing.get_type_hints(StepPlan)
    return StepPlan(**{field.name: _read(left, kinds[field.name]) for field in dataclasses.fields(StepPlan)})


def _flat(value: Any) -> list[int]:
    if not isinstance(value, tuple):
        return [int(value)]
    return [len(value), *(number for item in value for number in _flat(item))]


def _read(left: Iterator[int], kind: Any) -> Any:
    """kind: int, bool, or tuple[kind, ...]."""
    items = typing.get_args(kind)
    if not items:
        return kind(next(left))
    return tuple(_read(left, items[0]) for _ in range(next(left)))

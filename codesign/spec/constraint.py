"""Constraint: a combination that a search space rules out, with the reason a person reads.

    - when: {weights: int4, dtype: fp16}                              equals
      reason: the CPU kernel has no fp16 activations
    - when: {kv.policy: [h2o, pyramidkv], max_batch_size: {min: 16}}  one of; at least
      reason: ...
    - when: {weights: {not: native}, max_step_tokens: {max: 64}}      anything but; at most
      reason: ...

All conditions of a `when` must hold. Keys are the names of `EngineConfig.flat()`; a knob's condition
(`weights.int4.group_size`) holds only where its member is chosen.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from codesign.errors import InputError, shown
from codesign.spec.engine_config import FAMILIES, FLAGS, PLAIN_FIELDS, Dtype, Scalar
from codesign.spec.yaml import Document, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
    """What one value must be: one of a list, none of a list, or within inclusive bounds."""

    one_of: tuple[Scalar, ...] | None = None
    none_of: tuple[Scalar, ...] | None = None
    min: int | float | None = None
    max: int | float | None = None

    def holds(self, value: Scalar | None) -> bool:
        if self.one_of is not None:
            return value in self.one_of
        if self.none_of is not None:
            return value is not None and value not in self.none_of
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraint:
    when: tuple[tuple[str, Condition], ...]
    reason: str

    def rules_out(self, values: Mapping[str, Scalar | None]) -> bool:
        return all(condition.holds(values.get(name)) for name, condition in self.when)


def read_constraints(document: Document, key: Key) -> tuple[Constraint, ...]:
    """The list of constraints that stands at `key`.

    Raises:
        InputError: not a list, a missing or empty reason, unknown names or values, conditions without sense.
    """
    listed = document.at(key)
    if not isinstance(listed, list):
        raise document.error(f"must be a list of {{when, reason}}, got {shown(listed)}", key)
    return tuple(_constraint(document, (*key, index)) for index in range(len(listed)))


def _constraint(document: Document, key: Key) -> Constraint:
    plain = document.at(key)
    known = ("when", "reason")
    if not isinstance(plain, Mapping):
        raise document.error(f"must be {{when, reason}}, got {shown(plain)}", key)
    for name in plain:
        if name not in known:
            raise document.error("unknown key", (*key, name), got=name, known=known)
    for name in known:
        if name not in plain:
            raise document.error("is missing", (*key, name))
    reason, when = plain["reason"], plain["when"]
    if not isinstance(reason, str) or not reason.strip():
        raise document.error(f"must say why in words, got {shown(reason)}", (*key, "reason"))
    if not isinstance(when, Mapping) or not when:
        raise document.error(f"must be a mapping of names to values, got {shown(when)}", (*key, "when"))
    conditions = tuple((name, _condition(document, (*key, "when", name), name)) for name in when)
    return Constraint(when=conditions, reason=reason.strip())


def _condition(document: Document, key: Key, name: str) -> Condition:
    _check_name(document, key, name)
    plain = document.at(key)
    if not isinstance(plain, Mapping):
        return Condition(one_of=_values(document, key, name))
    known = ("not", "min", "max")
    for part in plain:
        if part not in known:
            raise document.error("unknown condition", (*key, part), got=part, known=known)
    if not plain or ("not" in plain and len(plain) > 1):
        raise document.error("must be one of: a value, a list, {not: ...}, {min: ..., max: ...}", key)
    if "not" in plain:
        return Condition(none_of=_values(document, (*key, "not"), name))
    if name in FAMILIES or name in FLAGS or name == "dtype":
        raise document.error(f"{name} has no order; use a value, a list or {{not: ...}}", key)
    for part, bound in plain.items():
        if not isinstance(bound, int | float) or isinstance(bound, bool):
            raise document.error(f"must be a number, got {shown(bound)}", (*key, part))
    least, most = plain.get("min"), plain.get("max")
    if least is not None and most is not None and least > most:
        raise document.error(f"min {least} is above max {most}", key)
    return Condition(min=least, max=most)


def _check_name(document: Document, key: Key, name: str) -> None:
    """A plain field, a family, or family.member.knob."""
    if name in PLAIN_FIELDS or name in FAMILIES:
        return
    for prefix, family in FAMILIES.items():
        if name.startswith(f"{prefix}."):
            member, _, knob = name[len(prefix) + 1 :].partition(".")
            try:
                family.check(member)
            except InputError as error:
                raise document.error(error.message, key) from None
            knobs = family.knobs(member)
            if knob not in knobs:
                raise document.error(
                    f"{family.noun} {member!r} has no knob {shown(knob)}", key, got=knob, known=tuple(knobs)
                )
            return
    raise document.error("unknown name", key, got=name, known=(*PLAIN_FIELDS, *FAMILIES))


def _values(document: Document, key: Key, name: str) -> tuple[Scalar, ...]:
    plain = document.at(key)
    values: list[Any] = plain if isinstance(plain, list) else [plain]
    if not values:
        raise document.error("an empty list never holds", key)
    for value in values:
        if not isinstance(value, Scalar):
            raise document.error(f"must be a plain value, got {shown(value)}", key)
        if name in FAMILIES:
            try:
                FAMILIES[name].check(str(value))
            except InputError as error:
                raise document.error(error.message, key) from None
        elif name == "dtype" and value not in get_args(Dtype):
            raise document.error(f"unknown dtype {shown(value)}", key, got=str(value), known=get_args(Dtype))
        elif name in FLAGS:
            if not isinstance(value, bool):
                raise document.error(f"must be true or false, got {shown(value)}", key)
        elif name in PLAIN_FIELDS and name != "dtype" and (not isinstance(value, int) or isinstance(value, bool)):
            raise document.error(f"must be a whole number, got {shown(value)}", key)
    return tuple(values)

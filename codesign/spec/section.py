"""What all pydantic models of a profile share: strict, frozen, no unknown keys; and their errors in our words."""

import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from codesign.errors import InputError, shown
from codesign.spec.yaml import Document, Key

Positive = Annotated[float, Field(gt=0, le=1e18)]
NotNegative = Annotated[float, Field(ge=0, le=1e18)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=2**40)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]+$")]

SectionT = TypeVar("SectionT", bound="Section")


class Section(BaseModel):
    """A mapping in a YAML file. Strict: `"5"`, `true` and `1.0` are not whole numbers."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


def validate(kind: type[SectionT], document: Document, key: Key = ()) -> SectionT:
    """What stands at `key` of a document, as this section.

    Raises:
        InputError: the first thing that is wrong, with file, line, dotted key and what is allowed.
    """
    value = document.at(key)
    if not isinstance(value, Mapping):
        raise document.error(f"must be a mapping with {_names(kind)}, got {shown(value)}", key)
    try:
        return kind.model_validate(value)
    except pydantic.ValidationError as error:
        raise _translated(kind, error, document, key) from None


def _translated(kind: type[Section], error: pydantic.ValidationError, document: Document, under: Key) -> InputError:
    problems = error.errors(include_url=False, include_context=True)
    # An unknown key is usually why another is missing, so it is said first.
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    location, key = first["loc"], under
    allowed: Any = kind
    value: Any = document.at(under)
    for part in location:
        if isinstance(value, Mapping) and (part in value or first["type"] == "missing"):
            allowed = _field_type(allowed, str(part))
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            allowed, value = _item_type(allowed), value[part] if part < len(value) else None
        else:
            continue  # pydantic names the member of a union here; a person's file has no such key
        key = (*key, part)
    if first["type"] == "extra_forbidden":
        owner = kind
        for part in location[:-1]:
            owner = _field_type(owner, str(part)) if not isinstance(part, int) else _item_type(owner)
        known = tuple(owner.model_fields) if _is_section(owner) else ()
        return document.error("unknown key", key, got=str(location[-1]), known=known)
    if first["type"] == "missing":
        return document.error(f"is missing ({_wanted(allowed)})" if _is_section(allowed) else "is missing", key)
    if first["type"] == "literal_error" and isinstance(value, str):
        return document.error(
            f"{shown(value)} is not allowed", key, got=value, known=tuple(typing.get_args(_strip(allowed)))
        )
    # A rule between keys speaks for itself; a single value is shown.
    tail = "" if first["type"] == "value_error" and isinstance(value, Mapping) else f", got {shown(value)}"
    return document.error(_message(first) + tail, key)


def _message(problem: Any) -> str:
    context = problem.get("ctx", {})
    match problem["type"]:
        case "value_error":
            return str(context["error"])
        case "greater_than":
            return f"must be greater than {context['gt']:g}"
        case "greater_than_equal":
            return f"must be at least {context['ge']:g}"
        case "less_than":
            return f"must be less than {context['lt']:g}"
        case "less_than_equal":
            return f"must be at most {context['le']:g}"
        case "int_type" | "int_from_float":
            return "must be a whole number"
        case "float_type":
            return "must be a number"
        case "bool_type":
            return "must be true or false"
        case "string_type":
            return "must be text"
        case "tuple_type" | "list_type":
            return "must be a list"
        case "dict_type" | "mapping_type" | "model_type" | "model_attributes_type":
            return "must be a mapping"
        case "string_pattern_mismatch":
            return f"must match {context['pattern']}"
        case _:
            text: str = problem["msg"]
            return text[0].lower() + text[1:]


def _names(kind: type[Section]) -> str:
    return ", ".join(kind.model_fields)


def _wanted(kind: Any) -> str:
    return f"a mapping with {_names(kind)}"


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _strip(kind: Any) -> Any:
    """The type inside Annotated and `| None`."""
    while True:
        if typing.get_origin(kind) is Annotated:
            kind = typing.get_args(kind)[0]
            continue
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        if typing.get_origin(kind) in (None, tuple, dict, Mapping, Literal) or len(options) != 1:
            return kind
        kind = options[0]


def _field_type(kind: Any, name: str) -> Any:
    kind = _strip(kind)
    if _is_section(kind) and name in kind.model_fields:
        return _strip(kind.model_fields[name].annotation)
    arguments = typing.get_args(kind)
    return _strip(arguments[1]) if len(arguments) == 2 and typing.get_origin(kind) is not tuple else None


def _item_type(kind: Any) -> Any:
    arguments = typing.get_args(_strip(kind))
    return _strip(arguments[0]) if arguments else None

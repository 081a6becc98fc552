"""Checks one file that a person wrote, whatever it is: profile, part of a profile, search space or configuration."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from codesign.errors import shown
from codesign.spec.engine_config import FAMILIES, PLAIN_FIELDS, load_config
from codesign.spec.hardware import Hardware
from codesign.spec.model_source import Architecture
from codesign.spec.profile import SECTIONS, load_profile
from codesign.spec.section import validate
from codesign.spec.space import load_space
from codesign.spec.workload_files import read_workload
from codesign.spec.yaml import Document, load_yaml

_ENGINE = tuple(dict.fromkeys(key.partition(".")[0] for key in (*PLAIN_FIELDS, *FAMILIES)))
# The key that gives a part of a profile away -> what it is.
_PARTS: dict[str, tuple[str, Callable[[Document], object]]] = {
    "device": ("hardware", partial(validate, Hardware)),
    "scenario": ("workload", read_workload),
    "model_type": ("model", partial(validate, Architecture)),
}


def check_file(path: str | Path) -> str:
    """What the file is: "profile", "hardware", "workload", "model", "search space" or "configuration".

    A profile is checked with everything that it names: included files, model, search space. A file that could be a
    search space or a configuration is a space when it has constraints, lists or ranges, or maps members to knobs.

    Raises:
        InputError: the first thing that is wrong, with file, line, key, what is allowed, the nearest known name.
    """
    document = load_yaml(path)
    plain = document.value
    if not isinstance(plain, dict):
        raise document.error(f"must be a profile, a search space or a configuration, got {shown(plain)}")
    if any(name in SECTIONS for name in plain):
        profile = load_profile(path, fetch=_unfetched)
        if profile.search_space is not None:
            load_space(profile.search_space)
        return "profile"
    for name, (noun, check) in _PARTS.items():
        if name in plain:
            check(document)
            return noun
    if not any(name in _ENGINE or name == "constraints" for name in plain):
        known = (*SECTIONS, *_ENGINE, "constraints", *_PARTS)
        first = next(iter(plain), "")
        raise document.error(
            "is no profile, search space or configuration: it has none of their keys",
            (first,) if first else (),
            got=first,
            known=known,
        )
    if _is_space(plain):
        load_space(path)
        return "search space"
    load_config(path)
    return "configuration"


def _is_space(plain: dict[str, Any]) -> bool:
    fields, families = ([_at(plain, key) for key in keys] for keys in (PLAIN_FIELDS, FAMILIES))
    return (
        "constraints" in plain
        or any(isinstance(value, list | dict) for value in fields)
        or any(isinstance(choice, list) or (isinstance(choice, dict) and "name" not in choice) for choice in families)
    )


def _at(plain: dict[str, Any], name: str) -> Any:
    """What stands at a dotted key of one or two parts; None where nothing does."""
    group, _, part = name.partition(".")
    value = plain.get(group)
    if not part:
        return value
    return value.get(part) if isinstance(value, dict) else None


def _unfetched(name: str, revision: str) -> Path:
    """A hub id is well-formed whether or not its files are here; a check downloads nothing."""
    return Path(name, revision)

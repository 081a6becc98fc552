"""One way to find the members of a family of variants: by file name.

A family is a folder of modules inside the stage that uses it. A member is one module with one frozen dataclass: its
fields are the knobs, its methods the family's protocol. Listing names reads the folder and imports nothing, so names,
hints and `--help` never load torch; a member is imported when it is used. Adding a member edits nothing else.

    KV_POLICIES.names()                      -> ("full", "h2o", ...)
    KV_POLICIES.create("h2o", kv_budget=0.2) -> H2O(kv_budget=0.2, ...)
"""

import dataclasses
import functools
import importlib
from pathlib import Path
from typing import Any

from codesign.errors import InputError

_ROOT = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Family:
    """A folder of members below `codesign/`.

    Args:
        noun: what a member is called in messages, e.g. "KV policy".
        package: dotted path below `codesign`, e.g. "engine.kv.policies".
    """

    noun: str
    package: str

    def names(self) -> tuple[str, ...]:
        """Member names, sorted, read from the file names."""
        return _names(self.package)

    def check(self, name: str, *, file: object = None, key: str | None = None) -> None:
        """Raises InputError with the nearest name when there is no such member. Imports nothing."""
        if name not in self.names():
            raise InputError(f"unknown {self.noun} {name!r}", file=file, key=key, got=name, known=self.names())

    def member(self, name: str) -> type[Any]:
        """The member's class. Imports its module."""
        self.check(name)
        module = importlib.import_module(f"codesign.{self.package}.{name}")
        found = [
            item
            for item in vars(module).values()
            if isinstance(item, type)
            and item.__module__ == module.__name__
            and dataclasses.is_dataclass(item)
            and not item.__name__.startswith("_")
        ]
        if len(found) != 1:
            raise TypeError(f"{module.__name__} must hold exactly one public dataclass, has {len(found)}")
        return found[0]

    def knobs(self, name: str) -> dict[str, Any]:
        """Knob name -> default (`dataclasses.MISSING` where a value is required). Imports the member."""
        return {field.name: field.default for field in dataclasses.fields(self.member(name))}

    def create(self, name: str, *, file: object = None, key: str | None = None, **knobs: Any) -> Any:
        """The member with these knobs.

        Raises:
            InputError: an unknown member or knob, a missing one, or a value that the member refuses with ValueError.
        """
        self.check(name, file=file, key=key)
        known = self.knobs(name)
        for knob in knobs:
            if knob not in known:
                raise InputError(
                    f"{self.noun} {name!r} has no knob {knob!r}", file=file, key=key, got=knob, known=known or ["none"]
                )
        missing = [knob for knob, default in known.items() if default is dataclasses.MISSING and knob not in knobs]
        if missing:
            raise InputError(f"{self.noun} {name!r} needs {', '.join(missing)}", file=file, key=key)
        try:
            return self.member(name)(**knobs)
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.noun} {name!r}: {error}", file=file, key=key) from error


@functools.cache  # a search asks thousands of times
def _names(package: str) -> tuple[str, ...]:
    folder = _ROOT.joinpath(*package.split("."))
    return tuple(sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")))


SCHEDULERS = Family("scheduler", "engine.schedulers")
WEIGHT_FORMATS = Family("weight format", "engine.quantize.formats")
WEIGHT_METHODS = Family("weight method", "engine.quantize.methods")
CHECKPOINT_LAYOUTS = Family("layout of quantised checkpoints", "engine.quantize.layouts")
PRUNERS = Family("pruner", "engine.prune.pruners")
KV_POLICIES = Family("KV policy", "engine.kv.policies")
KV_CODECS = Family("KV codec", "engine.kv.codecs")
KV_PLACES = Family("KV place", "engine.kv.places")
KV_LAYOUTS = Family("KV layout", "engine.kv.layouts")
SPECULATORS = Family("speculator", "engine.speculate.proposers")
ATTENTION = Family("attention backend", "engine.attention.backends")
TARGETS = Family("deployment target", "deploy")

"""SearchSpace: what is free in a study, read from YAML.

    dtype: [bf16, fp32]
    max_batch_size: [1, 2, 4, 8]
    max_step_tokens: {low: 128, high: 2048, step: 128}
    weights: {native: {}, int8: {}, int4: {group_size: [32, 64, 128]}}
    kv:
      policy: {full: {}, h2o: {kv_budget: {low: 0.05, high: 0.5, log: true}}}
    kernels: {fused: [true, false]}
    parallel: {tensor_parallel_size: [1, 2], pipeline_parallel_size: [1, 2], num_micro_batches: [1, 4]}
    constraints:
    - when: {weights: int4, dtype: fp16}
      reason: why not

A family maps members to their own knobs, so a knob exists only where its member is chosen. What is not mentioned keeps
its default. Values are lists or ranges (`spec/domain.py`); constraints are in `spec/constraint.py`, and what makes no
sense in any space is in `spec/rules.py`.
"""

import dataclasses
import hashlib
import json
import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from codesign.errors import InputError, shown
from codesign.registry import Family
from codesign.spec.constraint import Constraint, read_constraints
from codesign.spec.domain import Domain, Range, Values, read_domain
from codesign.spec.engine_config import FAMILIES, GROUPS, PLAIN_FIELDS, Choice, EngineConfig, KVConfig, Scalar
from codesign.spec.rules import senseless, unpaid
from codesign.spec.yaml import Document, Key, load_yaml

Pick = Callable[[str, Domain], Scalar]
Knobs = Mapping[str, Domain]

_TOP = (*dict.fromkeys(key.partition(".")[0] for key in (*PLAIN_FIELDS, *FAMILIES)), "constraints")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One knob of the space.

    Attributes:
        name: dotted and stable, e.g. "weights.int4.group_size"; the same as in `EngineConfig.flat()`.
        when: (name, value) that must be chosen for this knob to exist, or None.
    """

    name: str
    domain: Domain
    when: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Attributes:
    path: the file, as the person wrote it.
    fields: dotted key of a plain field of EngineConfig -> domain.
    families: dotted family key -> member -> knob -> domain.
    plain: the document as it was read, for the study folder.
    """

    path: Path
    fields: Mapping[str, Domain]
    families: Mapping[str, Mapping[str, Knobs]]
    constraints: tuple[Constraint, ...]
    plain: Mapping[str, Any]

    def build(self, pick: Pick, *, max_model_len: int | None = None) -> EngineConfig:
        """One configuration; `pick` is asked only where there is something to choose.

        Args:
            pick: (name, domain) -> a value of that domain.
            max_model_len: what the workload needs, where the space itself does not say.
        """

        def value(name: str, domain: Domain) -> Scalar:
            if isinstance(domain, Values) and domain.size == 1:
                return domain.values[0]
            return pick(name, domain)

        values: dict[str, Any] = {} if max_model_len is None else {"max_model_len": max_model_len}
        for name, domain in self.fields.items():
            values[name] = value(name, domain)
        for key, members in self.families.items():
            member = str(value(key, Values(tuple(members))))
            knobs = {knob: value(f"{key}.{member}.{knob}", domain) for knob, domain in members[member].items()}
            values[key] = Choice.of(member, **knobs)
        return _config(values)

    def refusal(self, config: EngineConfig) -> str | None:
        """Why a constraint or a rule of all spaces excludes this configuration, or None. Defaults count too."""
        config = config.resolve()
        values = config.flat()
        for constraint in self.constraints:
            if constraint.rules_out(values):
                return constraint.reason
        return senseless(config) or unpaid(config)

    def default(self, max_model_len: int | None = None) -> EngineConfig:
        """The unmodified configuration that every study measures first: neutral members, EngineConfig's defaults.

        A plain field whose default the space does not hold takes the space's first value (a range: its nearest end).
        """
        defaults = EngineConfig()
        values: dict[str, Any] = {} if max_model_len is None else {"max_model_len": max_model_len}
        for name, domain in self.fields.items():
            default = values.get(name, operator.attrgetter(name)(defaults))
            if default not in domain:
                default = domain.values[0] if isinstance(domain, Values) else _nearest(default, domain)
            values[name] = default
        return _config(values)

    def parameters(self) -> tuple[Parameter, ...]:
        """Every knob with its domain and the choice it hangs on, fixed ones included; parents before children."""
        found = [Parameter(name=name, domain=domain) for name, domain in self.fields.items()]
        for key, members in self.families.items():
            found.append(Parameter(name=key, domain=Values(tuple(members))))
            found += [
                Parameter(name=f"{key}.{member}.{knob}", domain=domain, when=(key, member))
                for member, knobs in members.items()
                for knob, domain in knobs.items()
            ]
        return tuple(found)

    @property
    def size(self) -> int | None:
        """How many distinct points there are, before constraints; None with a continuous range."""
        sizes = [domain.size for domain in self.fields.values()]
        for members in self.families.values():
            per_member = [_product([domain.size for domain in knobs.values()]) for knobs in members.values()]
            sizes.append(None if None in per_member else sum(size for size in per_member if size is not None))
        return _product(sizes)

    @property
    def digest(self) -> str:
        """Sixteen hex digits of the document."""
        text = json.dumps(self.plain, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_space(path: str | Path) -> SearchSpace:
    """Reads and checks a search space; imports the members it names to check their knobs.

    Raises:
        InputError: the first thing that is wrong, with file, line, key, what is allowed, the nearest known name.
    """
    document = load_yaml(path)
    plain = document.value
    if not isinstance(plain, dict):
        raise document.error(f"must be a mapping with {', '.join(_TOP)}, got {shown(plain)}")
    for name in plain:
        if name not in _TOP:
            raise document.error("unknown key", (name,), got=name, known=_TOP)
    for group in dict.fromkeys(key.partition(".")[0] for key in (*PLAIN_FIELDS, *FAMILIES) if "." in key):
        if group in plain:
            _check_group(document, group)
    fields = {name: _field(document, name) for name in PLAIN_FIELDS if _is_in(plain, name)}
    families = {
        name: _family(document, tuple(name.split(".")), family)
        for name, family in FAMILIES.items()
        if _is_in(plain, name)
    }
    constraints = read_constraints(document, ("constraints",)) if "constraints" in plain else ()
    return SearchSpace(path=Path(path), fields=fields, families=families, constraints=constraints, plain=plain)


def _config(values: Mapping[str, Any]) -> EngineConfig:
    """EngineConfig from dotted keys."""

    def group(name: str) -> dict[str, Any]:
        return {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{name}.")}

    found: dict[str, Any] = {key: value for key, value in values.items() if "." not in key}
    found.update({name: kind(**group(name)) for name, kind in GROUPS.items()})
    return EngineConfig(**found, kv=KVConfig(**group("kv")))


def _is_in(plain: Mapping[str, Any], name: str) -> bool:
    """Whether a document says something at a dotted key of one or two parts, its groups being mappings."""
    group, _, part = name.partition(".")
    return group in plain and (not part or part in plain[group])


def _nearest(value: Any, domain: Range) -> int | float:
    """The end of the range that is nearer; the low one where there is nothing to compare."""
    return domain.high if isinstance(value, int | float) and value > domain.high else domain.low


def _product(sizes: list[int | None]) -> int | None:
    return None if None in sizes else math.prod(size for size in sizes if size is not None)


def _field(document: Document, name: str) -> Domain:
    key = tuple(name.split("."))
    domain = read_domain(document, key)
    for value in domain.examples:
        try:
            _config({name: value})  # its own check is what is wanted here
        except InputError as error:
            raise document.error(error.message, key) from None
    return domain


def _check_group(document: Document, name: str) -> None:
    """`kv`, `kernels` and `parallel` hold what is chosen below them."""
    known = tuple(key.partition(".")[2] for key in (*FAMILIES, *PLAIN_FIELDS) if key.startswith(f"{name}."))
    if not isinstance(document.value[name], dict):
        raise document.error(f"must be a mapping with {', '.join(known)}, got {shown(document.value[name])}", (name,))
    for part in document.value[name]:
        if part not in known:
            raise document.error("unknown key", (name, part), got=part, known=known)


def _family(document: Document, key: Key, family: Family) -> dict[str, Knobs]:
    plain = document.at(key)
    if isinstance(plain, str):
        plain = [plain]
    if isinstance(plain, list) and plain and all(isinstance(name, str) for name in plain):
        if len(set(plain)) != len(plain):
            raise document.error("a member is listed twice", key)
        members: dict[str, Any] = dict.fromkeys(plain)
    elif isinstance(plain, dict) and plain:
        members = plain
    else:
        raise document.error(
            f"must name {family.noun}s ({', '.join(family.names())}), each with its knobs; got {shown(plain)}", key
        )
    found: dict[str, Knobs] = {}
    for member in members:
        place = (*key, member) if isinstance(plain, dict) else key
        try:
            family.check(member)
        except InputError as error:
            raise document.error(error.message, place) from None
        knobs = members[member] if members[member] is not None else {}
        if not isinstance(knobs, dict):
            raise document.error(f"must be a mapping of knobs, got {shown(knobs)}", place)
        found[member] = _knobs(document, place, family, member, knobs)
    return found


def _knobs(document: Document, key: Key, family: Family, member: str, knobs: Mapping[str, Any]) -> Knobs:
    known = tuple(family.knobs(member))
    for knob in knobs:
        if knob not in known:
            raise document.error(
                f"{family.noun} {member!r} has no knob {shown(knob)}", (*key, knob), got=knob, known=known or ("none",)
            )
    domains = {knob: read_domain(document, (*key, knob)) for knob in knobs}
    first: dict[str, Any] = {knob: domain.examples[0] for knob, domain in domains.items()}
    _check_member(document, key, family, member, first)
    # One knob at a time; a value that the member refuses only together with others is met when it is built.
    for knob, domain in domains.items():
        for value in domain.examples[1:]:
            _check_member(document, (*key, knob), family, member, {**first, knob: value})
    return domains


def _check_member(document: Document, key: Key, family: Family, member: str, knobs: Mapping[str, Any]) -> None:
    try:
        family.create(member, **knobs)
    except InputError as error:
        raise document.error(error.message, key) from None

"""EngineConfig: one point of the search space, as plain data.

The same document feeds `search`, `measure`, `serve` and `export`:

    dtype: bf16
    max_batch_size: 8
    max_model_len: 2048
    weights: {name: int4, group_size: 64}
    kv: {policy: {name: h2o, kv_budget: 0.2}, codec: native, place: device}
    kernels: {fused: true, graphs: false}
    parallel: {tensor_parallel_size: 2, pipeline_parallel_size: 1, num_micro_batches: 1}

A family choice is a name, or a mapping with `name` and the member's knobs. Knobs left out take the member's defaults
when the configuration is resolved; only resolved configurations are stored, so that a digest means one engine.
"""

import dataclasses
import hashlib
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

from codesign.errors import InputError, shown
from codesign.registry import (
    ATTENTION,
    KV_CODECS,
    KV_LAYOUTS,
    KV_PLACES,
    KV_POLICIES,
    PRUNERS,
    SCHEDULERS,
    SPECULATORS,
    WEIGHT_FORMATS,
    Family,
)
from codesign.spec.yaml import load_yaml

Dtype = Literal["fp32", "bf16", "fp16"]
Scalar = int | float | str | bool

# Dotted key of EngineConfig -> the family chosen from there.
FAMILIES: dict[str, Family] = {
    "scheduler": SCHEDULERS,
    "weights": WEIGHT_FORMATS,
    "prune": PRUNERS,
    "kv.policy": KV_POLICIES,
    "kv.codec": KV_CODECS,
    "kv.place": KV_PLACES,
    "kv.layout": KV_LAYOUTS,
    "speculate": SPECULATORS,
    "attention": ATTENTION,
}
_CHOICES = tuple(key for key in FAMILIES if "." not in key)
# Dotted keys of what holds a plain value, and those of them that are true or false.
PLAIN_FIELDS = (
    "dtype",
    "max_batch_size",
    "max_model_len",
    "kv_memory_bytes",
    "max_step_tokens",
    "prefix_cache",
    "kernels.fused",
    "kernels.graphs",
    "parallel.tensor_parallel_size",
    "parallel.pipeline_parallel_size",
    "parallel.num_micro_batches",
)
FLAGS = ("prefix_cache", "kernels.fused", "kernels.graphs")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A member of a family with its knobs, as sorted pairs so that it hashes."""

    name: str
    knobs: tuple[tuple[str, Scalar], ...] = ()

    @classmethod
    def of(cls, name: str, **knobs: Scalar) -> Self:
        return cls(name, tuple(sorted(knobs.items())))

    @property
    def knob_dict(self) -> dict[str, Scalar]:
        return dict(self.knobs)

    def to_dict(self) -> dict[str, Scalar]:
        return {"name": self.name, **self.knob_dict}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVConfig:
    policy: Choice = Choice("full")
    codec: Choice = Choice("native")
    place: Choice = Choice("device")
    layout: Choice = Choice("dense")


_KV_PARTS = tuple(field.name for field in dataclasses.fields(KVConfig))


def _check_flag(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InputError(f"must be true or false, got {shown(value)}", key=key)


def _check_count(key: str, value: object, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        limit = "2^50" if most == 2**50 else str(most)
        raise InputError(f"must be a whole number from 1 to {limit}, got {shown(value)}", key=key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Args:
    fused: the small operations of a layer in one pass each (`engine/kernels/pieces.py`).
    graphs: steps of output tokens recorded on the device once and replayed (`engine/graphs.py`); for CUDA, with
        attention triton.
    """

    fused: bool = False
    graphs: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_flag(f"kernels.{field.name}", getattr(self, field.name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one engine is spread over ranks, processes with a device (or cores) each (`engine/parallel/`).

    Args:
        tensor_parallel_size: ranks that share every layer.
        pipeline_parallel_size: stages, runs of layers one after the other; each has `tensor_parallel_size` ranks.
        num_micro_batches: parts that the sequences of one step are cut into, so that stages work at the same time;
            means nothing with one stage.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    num_micro_batches: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_count(f"parallel.{field.name}", getattr(self, field.name), 1024)

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size


# Keys that hold plain fields.
GROUPS: dict[str, type[KernelsConfig] | type[ParallelConfig]] = {"kernels": KernelsConfig, "parallel": ParallelConfig}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How to build one engine. The defaults are the unmodified configuration that every study measures first.

    Args:
        dtype: what activations, KV and unquantised weights are held in.
        max_batch_size: most sequences in one step.
        max_model_len: most tokens (prompt and output) of one sequence.
        kv_memory_bytes: upper bound of the KV cache; None means as much as the batch and length need.
        max_step_tokens: most query tokens in one step; longer prompts are prefilled in chunks of this size.
        prefix_cache: keep what prompts have in common, so that it is computed once; needs kv.layout paged.
    """

    dtype: Dtype = "bf16"
    max_batch_size: int = 8
    max_model_len: int = 2048
    kv_memory_bytes: int | None = None
    max_step_tokens: int = 2048
    scheduler: Choice = Choice("continuous")
    weights: Choice = Choice("native")
    prune: Choice = Choice("none")
    kv: KVConfig = KVConfig()
    speculate: Choice = Choice("none")
    prefix_cache: bool = False
    attention: Choice = Choice("sdpa")
    kernels: KernelsConfig = KernelsConfig()
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        if self.dtype not in get_args(Dtype):
            raise InputError(
                f"unknown dtype {shown(self.dtype)}", key="dtype", got=str(self.dtype), known=get_args(Dtype)
            )
        for name in ("max_batch_size", "max_model_len", "max_step_tokens", "kv_memory_bytes"):
            value = getattr(self, name)
            if value is None and name == "kv_memory_bytes":
                continue
            _check_count(name, value, 2**50)
        _check_flag("prefix_cache", self.prefix_cache)

    def choices(self) -> dict[str, tuple[Family, Choice]]:
        """Dotted key -> (family, choice), for everything that is chosen from a family."""
        return {key: (family, operator.attrgetter(key)(self)) for key, family in FAMILIES.items()}

    @property
    def is_emulated(self) -> bool:
        """Whether a choice stands for arithmetic that the machine does not have; for resolved configurations."""
        return any(choice.knob_dict.get("emulated") is True for _, choice in self.choices().values())

    def flat(self) -> dict[str, Scalar | None]:
        """Every value under one dotted name: `weights` -> "int4", `weights.int4.group_size` -> 64.

        These are the names of a search space's parameters; unlike `to_dict` it keeps knobs of different members apart.
        """
        values: dict[str, Scalar | None] = {name: operator.attrgetter(name)(self) for name in PLAIN_FIELDS}
        for key, (_, choice) in self.choices().items():
            values[key] = choice.name
            values.update({f"{key}.{choice.name}.{knob}": value for knob, value in choice.knobs})
        return values

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON or YAML; `from_dict` gives it back."""
        plain: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "kv"
        }
        for name in _CHOICES:
            plain[name] = plain[name].to_dict()
        plain["kv"] = {part: getattr(self.kv, part).to_dict() for part in _KV_PARTS}
        plain.update({name: dataclasses.asdict(plain[name]) for name in GROUPS})
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], *, file: object = None) -> Self:
        """Reads what a person or `to_dict` wrote.

        Raises:
            InputError: unknown keys, wrong types, unknown members; names `file` and the dotted key.
        """
        values = _mapping(plain, "", [field.name for field in dataclasses.fields(cls)], file)
        for key in _CHOICES:
            if key in values:
                values[key] = _choice(values[key], key, FAMILIES[key], file)
        if "kv" in values:
            kv = _mapping(values["kv"], "kv", list(_KV_PARTS), file)
            values["kv"] = KVConfig(**{k: _choice(v, f"kv.{k}", FAMILIES[f"kv.{k}"], file) for k, v in kv.items()})
        try:
            for group, kind in GROUPS.items():
                if group in values:
                    names = [field.name for field in dataclasses.fields(kind)]
                    values[group] = kind(**_mapping(values[group], group, names, file))
            return cls(**values)
        except InputError as error:
            raise InputError(error.message, file=file, key=error.key) from None

    def resolve(self, *, file: object = None) -> Self:
        """The same configuration with every member's default knobs filled in. Imports the chosen members.

        A knob that is None is absent, and stays so: plain data has no other way to say it.

        Raises:
            InputError: a knob that its member does not know or refuses.
        """
        filled: dict[str, Choice] = {}
        for key, (family, choice) in self.choices().items():
            member = family.create(choice.name, file=file, key=key, **choice.knob_dict)
            knobs = {f.name: getattr(member, f.name) for f in dataclasses.fields(member)}
            filled[key] = Choice.of(choice.name, **{name: v for name, v in knobs.items() if v is not None})
        kv = KVConfig(**{part: filled.pop(f"kv.{part}") for part in _KV_PARTS})
        return dataclasses.replace(self, kv=kv, **cast(dict[str, Any], filled))

    @property
    def digest(self) -> str:
        """Sixteen hex digits of the canonical JSON; call it on a resolved configuration."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_config(path: str | Path) -> EngineConfig:
    """The configuration in a YAML file, resolved; imports the members it names to check their knobs.

    Raises:
        InputError: the first thing that is wrong, with file, line, key, what is allowed, the nearest known name.
    """
    document = load_yaml(path)
    try:
        return EngineConfig.from_dict(document.value).resolve()
    except InputError as error:
        raise document.error(error.message, tuple((error.key or "").split(".")) if error.key else ()) from None


def _mapping(plain: Any, key: str, known: list[str], file: object) -> dict[str, Any]:
    if not isinstance(plain, Mapping):
        raise InputError(f"must be a mapping with {', '.join(known)}, got {shown(plain)}", file=file, key=key or None)
    for name in plain:
        if name not in known:
            dotted = f"{key}.{name}" if key else str(name)
            raise InputError("unknown key", file=file, key=dotted, got=str(name), known=known)
    return dict(plain)


def _choice(plain: Any, key: str, family: Family, file: object) -> Choice:
    if isinstance(plain, Choice):
        return plain
    if isinstance(plain, str):
        plain = {"name": plain}
    if not isinstance(plain, Mapping) or not isinstance(plain.get("name"), str):
        raise InputError(
            f"must be a {family.noun} ({', '.join(family.names())}) or a mapping with `name`, got {shown(plain)}",
            file=file,
            key=key,
        )
    knobs = {str(k): v for k, v in plain.items() if k != "name"}
    for knob, value in knobs.items():
        if not isinstance(value, Scalar):
            raise InputError(f"must be a plain value, got {shown(value)}", file=file, key=f"{key}.{knob}")
    family.check(plain["name"], file=file, key=key)
    return Choice.of(plain["name"], **knobs)

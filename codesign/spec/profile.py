"""Profile: what is fixed in a study, read from YAML: hardware, model, workload, service level, objectives.

hardware: hardware/a100.yaml                       a part from a file, relative to the profile
hardware: {from: hardware/a100.yaml, count: 4}     the same, with keys overridden in place
model: bundled
draft: ../models/a-smaller-one                     for speculation; the bundled model has one of its own
workload: {scenario: offline, prompt_tokens: 256, output_tokens: 64, num_requests: 64}
slo: {tpot_ms: {p99: 50}, quality: {max_kl: 0.05}}
objectives: [throughput_tokens_per_s, kl_divergence, {tpot_ms: p90}]
search_space: ../search_spaces/default.yaml
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from codesign.errors import InputError, shown
from codesign.spec.hardware import Device, Hardware
from codesign.spec.metrics import METRICS, Objective
from codesign.spec.model import ModelSpec
from codesign.spec.model_source import (
    Fetch,
    bundled_draft,
    cached_snapshot,
    model_from_text,
    resolve_draft,
    resolve_model,
)
from codesign.spec.section import validate
from codesign.spec.slo import Slo
from codesign.spec.workload import Workload
from codesign.spec.workload_files import read_workload
from codesign.spec.yaml import Document, Key, load_yaml

SECTIONS = ("hardware", "model", "draft", "workload", "slo", "objectives", "search_space")
_INCLUDABLE = ("hardware", "model", "draft", "workload", "slo")
_MAX_INCLUDES = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """Attributes:
    path: the file, as the person wrote it; its stem names the study.
    sections: the resolved inputs as plain data (files included, overrides applied), for the study folder.
    search_space: path of the search space, or None.
    """

    path: Path
    hardware: Hardware
    model_spec: ModelSpec
    workload: Workload
    slo: Slo
    objectives: tuple[Objective, ...]
    search_space: Path | None
    sections: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def device(self) -> Device:
        return self.hardware.device

    @property
    def asked_metrics(self) -> frozenset[str]:
        """Metrics that are optimised or limited."""
        named = [objective.metric for objective in self.objectives] + [limit.metric for limit in self.slo.limits()]
        return frozenset(named)

    @property
    def digest(self) -> str:
        """Sixteen hex digits of everything above but the file's own place and the search space."""
        text = json.dumps(self.sections, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def from_sections(cls, name: str, sections: Mapping[str, Any]) -> Self:
        """The profile of which these are the `sections`, without its search space; for another process or machine.

        A model that is a directory must be at the same path there.
        """
        model = _model_of(sections["model"])
        if "draft" in sections:
            model = dataclasses.replace(model, draft=_model_of(sections["draft"]))
        return cls(
            path=Path(f"{name}.yaml"),
            hardware=Hardware.model_validate(sections["hardware"]),
            model_spec=model,
            workload=Workload.model_validate(sections["workload"]),
            slo=Slo.model_validate(sections["slo"]),
            objectives=tuple(Objective(**objective) for objective in sections["objectives"]),
            search_space=None,
            sections=sections,
        )


def load_profile(path: str | Path, *, model_override: str | None = None, fetch: Fetch = cached_snapshot) -> Profile:
    """Reads and checks a profile with everything it includes.

    Args:
        model_override: instead of the profile's model: `bundled` or a directory, relative to the working directory.
            The profile's draft, if any, goes with the profile's model.
        fetch: (hub id, revision) -> directory; by default only the local cache is looked at.
    Raises:
        InputError: the first thing that is wrong, with file, line, key, what is allowed, the nearest known name.
    """
    path = Path(path)
    document = load_yaml(path)
    if not isinstance(document.value, dict):
        raise document.error(f"must be a mapping with {', '.join(SECTIONS)}, got {shown(document.value)}")
    for name in document.value:
        if name not in SECTIONS:
            raise document.error("unknown key", (name,), got=name, known=SECTIONS)
    for name in ("hardware", "model", "workload", "objectives"):
        if name not in document.value and not (name == "model" and model_override is not None):
            raise document.error("is missing", (name,))
    document = _with_includes(document, path.parent)
    hardware = validate(Hardware, document, ("hardware",))
    workload = read_workload(document, ("workload",))
    slo = validate(Slo, document, ("slo",)) if "slo" in document.value else Slo()
    objectives = _objectives(document)
    if model_override is not None:
        model_spec = _overriding_model(model_override)
    else:
        model_spec = resolve_model(document, ("model",), folder=path.parent, fetch=fetch)
        if "draft" in document.value:
            draft = resolve_draft(document, ("draft",), folder=path.parent, fetch=fetch)
            model_spec = dataclasses.replace(model_spec, draft=draft)
    return Profile(
        path=path,
        hardware=hardware,
        model_spec=model_spec,
        workload=workload,
        slo=slo,
        objectives=objectives,
        search_space=_search_space(document, path.parent),
        sections={
            "hardware": hardware.model_dump(mode="json", exclude_none=True),
            "model": _identity(model_spec),
            **_draft_section(model_spec),
            "workload": workload.model_dump(mode="json", exclude_none=True),
            "slo": slo.model_dump(mode="json", exclude_none=True),
            "objectives": [dataclasses.asdict(objective) for objective in objectives],
        },
    )


def _identity(model: ModelSpec) -> dict[str, Any]:
    """The model without what differs from machine to machine: where the package is installed."""
    plain = {name: value for name, value in dataclasses.asdict(model).items() if value is not None and name != "draft"}
    if model.name in ("bundled", bundled_draft().name):
        del plain["path"]
    return plain


def _model_of(section: Mapping[str, Any]) -> ModelSpec:
    """The reverse of `_identity`, on this machine."""
    if section["name"] == bundled_draft().name:
        return bundled_draft()
    return model_from_text("bundled", folder=Path()) if section["name"] == "bundled" else ModelSpec(**section)


def _draft_section(model: ModelSpec) -> dict[str, Any]:
    """The draft, where it is not the one that the bundled model has anyway."""
    if model.draft is None or (model.name == "bundled" and model.draft == bundled_draft()):
        return {}
    return {"draft": _identity(model.draft)}


def _with_includes(document: Document, folder: Path) -> Document:
    """The document with each part from a file put in its place; overrides go over what the file says."""
    value = dict(document.value)
    places = dict(document.places)
    for name in _INCLUDABLE:
        if name not in value:
            continue
        part, part_places = _included(value[name], (name,), document, folder, _MAX_INCLUDES)
        value[name] = part
        places = {**part_places, **places}  # where a key is overridden, that is where it stands
    return Document(value, places, document.file)


def _included(value: Any, key: Key, document: Document, folder: Path, left: int) -> tuple[Any, dict[Key, str]]:
    """A part and the places of the keys it took from files.

    A string that ends in .yaml is a file; a mapping with `from` is a file with overrides: mappings are merged key by
    key, everything else is replaced. Files are relative to the file that names them.
    """
    over: Mapping[str, Any] = {}
    source = value
    if isinstance(value, dict) and "from" in value:
        source = value["from"]
        over = {name: item for name, item in value.items() if name != "from"}
        if not isinstance(source, str):
            raise document.error(f"must be the path of a YAML file, got {shown(source)}", (*key, "from"))
    elif not (isinstance(value, str) and value.endswith((".yaml", ".yml"))):
        return value, {}
    if left == 0:
        raise document.error(f"files include each other more than {_MAX_INCLUDES} deep", key)
    path = folder / source
    try:
        inner = load_yaml(path)
    except InputError as error:
        if error.file != str(path):
            raise  # the file is there and something inside it is wrong
        raise document.error(f"{shown(source)}: {error.message}", key) from None
    base, places = inner.value, {(*key, *inner_key): place for inner_key, place in inner.places.items()}
    if base is None or not isinstance(base, str | dict):
        raise InputError(f"must be a mapping, got {shown(base)}", file=inner.file, key=".".join(map(str, key)))
    inner = Document({key[0]: base}, places, inner.file)
    base, deeper = _included(base, key, inner, path.parent, left - 1)
    if over and not isinstance(base, dict):
        raise document.error(f"only a mapping can be overridden, {shown(source)} holds {shown(base)}", key)
    return (_merged(base, over) if over else base), {**deeper, **places}


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, item in over.items():
        below = merged.get(name)
        merged[name] = _merged(below, item) if isinstance(item, dict) and isinstance(below, dict) else item
    return merged


def _objectives(document: Document) -> tuple[Objective, ...]:
    listed = document.value["objectives"]
    if not isinstance(listed, list) or not listed:
        raise document.error(f"must be a list of metrics ({', '.join(METRICS)}), got {shown(listed)}", ("objectives",))
    found: list[Objective] = []
    for index, item in enumerate(listed):
        key: Key = ("objectives", index)
        if isinstance(item, dict) and len(item) == 1:
            ((metric, statistic),) = item.items()
            if not isinstance(statistic, str):
                raise document.error(f"the statistic must be text such as p90, got {shown(statistic)}", (*key, metric))
        elif isinstance(item, str):
            metric, statistic = item, ""
        else:
            raise document.error(f"must be a metric or {{metric: statistic}}, got {shown(item)}", key)
        try:
            objective = Objective.of(metric, statistic)
        except InputError as error:
            raise document.error(error.message, key) from None
        if objective.metric in [other.metric for other in found]:
            raise document.error(f"{objective.metric} is listed twice", key)
        found.append(objective)
    return tuple(found)


def _overriding_model(text: str) -> ModelSpec:
    try:
        return model_from_text(text, folder=Path.cwd())
    except InputError as error:
        raise InputError(error.message, key="--model") from None


def _search_space(document: Document, folder: Path) -> Path | None:
    if "search_space" not in document.value:
        return None
    value = document.value["search_space"]
    if not isinstance(value, str) or not value:
        raise document.error(f"must be the path of a search space, got {shown(value)}", ("search_space",))
    path = folder / value
    try:
        if path.is_file():
            return path
    except (OSError, ValueError):
        pass
    raise document.error(f"no such file: {shown(value)} (relative to {folder})", ("search_space",))

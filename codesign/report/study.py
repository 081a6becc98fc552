"""A study folder read back: what was asked (study.json) and what was found (trials/*.json)."""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from codesign.errors import InputError
from codesign.results import pareto
from codesign.results.ledger import Damaged, read_records
from codesign.results.record import TrialRecord
from codesign.spec.metrics import METRICS, Objective
from codesign.units import format_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Attributes:
    inputs: study.json as it is.
    records: every readable trial, by number, then attempt.
    damaged: files in trials/ that are no record, with the reason.
    """

    folder: Path
    inputs: Mapping[str, Any]
    objectives: tuple[Objective, ...]
    records: tuple[TrialRecord, ...]
    damaged: tuple[Damaged, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads a study folder.

        Raises:
            InputError: not a study folder, or its study.json says something that no study says.
        """
        file = folder / "study.json"
        try:
            inputs = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                "not a study: it has no study.json; a study is a folder written by `codesign search`", file=folder
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"cannot be read: {error}", file=file) from error
        if not isinstance(inputs, dict):
            raise InputError("must be a mapping", file=file)
        records, damaged = read_records(folder / "trials")
        return cls(
            folder=folder,
            inputs=inputs,
            objectives=_objectives(inputs.get("objectives"), file),
            records=tuple(records),
            damaged=tuple(damaged),
        )

    @property
    def name(self) -> str:
        return str(self.inputs.get("study", self.folder.name))

    @property
    def shell_path(self) -> str:
        """The folder as a person would type it in a shell."""
        path, here = self.folder.resolve(), Path.cwd()
        return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))

    @property
    def model(self) -> str:
        return str(self.inputs.get("model", "unknown model"))

    @property
    def profile(self) -> Mapping[str, Any]:
        profile = self.inputs.get("profile")
        return profile if isinstance(profile, dict) else {}

    @property
    def machine(self) -> str:
        """The hardware's name in the profile, and what the trials say they ran on."""
        hardware = self.profile.get("hardware")
        named = hardware.get("name") if isinstance(hardware, dict) else hardware
        seen = {machine_text(record.provenance) for record in self.records}
        return " / ".join(dict.fromkeys(str(part) for part in (named, *sorted(seen)) if part)) or "unknown machine"

    @cached_property
    def baseline(self) -> TrialRecord | None:
        """The last attempt at trial 0, the unmodified configuration; None before it has finished."""
        attempts = [record for record in self.records if record.number == 0]
        return attempts[-1] if attempts else None

    @cached_property
    def measured(self) -> tuple[TrialRecord, ...]:
        """Trials that ended well, whether or not they keep the limits."""
        return tuple(record for record in self.records if record.outcome.kind == "ok")

    @cached_property
    def failed(self) -> tuple[TrialRecord, ...]:
        return tuple(record for record in self.records if record.outcome.kind != "ok")

    @property
    def num_compared(self) -> int:
        """How many measured trials are held against the baseline, so that a picked one is judged as one of so many."""
        return max(1, sum(record.number != 0 for record in self.measured))

    @cached_property
    def front(self) -> tuple[TrialRecord, ...]:
        """Feasible trials that no other feasible trial beats in every objective."""
        return tuple(pareto.front(self.records, self.objectives))

    @cached_property
    def picks(self) -> dict[str, int]:
        """Named choices: baseline, fastest, smallest, best_quality, balanced -> trial number."""
        return dict(pareto.picks(self.records, self.objectives))

    def trial(self, number: int) -> TrialRecord:
        """The last attempt at this number."""
        return next(record for record in reversed(self.records) if record.number == number)

    @cached_property
    def shared_provenance(self) -> dict[str, Any]:
        """What every trial says alike."""
        first = self.records[0].provenance if self.records else {}
        return {
            key: value
            for key, value in first.items()
            if all(key in record.provenance and record.provenance[key] == value for record in self.records)
        }

    @cached_property
    def metric_names(self) -> tuple[str, ...]:
        """Metrics that some trial has: the objectives first, then the order of the metrics table."""
        seen = {name for record in self.measured for name in record.metrics}
        ordered = [*(objective.metric for objective in self.objectives), *METRICS]
        return tuple(name for name in dict.fromkeys(ordered) if name in seen)


def machine_text(provenance: Mapping[str, Any]) -> str:
    """`AMD EPYC 7R13, 2 cores, 23.4 GiB`, with the GPUs first; "" where the record does not say."""
    machine = provenance.get("machine")
    if not isinstance(machine, dict):
        return str(machine or "")
    gpus = provenance.get("gpus")
    names = [str(gpu.get("name", "GPU")) for gpu in gpus if isinstance(gpu, dict)] if isinstance(gpus, list) else []
    parts = [f"{names.count(name)} × {name}" for name in dict.fromkeys(names)]
    parts += [str(machine["cpu"])] if "cpu" in machine else []
    parts += [f"{machine['cores']} cores"] if "cores" in machine else []
    memory = machine.get("memory_bytes")
    parts += [format_bytes(memory)] if isinstance(memory, int | float) else []
    return ", ".join(parts)


def _objectives(plain: Any, file: Path) -> tuple[Objective, ...]:
    if not isinstance(plain, list) or not plain:
        raise InputError("must list at least one objective", file=file, key="objectives")
    found = []
    for item in plain:
        try:
            objective = Objective(**item)
        except TypeError as error:
            raise InputError(f"not an objective: {error}", file=file, key="objectives") from None
        if objective.metric not in METRICS:
            raise InputError("unknown metric", file=file, key="objectives", got=str(objective.metric), known=METRICS)
        if objective.direction not in ("minimize", "maximize"):
            raise InputError(f"unknown direction {objective.direction!r}", file=file, key="objectives")
        found.append(objective)
    return tuple(found)

"""Two or more studies beside each other: both fronts on the same axes, and what forbids comparing them at all."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codesign.errors import InputError
from codesign.report.cards import MARKS
from codesign.report.compare import Change, change
from codesign.report.figures import comparison_figure
from codesign.report.render import encoded, render
from codesign.report.rows import column, table_cell
from codesign.report.scatter import axes, measured_line, scatter_data
from codesign.report.show import full, listed, plural, spoken
from codesign.report.study import Study
from codesign.report.tables import labels_of, trials_frame
from codesign.results.files import write_file
from codesign.results.record import TrialRecord
from codesign.spec.metrics import METRICS


def write_comparison(study_dirs: Sequence[Path]) -> Path:
    """Writes one page that shows several studies on the same axes, into the first one's folder; returns its path.

    Raises:
        InputError: fewer than two different studies, or one that is none.
        WorkError: a folder cannot be read or written.
    """
    studies = load_all(study_dirs)
    page = comparison_file(studies)
    write_file(page, encoded(render("comparison.html", **comparison_context(studies))))
    return page


def comparison_file(studies: Sequence[Study]) -> Path:
    """Where the comparison goes: into the first study's folder, named after the others."""
    others = "-".join(re.sub(r"[^\w.-]", "_", study.folder.resolve().name)[:60] for study in studies[1:])
    return studies[0].folder / f"compare-{others}.html"


def load_all(folders: Sequence[Path]) -> list[Study]:
    """Raises InputError: fewer than two different studies."""
    if len({folder.resolve() for folder in folders}) < 2 or len(set(folders)) < len(folders):
        raise InputError("a comparison needs at least two different studies")
    return [Study.load(folder) for folder in folders]


def comparison_context(studies: Sequence[Study]) -> dict[str, Any]:
    """Everything that comparison.html and page.js need, as keyword arguments of `render.render`."""
    names = study_names(studies)
    frames = {name: trials_frame(study) for name, study in zip(names, studies, strict=True)}
    labels = [labels_of(study) for study in studies]
    shared = shared_metrics(studies)
    x, y = (shared[1] if len(shared) > 1 else shared[0], shared[0]) if shared else ("", "")
    figure = None
    if shared:
        lines = {name: measured_line(study, frames[name], x, y) for name, study in zip(names, studies, strict=True)}
        figure = comparison_figure(frames, lines, x=x, y=y)
    return {
        "title": f"{' and '.join(names)}: codesign comparison",
        "with_figures": figure is not None,
        "names": names,
        "studies": [
            {
                "name": name,
                "model": study.model,
                "machine": study.machine,
                "trials": plural(len(study.records), "trial"),
            }
            for name, study in zip(names, studies, strict=True)
        ],
        "warnings": warnings(studies),
        "bests": bests(studies),
        "has_figure": figure is not None,
        "metric_names": shared,
        "x": x,
        "y": y,
        "columns": [column(name) for name in shared],
        "fronts": [
            {
                "study": name,
                "number": record.number,
                "label": label.of(record.config),
                "tier": record.tier,
                "cells": [table_cell(record, metric) for metric in shared],
            }
            for name, study, label in zip(names, studies, labels, strict=True)
            for record in study.front
        ],
        "data": {
            "figure": figure,
            "axes": axes(shared),
            "studies": [
                scatter_data(study, frames[name], label, linked=False)
                for name, study, label in zip(names, studies, labels, strict=True)
            ],
        },
    }


def study_names(studies: Sequence[Study]) -> list[str]:
    """The studies' names; the folder's name is added where two are called alike."""
    names = [study.name for study in studies]
    return [
        name if names.count(name) == 1 else f"{name} ({position + 1}: {study.folder.resolve().name})"
        for position, (name, study) in enumerate(zip(names, studies, strict=True))
    ]


def shared_metrics(studies: Sequence[Study]) -> list[str]:
    """Metrics that every study measured, in the order of the first."""
    return [name for name in studies[0].metric_names if all(name in study.metric_names for study in studies)]


def warnings(studies: Sequence[Study]) -> list[str]:
    """What differs besides the configurations, so that a difference may have nothing to do with them."""
    found = []
    for what, values in (
        ("machines", [study.machine for study in studies]),
        ("models", [study.model for study in studies]),
        ("workloads", [study.profile.get("workload") for study in studies]),
        ("limits", [study.profile.get("slo") for study in studies]),
        ("objectives", [study.objectives for study in studies]),
    ):
        if any(value != values[0] for value in values):
            found.append(f"Their {what} differ: the fronts do not show the same thing.")
    tiers = {record.tier for study in studies for record in study.measured}
    if len(tiers) > 1:
        found.append(f"They mix figures of the tiers {listed(sorted(tiers))}.")
    return found


def bests(studies: Sequence[Study]) -> list[dict[str, Any]]:
    """Per metric: the unmodified configuration and the best feasible one of each study, against the first study's."""
    found = []
    for metric in shared_metrics(studies):
        for what, records in (
            ("unmodified", [study.baseline for study in studies]),
            ("best that keeps the limits", [best(study, metric) for study in studies]),
        ):
            cells = [best_cell(record, records[0], metric, is_first=i == 0) for i, record in enumerate(records)]
            found.append({"metric": spoken(metric), "what": what, "cells": cells})
    return found


def best(study: Study, metric: str) -> TrialRecord | None:
    candidates = [record for record in study.measured if record.is_feasible and metric in record.metrics]
    sign = 1 if METRICS[metric].direction == "minimize" else -1
    return min(candidates, key=lambda record: sign * record.metrics[metric].value, default=None)


def best_cell(record: TrialRecord | None, first: TrialRecord | None, metric: str, *, is_first: bool) -> dict[str, str]:
    if record is None or metric not in record.metrics:
        return {"value": "not measured", "change": "", "judgement": ""}
    against: Change | None = None if is_first or first is None else change(record, first, metric)
    return {
        "value": f"#{record.number}: {full(record.metrics[metric], record.tier)}",
        "change": f"{MARKS[against.judgement]} {against.text()}" if against else "",
        "judgement": against.judgement if against else "",
    }

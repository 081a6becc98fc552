"""A study as the page shows it: plain values and finished text for the template, plain data for the scripts.

Nothing is measured or compared here; tables.py, compare.py, payoff.py and verdict.py do that.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from codesign.report.compare import FLOOR, change
from codesign.report.figures import axis_title, pareto_figure, payoff_figure
from codesign.report.labels import Labels
from codesign.report.payoff import payoffs
from codesign.report.show import basis, full, interval, listed, number, plural, quantity, spoken, visible_deep
from codesign.report.study import Study
from codesign.report.tables import broken, failures_frame, labels_of, picks_of, staircase, trials_frame
from codesign.report.verdict import pick_tie, verdict
from codesign.results.record import TrialRecord
from codesign.spec.metrics import METRICS
from codesign.spec.yaml import dump_yaml
from codesign.units import format_bytes, format_seconds

MARKS = {"better": "▲", "worse": "▼", "tie": "≈", "unknown": "?"}
MEANINGS = {
    "oom": "Needs more memory than there is.",
    "unsupported": "This machine, model or combination cannot do it.",
    "numerical": "It produced NaN or infinity.",
    "cuda_fatal": "The GPU reported an error that ends the process.",
    "hang": "No progress within the time allowed.",
    "killed_by_os": "The system ended the process.",
    "crashed": "The process died of its own.",
    "protocol": "The process sent something that is no answer.",
    "harness": "Our own or the machine's fault; it says nothing about the configuration.",
}
TIERS = {
    "screen": "short windows; good for steering the search, not for claims",
    "confirm": "windows of 30 s and more; good for choosing from the front",
    "publish": "ten minutes and three fresh processes; good for claims to others",
}


def page_context(study: Study) -> dict[str, Any]:
    """Everything that page.html and page.js need, as keyword arguments of `render.render`."""
    frame, labels, choices = trials_frame(study), labels_of(study), payoffs(study)
    rows = {record.uid: index for index, record in enumerate(study.records)}
    x, y = default_axes(study)
    figure = None
    if x and y:
        baseline_uid = study.baseline.uid if study.baseline else None
        line = measured_line(study, frame, x, y)
        figure = pareto_figure(frame, x=x, y=y, baseline_uid=baseline_uid, line=line)
    payoff = payoff_figure(choices)
    return {
        "title": f"{study.name}: codesign report",
        "with_figures": figure is not None,
        "study": study,
        "verdict": verdict(study, choices),
        "facts": facts(study),
        "cards": cards(study, labels, rows),
        "has_figure": figure is not None,
        "metric_names": study.metric_names,
        "x": x,
        "y": y,
        "num_failed": len(study.failed),
        "payoffs": [{"sentence": p.sentence(), "judgement": p.verdict.split()[0]} for p in choices],
        "has_payoff_figure": payoff is not None,
        "columns": [{"name": name, "title": column_title(name)} for name in study.metric_names],
        "rows": [table_row(study, record, labels) for record in study.records],
        "failures": failures(study, rows),
        "method": method(study),
        "asked": asked(study),
        "limits": limits(study),
        "data": {
            "figure": figure,
            "payoff": payoff,
            "axes": {name: axis_title(name) for name in study.metric_names},
            "studies": [scatter_data(study, frame, labels, linked=True)] if figure else [],
            "details": details(study, labels),
        },
    }


def default_axes(study: Study) -> tuple[str, str]:
    """x and y: the second and the first objective, as far as they were measured; ("", "") when nothing was."""
    names = list(study.metric_names)
    if not names:
        return "", ""
    return (names[1] if len(names) > 1 else names[0]), names[0]


def measured_line(study: Study, frame: pd.DataFrame, x: str, y: str) -> list[int]:
    """Rows of the two-metric front of the feasible trials."""
    xs, ys = (values_of(frame[name].where(frame["feasible"])) for name in (x, y))
    return staircase(xs, ys, x, y)


def values_of(column: "pd.Series[Any]") -> list[float | None]:
    return [None if pd.isna(value) else float(value) for value in column]


def scatter_data(study: Study, frame: pd.DataFrame, labels: Labels, *, linked: bool) -> dict[str, Any]:
    """What the scripts need to put any two metrics on the axes.

    Args:
        linked: whether a click on a point leads to the trial's row on the same page.
    """
    names = [name for name in study.metric_names if name in METRICS]
    return {
        "metrics": {
            name: {
                "value": values_of(frame[name]),
                "low": values_of(frame[f"{name}.low"]),
                "high": values_of(frame[f"{name}.high"]),
                "text": [full(r.metrics[name], r.tier) if name in r.metrics else "" for r in study.records],
            }
            for name in names
        },
        "lines": {f"{x}|{y}": measured_line(study, frame, x, y) for x in names for y in names},
        "titles": [f"#{record.number} {labels.of(record.config)}" for record in study.records],
        "anchors": [index if linked else None for index in range(len(study.records))],
    }


def facts(study: Study) -> list[str]:
    """The line under the verdict: what was studied, where, how much of it."""
    counts = f"{plural(len(study.records), 'trial')}: {len(study.front)} on the front, {len(study.failed)} failed"
    found = [f"model: {study.model}", f"machine: {study.machine}", counts]
    workload = study.profile.get("workload")
    if isinstance(workload, Mapping) and "scenario" in workload:
        found.append(f"workload: {workload['scenario']}")
    found.append("objectives: " + listed([f"{o.metric} ({o.direction})" for o in study.objectives]))
    return found


def column_title(name: str) -> str:
    metric = METRICS.get(name)
    return f"{metric.title}; {'higher' if metric.direction == 'maximize' else 'lower'} is better" if metric else name


def cards(study: Study, labels: Labels, rows: Mapping[str, int]) -> list[dict[str, Any]]:
    """One card per picked trial, the unmodified first; a trial picked twice has one card with both names."""
    by_trial: dict[int, list[str]] = {}
    for pick, number_ in study.picks.items():
        by_trial.setdefault(number_, []).append(pick)
    found = []
    for number_, picks in by_trial.items():
        record = study.trial(number_)
        state = "" if record.is_feasible else record.outcome.kind if record.outcome.kind != "ok" else "breaks a limit"
        named = [pick for pick in picks if pick != "baseline"]
        found.append(
            {
                "names": ", ".join(("unmodified" if p == "baseline" else p).replace("_", " ") for p in picks).capitalize(),
                "number": number_,
                "row": rows[record.uid],
                "label": labels.of(record.config),
                "tier": record.tier,
                "state": state,
                "metrics": card_metrics(study, record),
                "tie": " ".join(filter(None, (pick_tie(study, pick, record) for pick in picks))),
                "command": f"codesign export {folder(study)} --pick {named[0]} --to native" if named else "",
            }
        )
    return found


def card_metrics(study: Study, record: TrialRecord) -> list[dict[str, Any]]:
    """The objectives, then speed, memory and quality that are none, so that no card shows speed without quality."""
    wanted = [objective.metric for objective in study.objectives]
    wanted += ["throughput_tokens_per_s", "tpot_ms", "peak_memory_bytes", "kl_divergence", "retrieval_accuracy"]
    found = []
    for name in dict.fromkeys(wanted):
        metric = record.metrics.get(name)
        if metric is None:
            continue
        ranges = interval(metric.low, metric.high, metric.unit)
        found.append(
            {
                "name": spoken(name),
                "value": quantity(metric.value, metric.unit),
                "basis": " ".join(filter(None, (ranges, basis(metric, record.tier)))),
                "change": changed(study, record, name),
            }
        )
    return found


def changed(study: Study, record: TrialRecord, name: str) -> dict[str, str] | None:
    """Against the unmodified configuration; None for itself and where either was not measured."""
    baseline = study.baseline
    if baseline is None or record.uid == baseline.uid:
        return None
    found = change(record, baseline, name)
    if found is None:
        return None
    return {"judgement": found.judgement, "text": f"{MARKS[found.judgement]} {found.text()}"}


def folder(study: Study) -> str:
    """The study's folder as a person would type it."""
    path = study.folder.resolve()
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def table_row(study: Study, record: TrialRecord, labels: Labels) -> dict[str, Any]:
    excess = broken(record)
    on_front = any(record.uid == other.uid for other in study.front)
    if record.outcome.kind != "ok":
        result, chip, kinds, note = record.outcome.kind, "bad", ["failed"], first_line(record.outcome.detail)
    elif excess:
        note = listed([f"{name} {number(100 * amount)} % over" for name, amount in sorted(excess.items())])
        result, chip, kinds = "breaks a limit", "bad", ["infeasible"]
    elif on_front:
        result, chip, kinds, note = "on the front", "front", ["feasible", "front"], ""
    else:
        result, chip, kinds, note = "feasible", "", ["feasible"], ""
    is_baseline = study.baseline is not None and record.uid == study.baseline.uid
    return {
        "number": record.number,
        "attempt": record.attempt,
        "label": labels.of(record.config),
        "picks": ", ".join(pick.replace("_", " ") for pick in picks_of(study, record)),
        "result": result,
        "chip": chip,
        "kinds": " ".join(kinds),
        "note": note,
        "is_baseline": is_baseline,
        "tier": record.tier if record.outcome.kind == "ok" else "",
        "cells": [table_cell(record, name) for name in study.metric_names],
    }


def table_cell(record: TrialRecord, name: str) -> dict[str, str]:
    metric = record.metrics.get(name)
    if metric is None:
        return {"sort": "", "value": "", "basis": ""}
    ranges = interval(metric.low, metric.high, metric.unit)
    return {
        "sort": repr(float(metric.value)),
        "value": quantity(metric.value, metric.unit if metric.unit == "bytes" else ""),
        "basis": " ".join(filter(None, (ranges, metric.statistic, f"n={metric.num_samples}"))),
    }


def first_line(text: str) -> str:
    line = text.strip().split("\n", 1)[0]
    return line if len(line) <= 90 else line[:89] + "…"


def failures(study: Study, rows: Mapping[str, int]) -> list[dict[str, Any]]:
    found = []
    for row in failures_frame(study).to_dict("records"):
        members = [record for record in study.failed if record.outcome.kind == row["kind"]]
        found.append(
            {
                "kind": row["kind"],
                "count": row["count"],
                "trials": [(record.number, rows[record.uid]) for record in members],
                "meaning": MEANINGS[row["kind"]],
                "example": row["example"] or "no detail was recorded",
            }
        )
    return found


def details(study: Study, labels: Labels) -> list[dict[str, Any]]:
    shared = shared_provenance(study)
    return [detail(study, record, labels, shared) for record in study.records]


def detail(study: Study, record: TrialRecord, labels: Labels, shared: Mapping[str, Any]) -> dict[str, Any]:
    config_file = f"{folder(study)}/configs/trial-{record.number}.yaml"
    changes = {name: changed(study, record, name) for name in record.metrics}
    finish_reasons = pd.Series([request.finish_reason for request in record.requests], dtype=str).value_counts()
    trust = dict(record.trust)
    if record.requests:
        trust["requests"] = listed([f"{count} ended by {reason}" for reason, count in finish_reasons.items()])
    return {
        "uid": record.uid,
        "title": f"#{record.number} {labels.of(record.config)}",
        "kind": record.outcome.kind,
        "failure": "" if record.outcome.kind == "ok" else record.outcome.detail or "no detail was recorded",
        "warnings": list(record.warnings),
        "metrics": {name: full(metric, record.tier) for name, metric in record.metrics.items()},
        "changes": {name: found["text"] for name, found in changes.items() if found},
        "violations": {
            name: f"{number(100 * amount)} % over: broken" if amount > 0 else f"kept, {number(-100 * amount)} % to spare"
            for name, amount in sorted(record.violations.items())
        },
        "config": dump_yaml(visible_deep(record.config)),
        "bytes": {part: format_bytes(count) for part, count in record.bytes.items()},
        "phases": {phase: format_seconds(seconds) for phase, seconds in record.phases.items()},
        "kernels": dict(record.kernels),
        "resolved": dict(record.resolved),
        "monitor": dict(record.monitor),
        "trust": trust,
        "provenance": {key: value for key, value in record.provenance.items() if key not in shared},
        "commands": f"codesign measure {folder(study)}/profile.yaml --config {config_file}\n"
        f"codesign export {folder(study)} --trial {record.number} --to native",
    }


def shared_provenance(study: Study) -> dict[str, Any]:
    """What every trial says alike, said once on the page."""
    if not study.records:
        return {}
    first = study.records[0].provenance
    return {
        key: value
        for key, value in first.items()
        if all(key in record.provenance and record.provenance[key] == value for record in study.records)
    }


def method(study: Study) -> list[str]:
    """How the numbers came about, from the records."""
    if not study.records:
        return ["Nothing has been measured yet."]
    counts = pd.Series([record.tier for record in study.measured], dtype=str).value_counts()
    lines = [f"{plural(int(count), 'trial')} at tier {tier}: {TIERS[str(tier)]}." for tier, count in counts.items()]
    lines.append("Each configuration was built anew in a process of its own and closed again before the next.")
    lines.append(
        "Speed, memory and quality of a row come from the same trial; brackets are 95 % intervals, n is the number of "
        "independent samples; a figure without brackets is a single reading."
    )
    settled = [record.trust["warmup_settled"] for record in study.measured if "warmup_settled" in record.trust]
    if settled:
        steady = sum(map(bool, settled))
        lines.append(f"Warm-up settled in {steady} of {len(settled)} trials that say so; it is not part of any latency.")
    seconds = sum(sum(record.phases.values()) for record in study.records)
    times = sorted(time for record in study.records for time in (record.started_at, record.finished_at) if time)
    if times:
        lines.append(f"Measured between {times[0]} and {times[-1]}; {format_seconds(seconds)} inside trials.")
    return lines


def asked(study: Study) -> list[tuple[str, str]]:
    """What was asked and what it ran on, as YAML blocks with a title."""
    blocks: list[tuple[str, Any]] = [
        ("Same in every trial", shared_provenance(study)),
        ("Workload and limits", {key: study.profile[key] for key in ("workload", "slo") if key in study.profile}),
        ("Hardware", study.profile.get("hardware")),
        ("Search space", study.inputs.get("space")),
    ]
    return [(title, dump_yaml(visible_deep(json.loads(json.dumps(block))))) for title, block in blocks if block]


def limits(study: Study) -> list[str]:
    """What these numbers cannot say."""
    floors = listed([f"{number(100 * share)} % at {tier}" for tier, share in FLOOR.items()])
    lines = [
        "Figures of tier screen steer the search only. Whatever came out best was partly lucky: confirm it with "
        "`codesign measure` before you build on it.",
        "Intervals see what varies inside a trial, not between processes, hours or machines. So a speed, memory or "
        f"energy difference counts only beyond {floors}, and anything less is shown as a tie.",
        "Results hold for this model, this workload and this machine; another batch size or prompt length can turn "
        "them round.",
    ]
    unscored = sum("kl_divergence" not in record.metrics for record in study.measured)
    if unscored:
        lines.append(
            f"{unscored} of {plural(len(study.measured), 'measured trial')} has no KL divergence: nothing is known about "
            "what it does to the output."
        )
    return lines



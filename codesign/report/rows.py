"""The rows of the page's tables: every trial, every choice that was compared, every way of failing."""

from collections.abc import Mapping
from typing import Any

from codesign.report.compare import outdone
from codesign.report.labels import Labels
from codesign.report.payoff import SHOWN, Payoff
from codesign.report.show import interval, listed, number, quantity, spoken, visible
from codesign.report.study import Study
from codesign.report.tables import broken, failures_frame, picks_of
from codesign.results.record import TrialRecord
from codesign.spec.metrics import METRICS

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


def column(name: str) -> dict[str, str]:
    """A column's head: the metric as people say it, its unit, and the whole story as a tooltip."""
    metric = METRICS.get(name)
    if metric is None:
        return {"name": name, "unit": "", "title": name}
    better = "higher" if metric.direction == "maximize" else "lower"
    unit = "" if metric.unit == "bytes" else metric.unit
    return {"name": spoken(name), "unit": unit, "title": f"{name}: {metric.title}; {better} is better"}


def table_rows(study: Study, labels: Labels) -> list[dict[str, Any]]:
    better = outdone(study.front, [objective.metric for objective in study.objectives])
    front_notes = {
        record.uid: f"no measurable advantage over #{better[record.uid].number}" if record.uid in better else ""
        for record in study.front
    }
    return [table_row(study, record, labels, front_notes) for record in study.records]


def table_row(study: Study, record: TrialRecord, labels: Labels, front_notes: Mapping[str, str]) -> dict[str, Any]:
    excess, result = broken(record), str(record.outcome.kind)
    if record.outcome.kind != "ok":
        chip, kinds, note = "bad", ["failed"], first_line(str(record.outcome.detail))
    elif excess:
        note = listed([f"{name} {number(100 * amount)} % over" for name, amount in sorted(excess.items())])
        result, chip, kinds = "breaks a limit", "bad", ["infeasible"]
    elif record.uid in front_notes:
        result, chip, kinds, note = "on the front", "front", ["feasible", "front"], front_notes[record.uid]
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
        "basis": " ".join(filter(None, (ranges, visible(metric.statistic), f"n={metric.num_samples}"))),
    }


def payoff_rows(choices: list[Payoff]) -> list[dict[str, Any]]:
    """One row per choice and batch size: the verdict, what it rests on, and every effect that was measured."""
    shown = [metric for metric in SHOWN if any(payoff.effect(metric) for payoff in choices)]
    judged = {"faster": "better", "slower": "worse"}
    return [
        {
            "name": f"{payoff.key} {payoff.name}",
            "batch": payoff.max_batch_size,
            "verdict": payoff.verdict if payoff.is_isolated else "not settled",
            "judgement": judged.get(payoff.verdict, "tie") if payoff.is_isolated else "unknown",
            "basis": payoff.caveat or payoff.told,
            "effects": [effect.text() if (effect := payoff.effect(metric)) else "" for metric in shown],
        }
        for payoff in choices
    ]


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

"""A study as the page shows it: plain values and finished text for the template, plain data for the scripts.

Nothing is measured or compared here; tables.py, compare.py, payoff.py and verdict.py do that.
"""

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from codesign.report.cards import cards
from codesign.report.compare import FLOOR
from codesign.report.details import details
from codesign.report.figures import pareto_figure, payoff_figure
from codesign.report.payoff import SHOWN, payoffs, summaries
from codesign.report.rows import column, failures, payoff_rows, table_rows
from codesign.report.scatter import axes, default_axes, measured_line, scatter_data
from codesign.report.show import listed, number, plural, spoken, visible_deep
from codesign.report.study import Study
from codesign.report.tables import labels_of, trials_frame
from codesign.report.verdict import verdict
from codesign.spec.yaml import dump_yaml
from codesign.units import format_seconds

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
        "payoffs": summaries(choices),
        "payoff_columns": [spoken(metric) for metric in SHOWN if any(p.effect(metric) for p in choices)],
        "payoff_rows": payoff_rows(choices),
        "has_payoff_figure": payoff is not None,
        "columns": [column(name) for name in study.metric_names],
        "rows": table_rows(study, labels),
        "failures": failures(study, rows),
        "method": method(study),
        "asked": asked(study),
        "limits": limits(study),
        "data": {
            "figure": figure,
            "payoff": payoff,
            "axes": axes(study.metric_names),
            "studies": [scatter_data(study, frame, labels, linked=True)] if figure else [],
            "details": details(study, labels),
        },
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
        lines.append(f"Warm-up settled in {steady} of {plural(len(settled), 'trial')}; it is not part of any latency.")
    disturbed = sum(record.trust.get("is_disturbed") is True for record in study.measured)
    if disturbed:
        lines.append(
            f"{plural(disturbed, 'trial')} shared the machine with other work while measured; see its warning."
        )
    seconds = sum(sum(record.phases.values()) for record in study.records)
    times = sorted(time for record in study.records for time in (record.started_at, record.finished_at) if time)
    if times:
        lines.append(f"Measured between {times[0]} and {times[-1]}; {format_seconds(seconds)} inside trials.")
    return lines


def asked(study: Study) -> list[tuple[str, str]]:
    """What was asked and what it ran on, as YAML blocks with a title."""
    blocks: list[tuple[str, Any]] = [
        ("Same in every trial", study.shared_provenance),
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
        f"Intervals against the unmodified configuration are widened for {plural(study.num_compared, 'comparison')} "
        "with it, so that the luckiest of many equal configurations is not called better.",
        "Results hold for this model, this workload and this machine; another batch size or prompt length can turn "
        "them round.",
    ]
    unscored = sum("kl_divergence" not in record.metrics for record in study.measured)
    if unscored:
        lines.append(
            f"{unscored} of {plural(len(study.measured), 'measured trial')} carry no KL divergence: nothing is known "
            "about what they do to the output."
        )
    return lines

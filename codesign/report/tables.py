"""Records -> frames. Every figure of the page, the CSV and front.json is looked up or computed here or in compare.py.

trials_frame    one row per trial: identity, configuration, outcome, and per metric value, low, high, num_samples
failures_frame  one row per way of failing
staircase       the two-objective front of a projection, for the line in the scatter
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from codesign.report.labels import Labels, parts
from codesign.report.study import Study
from codesign.results.record import TrialRecord
from codesign.spec.metrics import METRICS


def labels_of(study: Study) -> Labels:
    baseline = study.baseline.config if study.baseline else None
    return Labels(baseline, (record.config for record in study.records))


def trials_frame(study: Study) -> pd.DataFrame:
    """One row per trial record, in the order of `study.records`.

    Columns: number, attempt, uid, label, outcome, detail, tier, feasible, on_front, picks, violations (JSON of the
    broken limits), then for each metric `M`: `M` (value in the unit of spec.metrics), `M.statistic`, `M.low`,
    `M.high`, `M.num_samples`, then `config.KEY` for each part of the configuration, then warnings and times.
    A metric that was not measured is missing (NaN), never zero.
    """
    labels = labels_of(study)
    on_front = {record.uid for record in study.front}
    rows = [_row(study, record, labels.of(record.config), record.uid in on_front) for record in study.records]
    frame = pd.DataFrame(rows, columns=_columns(study))
    for name in study.metric_names:
        frame[name] = frame[name].astype(float)
    return frame


def _columns(study: Study) -> list[str]:
    metrics = [
        column
        for name in study.metric_names
        for column in (name, f"{name}.statistic", f"{name}.low", f"{name}.high", f"{name}.num_samples")
    ]
    keys = dict.fromkeys(f"config.{key}" for record in study.records for key in parts(record.config))
    identity = ["number", "attempt", "uid", "label", "outcome", "detail", "tier", "feasible", "on_front", "picks"]
    return [*identity, "violations", *metrics, *keys, "warnings", "started_at", "finished_at"]


def _row(study: Study, record: TrialRecord, label: str, on_front: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "number": record.number,
        "attempt": record.attempt,
        "uid": record.uid,
        "label": label,
        "outcome": record.outcome.kind,
        "detail": record.outcome.detail,
        "tier": record.tier,
        "feasible": record.is_feasible,
        "on_front": on_front,
        "picks": " ".join(picks_of(study, record)),
        "violations": json.dumps(broken(record), sort_keys=True),
        "warnings": "\n".join(record.warnings),
        "started_at": record.started_at,
        "finished_at": record.finished_at,
    }
    for name, metric in record.metrics.items():
        row |= {
            name: metric.value,
            f"{name}.statistic": metric.statistic,
            f"{name}.low": metric.low,
            f"{name}.high": metric.high,
            f"{name}.num_samples": metric.num_samples,
        }
    for key, value in parts(record.config).items():
        row[f"config.{key}"] = json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value
    return row


def picks_of(study: Study, record: TrialRecord) -> tuple[str, ...]:
    """The named picks that point at this very record (not at a failed earlier attempt of the same number)."""
    if study.trial(record.number).uid != record.uid:
        return ()
    return tuple(name for name, number in study.picks.items() if number == record.number)


def broken(record: TrialRecord) -> dict[str, float]:
    """Only the limits that are broken: constraint -> share over the limit."""
    return {name: amount for name, amount in record.violations.items() if amount > 0}


def failures_frame(study: Study) -> pd.DataFrame:
    """Columns kind, count, numbers (trial numbers), example (the first detail); the most frequent kind first."""
    rows = [(record.outcome.kind, record.number, record.outcome.detail) for record in study.failed]
    frame = pd.DataFrame(rows, columns=["kind", "number", "detail"])
    if frame.empty:
        return pd.DataFrame(columns=["kind", "count", "numbers", "example"])
    grouped = frame.groupby("kind", sort=True)
    found = pd.DataFrame(
        {"count": grouped.size(), "numbers": grouped["number"].agg(list), "example": grouped["detail"].first()}
    ).reset_index()
    return found.sort_values(["count", "kind"], ascending=[False, True], ignore_index=True)


def staircase(x: Sequence[float | None], y: Sequence[float | None], x_metric: str, y_metric: str) -> list[int]:
    """Indices of the points that no other point beats in both of two metrics, ordered along x; None is skipped.

    Equal points are kept once, since one line runs through both.
    """
    signs = [1 if METRICS[name].direction == "minimize" else -1 for name in (x_metric, y_metric)]
    points = [
        (signs[0] * a, signs[1] * b, index)
        for index, (a, b) in enumerate(zip(x, y, strict=True))
        if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)
    ]
    kept, best = [], math.inf
    for a, b, index in sorted(points):
        if b < best:
            kept.append((a, index))
            best = b
    return [index for _, index in sorted(kept, key=lambda pair: signs[0] * pair[0])]

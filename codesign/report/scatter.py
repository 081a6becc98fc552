"""What page.js needs to put any two metrics on the axes of the scatter."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from codesign.report.figures import axis_title, step_shape
from codesign.report.labels import Labels
from codesign.report.show import full
from codesign.report.study import Study
from codesign.report.tables import staircase
from codesign.spec.metrics import METRICS


def axes(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Metric -> what its axis is called and where the steps of a front turn when it is x."""
    return {name: {"title": axis_title(name), "step": step_shape(name)} for name in names}


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

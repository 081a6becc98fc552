"""Frames -> figures. Only what is drawn is decided here; every number comes from tables.py, compare.py or payoff.py.

Kinds of points differ in shape and in lightness as well as in colour (Okabe and Ito's palette, safe for colour-blind
readers and in grey print).
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from codesign.report.payoff import Payoff
from codesign.report.show import spoken, visible
from codesign.spec.metrics import METRICS

BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8A8F98", "#22262B"
STUDY_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
STUDY_SYMBOLS = ("circle", "square", "diamond", "triangle-up")
# Group -> (legend, marker). The later is drawn over the earlier.
GROUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "infeasible": ("breaks a limit", {"symbol": "x-thin", "size": 8, "line": {"color": ORANGE, "width": 2}}),
    "dominated": (
        "measured",
        {"symbol": "circle-open", "size": 8, "color": GREY, "line": {"color": GREY, "width": 1.5}},
    ),
    "front": (
        "on the front of all objectives",
        {"symbol": "circle", "size": 11, "color": BLUE, "line": {"color": "#ffffff", "width": 1}},
    ),
    "baseline": (
        "unmodified",
        {"symbol": "star-diamond", "size": 15, "color": "#F0E442", "line": {"color": INK, "width": 1.5}},
    ),
}


# Intervals are drawn for these groups only: bars on every point would hide the points.
BAR_COLOUR = {"front": BLUE, "baseline": INK}


def plotly_text(text: object) -> str:
    """Text that Plotly shows as it is: its labels understand a subset of HTML, so markup is escaped."""
    return visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")


def axis_title(metric: str) -> str:
    """`throughput (tokens/s): higher is better`."""
    known = METRICS.get(metric)
    if known is None:
        return plotly_text(metric)
    unit = f" ({known.unit})" if known.unit else ""
    return f"{spoken(metric)}{unit}: {'higher' if known.direction == 'maximize' else 'lower'} is better"


def step_shape(x: str) -> str:
    """A front is a staircase: nothing was measured between two points. Its steps turn where the better x is."""
    return "hv" if METRICS[x].direction == "minimize" else "vh"


def group_of(row: "pd.Series[Any]", baseline_uid: str | None) -> str:
    """Which of GROUPS a measured trial belongs to."""
    if row["uid"] == baseline_uid:
        return "baseline"
    if not row["feasible"]:
        return "infeasible"
    return "front" if row["on_front"] else "dominated"


def pareto_figure(
    frame: pd.DataFrame, *, x: str, y: str, baseline_uid: str | None, line: Sequence[int]
) -> dict[str, Any]:
    """Scatter of the measured trials as plain Plotly JSON.

    Every trace carries in `meta` its role and the rows of `frame` it stands for, those without x or y included, so that
    the page can put other metrics on the axes.

    Args:
        frame: `trials_frame`, with the columns x and y.
        line: rows of `frame` on the two-metric front, in drawing order.
    """
    figure = go.Figure()
    measured = frame[frame["outcome"] == "ok"]
    groups = [group_of(row, baseline_uid) for _, row in measured.iterrows()]
    figure.add_trace(
        go.Scatter(
            x=frame[x].iloc[list(line)].tolist(),
            y=frame[y].iloc[list(line)].tolist(),
            mode="lines",
            line={"color": BLUE, "width": 1.5, "dash": "dot", "shape": step_shape(x)},
            hoverinfo="skip",
            name="best trade of these two axes",
            meta={"role": "line", "study": 0},
        )
    )
    for group, (title, marker) in GROUPS.items():
        rows = measured[[g == group for g in groups]]
        members = [int(index) for index in rows.index]
        rows = rows[rows[x].notna() & rows[y].notna()]
        figure.add_trace(
            go.Scatter(
                x=rows[x].tolist(),
                y=rows[y].tolist(),
                mode="markers",
                marker=marker,
                name=title,
                meta={"role": group, "study": 0, "rows": members, "bars": group in BAR_COLOUR},
                hoverinfo="text",
                error_x=_errors(rows, x, BAR_COLOUR[group]) if group in BAR_COLOUR else None,
                error_y=_errors(rows, y, BAR_COLOUR[group]) if group in BAR_COLOUR else None,
            )
        )
    figure.update_layout(_layout(axis_title(x), axis_title(y)), height=460)
    return _plain(figure)


def _errors(rows: pd.DataFrame, metric: str, colour: str) -> dict[str, Any]:
    """Bars from the 95 % intervals; no bar where there is none."""
    high = (rows[f"{metric}.high"].astype(float) - rows[metric]).fillna(0.0)
    low = (rows[metric] - rows[f"{metric}.low"].astype(float)).fillna(0.0)
    return {
        "type": "data",
        "symmetric": False,
        "array": high.tolist(),
        "arrayminus": low.tolist(),
        "thickness": 1,
        "width": 3,
        "color": colour,
    }


def payoff_figure(payoffs: Sequence[Payoff]) -> dict[str, Any] | None:
    """Speed of each choice against the unmodified one: a dot and its range per choice and batch size.

    Returns:
        Plain Plotly JSON; None when no choice has an isolated pair with speed.
    """
    shown = [p for p in payoffs if p.is_isolated and p.speed is not None]
    if not shown:
        return None
    figure = go.Figure()
    styles = {
        "faster": ("pays in speed", BLUE, "triangle-right"),
        "slower": ("does not pay in speed", ORANGE, "triangle-left"),
        "no measurable difference": ("no measurable difference", GREY, "circle-open"),
        "mixed": ("differs between pairs", INK, "diamond-open"),
        "unknown": ("no interval to tell by", GREY, "x-thin-open"),
    }
    names = [plotly_text(f"{p.key} {p.name}, batch {p.max_batch_size}") for p in shown]
    for verdict, (title, colour, symbol) in styles.items():
        mine = [(name, p.speed) for name, p in zip(names, shown, strict=True) if p.verdict == verdict]
        effects = [(name, effect) for name, effect in mine if effect is not None]
        if not effects:
            continue
        # Time per token is a cost: its reciprocal is the gain in speed.
        gains = [_gain(e.metric, e.typical, e.low, e.high) for _, e in effects]
        figure.add_trace(
            go.Scatter(
                x=[gain[0] for gain in gains],
                y=[name for name, _ in effects],
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [gain[2] - gain[0] for gain in gains],
                    "arrayminus": [gain[0] - gain[1] for gain in gains],
                    "thickness": 1.5,
                    "color": colour,
                },
                mode="markers",
                name=title,
                marker={"symbol": symbol, "size": 11, "color": colour, "line": {"width": 2, "color": colour}},
                hovertext=[plotly_text(f"{name}: {e.text()}, {len(e.changes)} pair(s)") for name, e in effects],
                hoverinfo="text",
            )
        )
    figure.add_vline(x=1, line={"color": GREY, "width": 1, "dash": "dash"})
    figure.update_layout(_layout("speed, × the unmodified choice", ""), height=130 + 26 * len(shown))
    figure.update_xaxes(type="log", tickvals=_RATIO_TICKS, ticktext=[f"{tick:g}×" for tick in _RATIO_TICKS])
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], automargin=True)
    return _plain(figure)


_RATIO_TICKS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8, 10]


def _gain(metric: str, typical: float, low: float | None, high: float | None) -> tuple[float, float, float]:
    # A bar that has no end stops a factor of ten away; the text beside it says the truth.
    low = typical if low is None else max(low, typical / 10)
    high = typical if high is None else min(high, typical * 10)
    return (typical, low, high) if METRICS[metric].direction == "maximize" else (1 / typical, 1 / high, 1 / low)


def comparison_figure(
    frames: dict[str, pd.DataFrame], lines: dict[str, list[int]], *, x: str, y: str
) -> dict[str, Any]:
    """Several studies on the same axes: their measured trials faint, their fronts drawn through.

    Args:
        frames: study name -> `trials_frame`.
        lines: study name -> rows of its frame on the two-metric front, in drawing order.
    """
    figure = go.Figure()
    for position, (name, frame) in enumerate(frames.items()):
        colour, symbol = STUDY_COLOURS[position % 4], STUDY_SYMBOLS[position % 4]
        figure.add_trace(
            go.Scatter(
                x=frame[x].iloc[lines[name]].tolist(),
                y=frame[y].iloc[lines[name]].tolist(),
                mode="lines",
                line={
                    "color": colour,
                    "width": 1.5,
                    "dash": ("solid", "dash", "dot", "dashdot")[position % 4],
                    "shape": step_shape(x),
                },
                hoverinfo="skip",
                showlegend=False,
                meta={"role": "line", "study": position},
            )
        )
        feasible = frame[frame["feasible"]]
        for role, title, rows, mark in (
            ("front", plotly_text(name), feasible[feasible["on_front"]], {"symbol": symbol, "size": 11}),
            ("dominated", "", feasible[~feasible["on_front"]], {"symbol": f"{symbol}-open", "size": 7}),
        ):
            drawn = rows[rows[x].notna() & rows[y].notna()]
            figure.add_trace(
                go.Scatter(
                    x=drawn[x].tolist(),
                    y=drawn[y].tolist(),
                    mode="markers",
                    name=title,
                    showlegend=bool(title),
                    marker={**mark, "color": colour},
                    meta={"role": role, "study": position, "rows": [int(i) for i in rows.index], "bars": False},
                    hoverinfo="text",
                )
            )
    figure.update_layout(_layout(axis_title(x), axis_title(y)), height=460)
    return _plain(figure)


def _layout(x_title: str, y_title: str) -> dict[str, Any]:
    axis = {"gridcolor": "#D9DDE3", "zeroline": False, "linecolor": GREY, "ticks": "outside", "automargin": True}
    return {
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "margin": {"l": 60, "r": 16, "t": 16, "b": 56},
        "xaxis": {**axis, "title": {"text": x_title, "font": {"size": 13}}},
        "yaxis": {**axis, "title": {"text": y_title, "font": {"size": 13}, "standoff": 12}},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
    }


def _plain(figure: go.Figure) -> dict[str, Any]:
    plain = figure.to_plotly_json()
    return {"data": list(plain["data"]), "layout": plain["layout"]}

from pathlib import Path

import plotly.graph_objects as go
import pytest

from codesign.report.figures import GROUPS, axis_title, pareto_figure, payoff_figure, plotly_text
from codesign.report.payoff import payoffs
from codesign.report.study import Study
from codesign.report.tables import trials_frame
from tests.report.recorded import records, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study.load(write_study(tmp_path_factory.mktemp("study"), records(60)))


def test_every_measured_trial_is_in_exactly_one_group_of_the_scatter(study: Study) -> None:
    frame = trials_frame(study)

    figure = pareto_figure(
        frame, x="kl_divergence", y="throughput_tokens_per_s", baseline_uid=study.records[0].uid, line=[]
    )

    rows = [row for trace in figure["data"] for row in trace["meta"].get("rows", [])]
    assert sorted(rows) == [i for i, record in enumerate(study.records) if record.outcome.kind == "ok"]
    assert {trace["meta"]["role"] for trace in figure["data"]} == {"line", *GROUPS}


def test_points_carry_the_values_of_the_frame_and_none_is_invented(study: Study) -> None:
    frame = trials_frame(study)

    figure = pareto_figure(
        frame, x="kl_divergence", y="throughput_tokens_per_s", baseline_uid=study.records[0].uid, line=[]
    )

    drawn = sorted(pair for t in figure["data"] if "rows" in t["meta"] for pair in zip(t["x"], t["y"], strict=True))
    both = frame[["kl_divergence", "throughput_tokens_per_s"]].dropna()
    assert drawn == sorted(both.itertuples(index=False, name=None))


def test_figures_are_valid_plotly(study: Study) -> None:
    frame, found = trials_frame(study), payoff_figure(payoffs(study))

    assert found is not None
    go.Figure(found)
    go.Figure(pareto_figure(frame, x="kv_bytes", y="tpot_ms", baseline_uid=None, line=[0]))


def test_groups_differ_in_shape_and_not_in_colour_alone() -> None:
    symbols = [marker["symbol"] for _, marker in GROUPS.values()]

    assert len(set(symbols)) == len(symbols)


def test_without_a_pair_there_is_no_payoff_figure(tmp_path: Path) -> None:
    assert payoff_figure(payoffs(Study.load(write_study(tmp_path, records(1))))) is None


def test_an_axis_says_unit_and_direction() -> None:
    assert axis_title("tpot_ms") == "TPOT (ms): lower is better"


def test_markup_in_labels_is_escaped_for_plotly() -> None:
    assert plotly_text("<b>&\n") == "&lt;b&gt;&amp; "

import dataclasses
import json
import math
import random
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codesign.report.study import Study
from codesign.report.tables import broken, failures_frame, staircase, trials_frame
from tests.report.recorded import FAILURES, config, failed_record, ok_record, records, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study.load(write_study(tmp_path_factory.mktemp("study"), records(120)))


def test_each_trial_is_one_row_with_its_own_values(study: Study) -> None:
    frame = trials_frame(study)

    assert len(frame) == 120
    for row, record in zip(frame.to_dict("records"), study.records, strict=True):
        assert row["number"] == record.number
        assert row["tier"] == record.tier
        assert row["feasible"] == record.is_feasible
        for name, metric in record.metrics.items():
            assert row[name] == metric.value
            assert row[f"{name}.num_samples"] == metric.num_samples
            assert row[f"{name}.low"] == metric.low or (pd.isna(row[f"{name}.low"]) and metric.low is None)


def test_what_was_not_measured_is_missing_and_never_zero(study: Study) -> None:
    frame = trials_frame(study).set_index("number")

    assert math.isnan(frame.loc[7, "throughput_tokens_per_s"])  # a failed trial
    assert math.isnan(frame.loc[5, "kl_divergence"])  # quality was not scored
    assert frame.loc[5, "throughput_tokens_per_s"] > 0


def test_front_and_picks_are_marked(study: Study) -> None:
    frame = trials_frame(study).set_index("number")

    assert set(frame.index[frame["on_front"]]) == {record.number for record in study.front}
    for pick, number in study.picks.items():
        assert pick in str(frame.loc[number, "picks"]).split()


def test_only_broken_limits_are_listed() -> None:
    record = ok_record(1, config(policy="streaming_llm", kv_budget=0.05), random.Random(0))

    assert set(record.violations) == {"slo.quality.max_kl", "slo.tpot_ms.p99"}
    assert set(broken(record)) == {"slo.quality.max_kl"}


def test_the_violations_column_reads_back(study: Study) -> None:
    for text, record in zip(trials_frame(study)["violations"], study.records, strict=True):
        assert json.loads(text) == broken(record)


def test_failures_are_counted_by_kind_with_the_trials_and_a_report(study: Study) -> None:
    frame = failures_frame(study)

    assert set(frame["kind"]) == set(FAILURES)
    assert frame["count"].sum() == len(study.failed)
    assert frame["count"].is_monotonic_decreasing
    for row in frame.to_dict("records"):
        assert row["numbers"] == [r.number for r in study.failed if r.outcome.kind == row["kind"]]
        assert row["example"] == FAILURES[row["kind"]]


def test_a_study_without_failures_has_an_empty_failures_frame(tmp_path: Path) -> None:
    assert failures_frame(Study.load(write_study(tmp_path, records(1)))).empty


def test_a_retried_trial_keeps_both_records_and_the_last_one_counts(tmp_path: Path) -> None:
    lost = dataclasses.replace(failed_record(0, config(), "harness"), uid="first-attempt")
    again = dataclasses.replace(ok_record(0, config(), random.Random(0)), attempt=1)
    study = Study.load(write_study(tmp_path, [lost, again]))

    frame = trials_frame(study)

    assert list(frame["attempt"]) == [0, 1]
    assert list(frame["picks"].astype(bool)) == [False, True]
    assert study.baseline is not None
    assert study.baseline.uid == again.uid


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=30))
def test_the_staircase_is_the_two_metric_front(points: list[tuple[int, int]]) -> None:
    """x: kl_divergence (less is better), y: throughput (more is better); ties appear once."""
    xs, ys = [float(x) for x, _ in points], [float(y) for _, y in points]

    line = staircase(xs, ys, "kl_divergence", "throughput_tokens_per_s")

    best = {(x, y) for x, y in points if not any((a <= x and b >= y) and (a < x or b > y) for a, b in points)}
    assert {points[i] for i in line} == best
    assert len(line) == len(best)
    assert [points[i][0] for i in line] == sorted(points[i][0] for i in line)


def test_the_staircase_skips_what_was_not_measured() -> None:
    assert staircase([1.0, None, math.nan], [1.0, 2.0, 3.0], "tpot_ms", "tpot_ms") == [0]

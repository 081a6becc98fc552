import csv
import dataclasses
import io
import json
import math
import random
from pathlib import Path

from codesign.report.exports import front_document, trials_csv
from codesign.report.study import Study
from codesign.results.record import Outcome
from tests.report.payloads import PAYLOADS
from tests.report.recorded import config, failed_record, inputs, ok_record, records, write_study

FORMULAS = ('=HYPERLINK("http://x","y")', "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "＝1")


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def test_csv_lines_end_as_rfc_4180_wants_and_every_row_has_every_column(tmp_path: Path) -> None:
    text = trials_csv(Study.load(write_study(tmp_path, records(30))))

    rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    assert text.endswith("\r\n")
    assert len(rows) == 31
    assert {len(row) for row in rows} == {len(rows[0])}


def test_csv_values_read_back_exactly_and_missing_ones_are_empty(tmp_path: Path) -> None:
    study = Study.load(write_study(tmp_path, records(30)))

    for row, record in zip(read(trials_csv(study)), study.records, strict=True):
        assert int(row["number"]) == record.number
        assert row["feasible"] == str(record.is_feasible).lower()
        cell = row["throughput_tokens_per_s (tokens/s)"]
        if "throughput_tokens_per_s" in record.metrics:
            assert math.isclose(float(cell), record.metrics["throughput_tokens_per_s"].value, rel_tol=1e-12)
        else:
            assert cell == ""


def test_no_text_cell_starts_like_a_formula(tmp_path: Path) -> None:
    made = [
        dataclasses.replace(
            failed_record(number, {**config(), "dtype": text, text: text}, "crashed"),
            outcome=Outcome(kind="crashed", detail=text),
            warnings=(text,),
        )
        for number, text in enumerate((*FORMULAS, *PAYLOADS))
    ]

    rows = list(csv.reader(io.StringIO(trials_csv(Study.load(write_study(tmp_path, made))), newline=""), strict=True))

    for row in rows:
        for cell in row:
            assert not cell.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠"))


def test_a_negative_number_stays_a_number(tmp_path: Path) -> None:
    record = ok_record(0, config(), random.Random(0))
    low = dataclasses.replace(record.metrics["kl_divergence"], low=-0.25)
    made = [dataclasses.replace(record, metrics={**record.metrics, "kl_divergence": low})]

    row = read(trials_csv(Study.load(write_study(tmp_path, made))))[0]

    assert float(row["kl_divergence.low"]) == -0.25


def test_front_json_holds_the_front_and_the_picks_with_what_the_numbers_rest_on(tmp_path: Path) -> None:
    study = Study.load(write_study(tmp_path, records(40)))

    document = json.loads(json.dumps(front_document(study)))

    assert [trial["number"] for trial in document["front"]] == [record.number for record in study.front]
    assert {name: trial["number"] for name, trial in document["picks"].items()} == study.picks
    assert document["objectives"] == inputs()["objectives"]
    for trial in document["front"]:
        record = study.trial(trial["number"])
        assert trial["tier"] == record.tier
        assert trial["config"] == record.config
        assert trial["metrics"]["throughput_tokens_per_s"] == dataclasses.asdict(
            record.metrics["throughput_tokens_per_s"]
        )


def test_an_empty_study_has_an_empty_front(tmp_path: Path) -> None:
    document = front_document(Study.load(write_study(tmp_path, [])))

    assert (document["front"], document["picks"], document["num_trials"]) == ([], {}, 0)

"""What a study leaves for other programs: trials.csv and front.json."""

import csv
import dataclasses
import io
import math
from typing import Any

from codesign.report.show import spreadsheet_cell
from codesign.report.study import Study
from codesign.report.tables import labels_of, trials_frame
from codesign.results.record import TrialRecord
from codesign.spec.metrics import METRICS

FRONT_SCHEMA_VERSION = 1


def trials_csv(study: Study) -> str:
    """RFC 4180 text, one line per trial; columns of `trials_frame`, metric columns with their unit.

    A missing metric is an empty cell. A text cell that a spreadsheet would run starts with an apostrophe.
    """
    frame = trials_frame(study)
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow([spreadsheet_cell(_with_unit(str(column))) for column in frame.columns])
    for row in frame.itertuples(index=False, name=None):
        writer.writerow(["" if _is_missing(value) else spreadsheet_cell(_plain(value)) for value in row])
    return stream.getvalue()


def _with_unit(column: str) -> str:
    unit = METRICS[column].unit if column in METRICS else ""
    return f"{column} ({unit})" if unit else column


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _plain(value: object) -> object:
    if isinstance(value, bool):
        return "true" if value else "false"
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def front_document(study: Study) -> dict[str, Any]:
    """The front and the named picks as plain data; `codesign front --json` prints the same document."""
    labels = labels_of(study)

    def trial(record: TrialRecord) -> dict[str, Any]:
        return {
            "number": record.number,
            "uid": record.uid,
            "label": labels.of(record.config),
            "tier": record.tier,
            "feasible": record.is_feasible,
            "outcome": record.outcome.kind,
            "metrics": {name: dataclasses.asdict(metric) for name, metric in record.metrics.items()},
            "violations": dict(record.violations),
            "config": record.config,
            "config_digest": record.config_digest,
        }

    return {
        "schema_version": FRONT_SCHEMA_VERSION,
        "study": study.name,
        "model": study.model,
        "objectives": [dataclasses.asdict(objective) for objective in study.objectives],
        "num_trials": len(study.records),
        "num_failed": len(study.failed),
        "front": [trial(record) for record in study.front],
        "picks": {name: trial(study.trial(number)) for name, number in study.picks.items()},
    }

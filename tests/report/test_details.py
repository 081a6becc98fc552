"""What the panel of one trial says of speculation."""

import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console

from codesign.report.details import drafting, table_of_drafts
from codesign.results.record import TrialIdentity, TrialRecord
from codesign.search.console import print_record
from codesign.spec.engine_config import EngineConfig
from tests.search.fake_measure import record_of

SAID = {"num_drafted": 12, "num_accepted": 7, "acceptance": 0.58, "table": {"16": 0, "1": 4, "2": 3}}


def record(speculation: Any) -> TrialRecord:
    made = record_of(TrialIdentity(study="s", number=1, uid="u"), EngineConfig())
    return dataclasses.replace(made, resolved={"speculation": speculation})


def test_drafts_are_listed_by_batch_size_before_what_became_of_them() -> None:
    assert list(drafting(record(SAID)).items()) == [
        ("drafts at batch size 1", 4),
        ("drafts at batch size 2", 3),
        ("drafts at batch size 16", 0),
        ("num drafted", 12),
        ("num accepted", 7),
        ("acceptance", 0.58),
    ]


def test_measure_prints_them_too() -> None:
    stream = io.StringIO()
    print_record(record(SAID), Console(file=stream, width=200))

    assert "drafts by batch size: 1 -> 4, 2 -> 3, 16 -> 0" in stream.getvalue()


@pytest.mark.parametrize("said", [None, [], "x", {}, {"table": 3}, {"table": {"a": [1], "": None}}])
def test_whatever_a_child_wrote_is_no_error(said: Any) -> None:
    drafting(record(said))
    table_of_drafts(record(said))

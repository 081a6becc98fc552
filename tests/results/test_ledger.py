import contextlib
import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codesign.errors import WorkError
from codesign.results.ledger import quarantine, read_records, write_record
from codesign.results.record import MetricValue, RequestSample, TrialRecord
from tests.results.records import record
from tests.results.test_files import FaultOs, every_fault, with_fault


def test_records_come_back_equal_and_sorted_by_number(tmp_path: Path) -> None:
    rich = dataclasses.replace(
        record(2, {"tpot_ms": 1.5}),
        requests=(
            RequestSample(
                prompt_tokens=3, output_tokens=2, finish_reason="length", ttft_ms=1, e2e_ms=3, tpot_ms=2, itl_ms=(2.0,)
            ),
        ),
        warnings=("said aloud",),
    )
    written = [rich, record(0), record(10), record(1, attempt=1), record(1)]
    for item in written:
        write_record(tmp_path, item)

    found, damaged = read_records(tmp_path)

    assert damaged == []
    assert [(item.number, item.attempt) for item in found] == [(0, 0), (1, 0), (1, 1), (2, 0), (10, 0)]
    assert found[3] == rich


def test_a_missing_folder_is_an_empty_ledger(tmp_path: Path) -> None:
    assert read_records(tmp_path / "none") == ([], [])


def test_the_same_record_can_be_written_again(tmp_path: Path) -> None:
    write_record(tmp_path, record(0))
    write_record(tmp_path, record(0))

    assert len(read_records(tmp_path)[0]) == 1


def test_a_record_is_never_replaced(tmp_path: Path) -> None:
    path = write_record(tmp_path, record(0, {"tpot_ms": 1.0}))
    before = path.read_bytes()

    with pytest.raises(WorkError, match="never replaced"):
        write_record(tmp_path, record(0, {"tpot_ms": 2.0}))
    assert path.read_bytes() == before


@pytest.mark.parametrize("uid", ["", ".", "..", "../x", "a/b", "a\0b", ".hidden", "a" * 97, "ü", "a b", "a\n", "-rf"])
def test_a_uid_that_is_no_file_name_is_refused(uid: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uid"):
        write_record(tmp_path / "trials", record(0, uid=uid or "x") if uid else dataclasses.replace(record(0), uid=""))
    assert not (tmp_path / "trials").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_written(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_record(tmp_path, record(0, {"tpot_ms": value}))
    assert list(tmp_path.iterdir()) == []


GOOD = record(7, {"tpot_ms": 1.5}, uid="seven").to_json()


def altered(**fields: object) -> str:
    return json.dumps({**json.loads(GOOD), **fields})


DAMAGED: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "not a trial record"),
    "half a record": (GOOD[: len(GOOD) // 2], "not a trial record"),
    "one byte short": (GOOD[:-1], "not a trial record"),
    "two records": (GOOD + GOOD, "not a trial record"),
    "zeros": (b"\0" * 4096, "not a trial record"),
    "binary": (b"\xff\xfe\xfd", "UTF-8"),
    "a pickle": (b"\x80\x04\x95\x0b\x00\x00\x00", "UTF-8"),
    "a list": ("[]", "not a trial record"),
    "a number": ("5", "not a trial record"),
    "null": ("null", "not a trial record"),
    "bottomless": ("[" * 100_000, "not a trial record"),
    "NaN": (GOOD.replace("1.5", "NaN"), "NaN"),
    "Infinity": (GOOD.replace("1.5", "Infinity"), "Infinity"),
    "overflow": (GOOD.replace("1.5", "1e999"), "finite"),
    "number of 5000 digits": (GOOD.replace("1.5", "9" * 5000), "not a trial record"),
    "text for a number": (GOOD.replace("1.5", '"fast"'), "finite"),
    "another version": (altered(schema_version=2), "schema_version"),
    "no version": (altered(schema_version=None), "schema_version"),
    "unknown outcome": (altered(outcome={"kind": "fine", "detail": ""}), "outcome"),
    "unknown key": (altered(extra=1), "extra"),
    "missing key": (json.dumps({k: v for k, v in json.loads(GOOD).items() if k != "outcome"}), "outcome"),
    "negative number": (altered(number=-1), "number"),
    "number as text": (altered(number="7"), "number"),
    "boolean number": (altered(number=True), "number"),
    "metrics as a list": (altered(metrics=[]), "not a trial record"),
    "metric without unit": (altered(metrics={"tpot_ms": {"value": 1}}), "unit"),
    "config as text": (altered(config="x"), "config"),
    "violation as text": (altered(violations={"slo.power_w": "much"}), "finite"),
    "unknown tier": (altered(tier="best"), "tier"),
    "requests as numbers": (altered(requests=[1]), "not a trial record"),
    "another trial's uid": (altered(uid="eight"), "holds uid 'eight'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_reported_and_the_rest_is_read(name: str, tmp_path: Path) -> None:
    write_record(tmp_path, record(0))
    data, says = DAMAGED[name]
    (tmp_path / "seven.json").write_bytes(data if isinstance(data, bytes) else data.encode())

    found, damaged = read_records(tmp_path)

    assert [item.number for item in found] == [0]
    assert [item.path.name for item in damaged] == ["seven.json"]
    assert says in damaged[0].reason


@pytest.mark.parametrize("kind", ["link", "directory", "pipe"])
def test_what_is_no_regular_file_is_damaged(kind: str, tmp_path: Path) -> None:
    trials = tmp_path / "trials"
    write_record(trials, record(0))
    path = trials / "seven.json"
    if kind == "link":
        (tmp_path / "elsewhere.json").write_text(GOOD)
        path.symlink_to(tmp_path / "elsewhere.json")
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)

    found, damaged = read_records(trials)

    assert [item.number for item in found] == [0]
    assert [item.path for item in damaged] == [path]


def test_an_interrupted_write_is_passed_over(tmp_path: Path) -> None:
    write_record(tmp_path, record(0))
    (tmp_path / ".seven.json.99.tmp").write_text(GOOD[:50])

    assert [len(part) for part in read_records(tmp_path)] == [1, 0]


def test_quarantine_moves_and_never_deletes(tmp_path: Path) -> None:
    for content in ("torn", "torn again"):
        (tmp_path / "seven.json").write_text(content)
        quarantine(read_records(tmp_path)[1][0])

    assert read_records(tmp_path) == ([], [])
    assert sorted(path.read_text() for path in (tmp_path / "damaged").iterdir()) == ["torn", "torn again"]


@pytest.mark.parametrize(("error", "persistent"), list(every_fault()))
def test_whatever_fails_old_records_stay_readable(
    error: int | None, persistent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = record(0, {"tpot_ms": 1.0}), record(1, {"tpot_ms": 2.0})
    for fail_at in range(1, 100):
        trials = tmp_path / f"trials{fail_at}"
        write_record(trials, old)
        fault = FaultOs(fail_at, error, persistent=persistent)
        failure = with_fault(monkeypatch, fault, lambda trials=trials: write_record(trials, new))

        found, damaged = read_records(trials)
        assert damaged == []
        assert found in ([old], [old, new])
        assert failure is not None or found == [old, new]
        write_record(trials, new)  # the disk is well again: the same call now succeeds, whatever was left behind
        assert read_records(trials) == ([old, new], [])
        if fault.count < fail_at:
            break
    else:
        pytest.fail("the loop of failures never ended")

    assert fail_at > 8


def test_a_failed_folder_sync_is_made_good_by_writing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the rename the file is there but its name may not survive a power cut: the retry must sync again."""
    fault = FaultOs(7, errno.EIO, persistent=False)  # open write fsync close rename open(folder) fsync(folder)
    failure = with_fault(monkeypatch, fault, lambda: write_record(tmp_path, record(0)))
    again = FaultOs(99, errno.EIO, persistent=False)
    assert with_fault(monkeypatch, again, lambda: write_record(tmp_path, record(0))) is None

    assert failure is not None and "durable" in str(failure)
    assert again.count == 5  # open and close to compare, then open, fsync, close of the folder


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@given(st.dictionaries(st.sampled_from(["tpot_ms", "kv_bytes"]), NUMBERS), st.text(max_size=30))
def test_a_record_survives_json(metrics: dict[str, float], detail: str) -> None:
    item = record(3, metrics)
    item = dataclasses.replace(item, warnings=(detail,), monitor={"source": detail})

    assert TrialRecord.from_json(item.to_json()) == item


JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(JSON, st.sampled_from([*json.loads(GOOD)]))
def test_any_value_in_any_field_is_read_or_refused_and_nothing_else(value: object, field: str) -> None:
    with contextlib.suppress(WorkError):
        TrialRecord.from_json(altered(**{field: value}))


def test_metric_values_keep_their_types(tmp_path: Path) -> None:
    item = dataclasses.replace(record(0), metrics={"ttft_ms": MetricValue(value=3, unit="ms", statistic="p50", low=2)})
    write_record(tmp_path, item)

    assert read_records(tmp_path)[0] == [item]

"""A study folder read back, the broken ones included."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codesign.errors import CodesignError
from codesign.report.exports import front_document, trials_csv
from codesign.report.study import Study, machine_text
from codesign.report.view import page_context
from tests.report.recorded import config, failed_record, inputs, ok_record, records, write_study

ODD = [None, True, "x", "", -1, 0, 3.5, 1e308, 10**30, [], {}, [1], {"a": 1}, "\ud800", "<b>"]


def places(plain: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = plain.items() if isinstance(plain, dict) else enumerate(plain[:2]) if isinstance(plain, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from places(value, (*above, key))


@pytest.mark.parametrize("seed", range(25))
def test_any_field_of_another_type_is_damage_or_is_shown_and_never_a_crash(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    made = [ok_record(0, config(), rng), ok_record(1, config("int8"), rng), failed_record(2, config("int4"), "hang")]
    folder, plain_inputs = write_study(tmp_path, made), inputs("odd")
    victim = rng.choice(made)
    plain_inputs = json.loads(json.dumps(plain_inputs))  # mutated below
    file = folder / "trials" / f"{victim.uid}.json"
    for _ in range(2):
        record = json.loads(victim.to_json())
        target = record if rng.random() < 0.85 else plain_inputs
        path = rng.choice([p for p in places(target) if p != ("uid",)])
        inner = target
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = rng.choice(ODD)
        file.write_text(json.dumps(record))
        (folder / "study.json").write_text(json.dumps(plain_inputs))

        try:
            study = Study.load(folder)
            assert len(study.records) + len(study.damaged) == 3
            page_context(study)
            trials_csv(study)
            json.dumps(front_document(study), allow_nan=False)
        except CodesignError as error:
            assert str(error)


def test_the_baseline_is_the_last_attempt_at_trial_0(tmp_path: Path) -> None:
    study = Study.load(write_study(tmp_path, records(5)))

    assert study.baseline is study.records[0]
    assert Study.load(write_study(tmp_path / "without", records(5)[1:])).baseline is None


def test_objectives_come_first_among_the_metrics(tmp_path: Path) -> None:
    names = Study.load(write_study(tmp_path, records(3))).metric_names

    assert names[:3] == ("throughput_tokens_per_s", "kl_divergence", "peak_memory_bytes")
    assert len(names) == len(set(names)) == 11


def test_a_machine_is_named_by_its_gpus_and_processor() -> None:
    machine = {"cpu": "EPYC", "cores": 8, "memory_bytes": 32 * 2**30}

    text = machine_text({"machine": machine, "gpus": [{"name": "H200"}, {"name": "H200"}]})

    assert text == "2 × H200, EPYC, 8 cores, 32 GiB"
    assert machine_text({}) == ""

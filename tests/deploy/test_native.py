"""Export to this project's own engine."""

import dataclasses
import json
from pathlib import Path

from codesign.deploy.native import Native
from codesign.registry import TARGETS
from codesign.results.record import TrialRecord
from codesign.spec.engine_config import EngineConfig, load_config
from tests.search.fake_measure import record_of
from tests.search.test_objective import identity


def test_what_is_exported_reads_back_equal_and_carries_its_evidence(tmp_path: Path) -> None:
    config = EngineConfig(max_batch_size=3).resolve()
    record = record_of(identity(7), config)
    (tmp_path / "profile.yaml").write_text("a: 1\n")
    (tmp_path / "space.yaml").write_text("b: 2\n")
    files = Native().export(record, tmp_path, tmp_path / "deep" / "out")

    assert all(file.exists() for file in files)
    assert load_config(tmp_path / "deep" / "out" / "config.yaml").resolve() == config
    assert TrialRecord.from_json((tmp_path / "deep" / "out" / "evidence.json").read_text()) == record
    readme = (tmp_path / "deep" / "out" / "README.md").read_text()
    assert "codesign measure profile.yaml --config config.yaml" in readme
    assert "Trial 7" in readme


def test_a_measured_table_of_drafts_goes_along(tmp_path: Path) -> None:
    found = {"table": {"1": 4, "8": 0}, "acceptance": 0.7}
    record = dataclasses.replace(record_of(identity(7), EngineConfig().resolve()), resolved={"speculation": found})
    for name in ("profile.yaml", "space.yaml"):
        (tmp_path / name).write_text("a: 1\n")
    files = Native().export(record, tmp_path, tmp_path / "out")

    assert tmp_path / "out" / "speculation.json" in files
    assert json.loads((tmp_path / "out" / "speculation.json").read_text()) == found


def test_native_is_a_registered_target() -> None:
    assert "native" in TARGETS.names()
    assert isinstance(TARGETS.create("native"), Native)

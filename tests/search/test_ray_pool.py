"""Trials as Ray tasks, on a real Ray: a killed worker, a node that leaves, and nothing that listens to the network."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from codesign.errors import InputError
from codesign.results.ledger import read_records
from codesign.results.record import TrialRecord
from codesign.search.limits import Limits
from codesign.search.ray_pool import check_address
from tests.search.ray_script import GRID
from tests.search.searches import ROOT, found
from tests.search.studies import run_study, space_of

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def ray_study(kind: str, out: Path, **environment: str) -> tuple[dict[str, Any], list[TrialRecord]]:
    """What `ray_script` found, and the records of its study."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.search.ray_script", kind, str(out)],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    records, damaged = read_records(out / "study" / "trials")
    assert not damaged
    return json.loads(done.stdout.splitlines()[-1]), records


def check(records: list[TrialRecord], tmp_path: Path) -> list[TrialRecord]:
    """That a study of the same grid without Ray finds the same. Returns the attempts that were lost."""
    (tmp_path / "alone").mkdir()
    alone = run_study(tmp_path / "alone", space_of(tmp_path / "alone", GRID), limits=Limits(trials=50))
    good = [record for record in records if record.outcome.kind == "ok"]
    assert found(records) == found(list(alone.records))
    assert sorted(record.config_digest for record in good) == sorted(record.config_digest for record in alone.records)
    assert not list((tmp_path / "ray" / "study" / "leases").glob("*.json"))
    return [record for record in records if record.outcome.kind != "ok"]


@needs_ray
def test_a_study_on_a_local_ray_survives_a_killed_task_and_listens_on_loopback_only(tmp_path: Path) -> None:
    document, records = ray_study("local", tmp_path / "ray")
    (lost,) = check(records, tmp_path)

    assert lost.outcome.kind == "harness"
    assert lost.outcome.detail.startswith("its Ray task (Ray node")
    assert document["open_ports"] == []
    assert document["handlers"] == [True, True]  # Ctrl-C is still the study's to handle


@needs_ray
def test_a_study_on_two_nodes_goes_on_when_one_of_them_leaves(tmp_path: Path) -> None:
    document, records = ray_study("cluster", tmp_path / "ray", **TOKEN)
    lost = check(records, tmp_path)

    assert document["room"] == [4, 2]
    assert len(lost) <= 2
    assert all(record.outcome.kind == "harness" for record in lost)
    assert document["open_ports"] == []


def test_a_cluster_without_token_authentication_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(InputError, match="token authentication"):
        check_address("10.0.0.1:6379")
    with pytest.raises(InputError, match="token authentication"):
        check_address("127.0.0.1:6379")

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check_address("10.0.0.1:6379")
    check_address("local")


@pytest.mark.parametrize("address", ["auto", "ray://h:1", "h", "h:", ":1", "h:x"])
def test_what_is_no_address_of_a_cluster_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="HOST:PORT"):
        check_address(address)

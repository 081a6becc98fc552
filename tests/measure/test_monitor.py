"""Device monitor: reads what the machine did and never invents what it cannot read."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from codesign.measure import monitor
from codesign.measure.monitor import CpuProbe, Monitor, RaplCounter, energy_source, visible

BURN = "import time\nend = time.time() + 30\nwhile time.time() < end: pass"


def burning() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", BURN])


def idling() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])


def test_the_childs_own_work_is_not_foreign() -> None:
    with burning() as child:
        with Monitor(CpuProbe(child.pid)) as watch:
            time.sleep(0.6)
        child.kill()

    assert watch.reading["source"] == "psutil"
    assert watch.reading["own_cpu"] > 0.2 / (os.cpu_count() or 1)


def test_work_of_other_processes_is_seen_as_foreign() -> None:
    with idling() as child, burning() as other:
        with Monitor(CpuProbe(child.pid)) as watch:
            time.sleep(0.6)
        child.kill()
        other.kill()

    assert watch.reading["foreign_cpu"] > 0.2 / (os.cpu_count() or 1)


def test_work_on_cores_of_others_counts_where_all_of_the_machine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Core 1 of two works; played, because a test's own cores may be shared."""
    seconds = iter([0.0, 0.0, 10.0, 10.0])

    def times(percpu: bool) -> list[Times]:
        assert percpu
        return [Times(0.0), Times(next(seconds))]

    monkeypatch.setattr(monitor.psutil, "cpu_times", times)
    monkeypatch.setattr(monitor.os, "cpu_count", lambda: 2)
    everywhere, here = CpuProbe(os.getpid()), CpuProbe(os.getpid(), cores=[0])
    everywhere.begin()
    here.begin()

    assert everywhere.end(10.0)["foreign_cpu"] == pytest.approx(0.5, abs=0.05)
    assert here.end(10.0)["foreign_cpu"] == 0.0


class Times(NamedTuple):
    """Of one core."""

    user: float
    idle: float = 0.0


def test_ranks_that_the_child_started_are_not_foreign() -> None:
    with idling() as child, burning() as rank:
        with Monitor(CpuProbe(os.getpid())) as watch:
            time.sleep(0.6)
        child.kill()
        rank.kill()

    assert watch.reading["own_cpu"] > 0.2 / (os.cpu_count() or 1)


def test_a_child_that_died_does_not_break_the_reading() -> None:
    child = burning()
    with Monitor(CpuProbe(child.pid)) as watch:
        child.kill()
        child.wait()

    assert watch.reading["own_cpu"] >= 0


def rapl(folder: Path, *, energy_uj: int, limit_uj: int = 1_000_000) -> Path:
    zone = folder / "intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "energy_uj").write_text(str(energy_uj))
    (zone / "max_energy_range_uj").write_text(str(limit_uj))
    return zone / "energy_uj"


def test_rapl_is_followed_across_its_wrap_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter_file = rapl(tmp_path, energy_uj=900_000)
    monkeypatch.setattr(monitor, "_RAPL", tmp_path)
    counter = RaplCounter.open()
    assert counter is not None
    counter_file.write_text("100000")

    assert counter.read_j() == pytest.approx(0.2)


def test_rapl_counts_a_package_once_and_not_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = rapl(tmp_path, energy_uj=0)
    part = tmp_path / "intel-rapl:0:0"
    part.mkdir()
    (part / "energy_uj").write_text("0")
    (part / "max_energy_range_uj").write_text("1000000")
    monkeypatch.setattr(monitor, "_RAPL", tmp_path)
    counter = RaplCounter.open()
    assert counter is not None
    package.write_text("500000")
    (part / "energy_uj").write_text("400000")

    assert counter.read_j() == pytest.approx(0.5)


def test_without_a_counter_energy_is_absent_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "_RAPL", tmp_path)
    source = energy_source("cpu")
    with Monitor(CpuProbe(os.getpid())) as watch:
        pass

    assert source.scope == ""
    assert "RAPL" in source.reason
    assert "energy_j" not in watch.reading


def test_a_window_too_short_for_the_counter_gives_no_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rapl(tmp_path, energy_uj=0)
    monkeypatch.setattr(monitor, "_RAPL", tmp_path)
    with Monitor(CpuProbe(os.getpid())) as watch:
        pass

    assert "energy_j" not in watch.reading


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        (None, ["GPU-aa", "GPU-ab", "GPU-b"]),
        ("1", ["GPU-ab"]),
        ("2, 0", ["GPU-b", "GPU-aa"]),
        ("GPU-b", ["GPU-b"]),
        ("GPU-ab,GPU-aa", ["GPU-ab", "GPU-aa"]),
        ("0,7,1", ["GPU-aa"]),
        ("GPU-a", []),
        ("", []),
        ("-1", []),
    ],
)
def test_only_gpus_that_cuda_shows_are_there(wanted: str | None, left: list[str]) -> None:
    found = [{"uuid": uuid} for uuid in ("GPU-aa", "GPU-ab", "GPU-b")]

    assert [gpu["uuid"] for gpu in visible(found, wanted)] == left

"""Windows overlap only where nobody reads less beside the others, and where that could be told."""

import os
from pathlib import Path

import pytest

from codesign.measure.turn import Turn
from codesign.search.measurer import order_of
from codesign.search.overlap import Overlap, last_level_bytes, measure
from codesign.search.seat import Seat
from codesign.spec.engine_config import EngineConfig
from codesign.spec.profile import load_profile

GB = 1e9


def overlap(memory: float = 1.0, cache: float = 1.0, core_share: float = 1.0) -> Overlap:
    """Of two workers, the second of which loses."""
    alone = {"memory": [10 * GB, 8 * GB], "cache": [40 * GB, 40 * GB]}
    beside = {"memory": [10 * GB, 8 * GB * memory], "cache": [40 * GB, 40 * GB * cache]}
    return Overlap.of(alone, beside, core_share=core_share)


def test_windows_overlap_where_all_read_as_fast_beside_as_alone() -> None:
    found = overlap(memory=0.97, cache=0.96)

    assert found.is_allowed
    assert found.to_dict()["windows"] == "overlap"
    assert found.described.startswith("timing windows may overlap: beside the others a worker reads 0.97 of its memory")


@pytest.mark.parametrize("shared", ["memory", "cache"])
def test_a_shared_memory_or_cache_makes_windows_take_turns(shared: str) -> None:
    found = overlap(**{shared: 0.7})

    assert not found.is_allowed
    assert found.to_dict()["windows"] == "take turns"
    assert f"0.70 of its {shared} bandwidth alone ({8 if shared == 'memory' else 40} GB/s)" in found.described


def test_the_worker_that_loses_most_decides() -> None:
    found = overlap(memory=0.5)

    assert (found.alone_gb_per_s["memory"], found.beside_gb_per_s["memory"]) == (8.0, 4.0)


def test_a_busy_machine_cannot_tell_so_windows_take_turns() -> None:
    found = overlap(core_share=0.5)

    assert not found.is_allowed
    assert "this machine is busy, a reader had 0.50 of its core" in found.described


def test_what_is_measured_are_bandwidths_of_these_cores() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    found = measure([Seat((cores[0],)), Seat((cores[1],))])

    assert found.beside_over_alone.keys() == found.alone_gb_per_s.keys() == {"memory", "cache"}
    for what, ratio in found.beside_over_alone.items():
        assert ratio > 0.05
        assert 0.05 < found.alone_gb_per_s[what] < 1000
    assert 0 < found.core_share < 1.2
    assert last_level_bytes() >= 2**18


def test_the_decision_reaches_the_workers_turn_with_its_figures() -> None:
    profile = load_profile(Path(__file__).parents[2] / "profiles" / "cpu.yaml")
    found = overlap()
    windows = order_of(profile, EngineConfig(), turn="t", overlap=found).arguments["windows"]

    turn = Turn(None, **windows)

    assert turn.may_overlap
    assert turn.overlap == found.to_dict()
    assert order_of(profile, EngineConfig(), turn="t").arguments["windows"] == {}

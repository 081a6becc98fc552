"""Where a number comes from."""

import os

from codesign.measure.provenance import core_ranges, placement


def test_cores_are_named_as_ranges() -> None:
    assert core_ranges([8, 0, 1, 2, 3, 10]) == "0-3,8,10"
    assert core_ranges([5]) == "5"


def test_a_trial_says_which_process_measured_it_on_what() -> None:
    here = placement("cpu")

    assert here["worker"] == os.getpid()
    assert here["cores"] == len(os.sched_getaffinity(0))
    assert here["device"].startswith("cpu, cores ")
    assert placement("cpu", 1)["cores"] == 1

"""Our side, computed again, against what kvpress gave (`tests/oracles/kv_selection.py` says what differs and why)."""

import pytest

from tests.oracles import kv_selection
from tests.oracles.exchange import GOLDEN, read
from tests.oracles.kv_selection import CASES, Case

THEIRS, NOTE = read(GOLDEN / "kv_selection.safetensors")
PYRAMIDS = [case for case in CASES if case.policy == "pyramidkv"]


@pytest.mark.parametrize("num_tokens", [600, 1024])
def test_rows_before_the_window_score_what_kvpress_gives_them(num_tokens: int) -> None:
    ours = kv_selection.our_scores(THEIRS[f"ids.{num_tokens}"])

    assert kv_selection.relative_difference(ours, THEIRS[f"scores.{num_tokens}"]) <= kv_selection.TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_engine_keeps_the_rows_that_kvpress_keeps(case: Case) -> None:
    ours = kv_selection.our_kept(case, THEIRS[f"ids.{case.num_tokens}"])
    theirs = kv_selection.unpacked(THEIRS[case.name])

    assert not kv_selection.differences(case, ours, theirs, THEIRS[f"scores.{case.num_tokens}"])


@pytest.mark.parametrize("case", PYRAMIDS, ids=lambda case: case.name)
def test_a_pyramid_stays_one_where_kvpress_falls_back_to_equal_budgets(case: Case) -> None:
    budgets = kv_selection.budgets_of(case, kv_selection.unpacked(THEIRS[case.name]))

    assert budgets == NOTE["provenance"]["budgets"][case.name]
    assert (len(set(budgets["kvpress"])) == 1) == case.falls_back
    assert budgets["ours_same_beta"][0] > budgets["ours_same_beta"][-1]
    assert sum(budgets["ours_same_beta"]) == kv_selection.NUM_LAYERS * case.kept

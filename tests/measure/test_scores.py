"""A child's word on its own quality: what cannot be is a protocol fault, not a crash of the search."""

from typing import Any

import pytest

from codesign.measure.scores import checked_scores, vocab_size
from codesign.measure.session import BuildFacts, TrialFailed

ITEMS = [{"task": "multi_key", "length_tokens": 512, "asked": asked} for asked in ("in_prompt", "after_output")]
SUITE = {
    "text": {"sequences": [[1] * 10, [2] * 10], "num_prefill": 4},
    "retrieval": [{}, {}, {}],
    "ruler": [{**item, "prompt": [1, 2], "answer": [3], "num_prefill": 2} for item in ITEMS],
}
GOOD: dict[str, Any] = {
    "num_tokens": [6, 6],
    "nll": [1.0, 2],
    "kl": [0.0, 0.5],
    "top1": [1.0, 0.5],
    "retrieved": [True, False, True],
    "is_exact": [True, False],
    "log_prob": [-0.5, -3],
}
CHECKED = {
    **{name: GOOD[name] for name in ("num_tokens", "nll", "kl", "top1", "retrieved")},
    "ruler": [{**ITEMS[0], "is_exact": True, "log_prob": -0.5}, {**ITEMS[1], "is_exact": False, "log_prob": -3.0}],
}
WRONG: dict[str, Any] = {
    "num_tokens": [None, [6], [6, 7], "66", {}],
    "nll": [
        None,
        [1.0],
        [1.0, float("nan")],
        [1.0, float("inf")],
        [1.0, -1.0],
        [True, 1.0],
        ["1", 1.0],
        [10**400, 1.0],
    ],
    "kl": [[-0.1, 0.0], [1.0, None]],
    "top1": [[1.1, 0.0], [1.0, 1.0, 1.0]],
    "retrieved": [None, [True, True], [True, True, 1], ["", "", ""]],
    "is_exact": [None, [True], [True, 0]],
    "log_prob": [None, [-1.0], [-1.0, 0.1], [-1.0, float("nan")], [-1.0, float("-inf")], [-1.0, False], [-1.0, "0"]],
}


def test_good_scores_come_through() -> None:
    assert checked_scores(GOOD, SUITE) == CHECKED


def test_what_nobody_asked_for_is_left_out() -> None:
    assert checked_scores({**GOOD, "surprise": 1}, SUITE) == CHECKED


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_impossible_scores_are_a_protocol_fault(name: str, value: object) -> None:
    with pytest.raises(TrialFailed, match=name) as caught:
        checked_scores({**GOOD, name: value}, SUITE)

    assert caught.value.outcome.kind == "protocol"


@pytest.mark.parametrize("value", [None, 0, -1, True, "8", 2**30, 1.5])
def test_an_impossible_vocabulary_is_a_protocol_fault(value: object) -> None:
    with pytest.raises(TrialFailed, match="vocab_size"):
        vocab_size(BuildFacts(resolved={"vocab_size": value}, bytes={"weights": 1, "kv": 1}, kernels={}, phases={}))


def test_facts_without_bytes_are_a_protocol_fault() -> None:
    with pytest.raises(TrialFailed, match=r"bytes\.kv"):
        vocab_size(BuildFacts(resolved={"vocab_size": 8}, bytes={"weights": 1}, kernels={}, phases={}))

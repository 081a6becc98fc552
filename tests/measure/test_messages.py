from typing import Any

import pytest

from codesign.measure.channel import ProtocolFault
from codesign.measure.kv_use import KVUse
from codesign.measure.messages import build_facts, counts, kv_use, scores, sizes, step_tokens

FACTS: dict[str, Any] = {
    "resolved": {"a": [1]},
    "bytes": {"kv": 0},
    "kernels": {"linear": "x"},
    "phases": {"load_s": 1},
}


def test_tokens_come_out_as_they_are() -> None:
    tokens = [["a", 0, ""], ["b", 2**31 - 1, "stop"], ["c", 5, "length"], ["d", 5, "aborted"]]

    assert step_tokens({"tokens": tokens}) == [tuple(entry) for entry in tokens]


@pytest.mark.parametrize(
    "tokens",
    [
        None,
        {},
        "abc",
        [[]],
        ["abc"],
        [["a", 1]],
        [["a", 1, "", 2]],
        [[1, 1, ""]],
        [["a", 1.0, ""]],
        [["a", True, ""]],
        [["a", -1, ""]],
        [["a", 2**31, ""]],
        [["a", 1, None]],
        [["a", 1, "done"]],
        [["a", 1, ""], ["a", "1", ""]],
    ],
    ids=repr,
)
def test_what_is_not_a_list_of_tokens_is_a_fault(tokens: object) -> None:
    with pytest.raises(ProtocolFault):
        step_tokens({"tokens": tokens})


def test_facts_come_out_as_they_are() -> None:
    facts = build_facts({"facts": FACTS})

    assert (facts.resolved, facts.bytes, facts.kernels, facts.phases) == tuple(FACTS.values())


@pytest.mark.parametrize(
    "change",
    [
        {"resolved": None},
        {"resolved": {str(number): 0 for number in range(1001)}},
        {"bytes": []},
        {"bytes": {"kv": -1}},
        {"bytes": {"kv": 1.5}},
        {"bytes": {"kv": True}},
        {"bytes": {"kv": 2**50 + 1}},
        {"kernels": {"linear": 1}},
        {"kernels": {"linear": None}},
        {"phases": {"load_s": -0.1}},
        {"phases": {"load_s": "1"}},
        {"phases": {"load_s": 1e7}},
        {"phases": {"load_s": True}},
        {"phases": {"load_s": 10**400}},
        {"extra": {}},
    ],
    ids=lambda change: repr(change)[:40],
)
def test_facts_of_a_wrong_shape_are_a_fault(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolFault):
        build_facts({"facts": {**FACTS, **change}})


@pytest.mark.parametrize("missing", list(FACTS))
def test_facts_with_a_part_missing_are_a_fault(missing: str) -> None:
    with pytest.raises(ProtocolFault):
        build_facts({"facts": {key: value for key, value in FACTS.items() if key != missing}})


@pytest.mark.parametrize(
    "stats",
    [
        None,
        [1],
        {"a": -1},
        {"a": 1.0},
        {"a": True},
        {"a": "1"},
        {"a": 2**50 + 1},
        dict.fromkeys(map(str, range(1001)), 0),
    ],
)
def test_counters_of_a_wrong_shape_are_a_fault(stats: object) -> None:
    assert counts({"stats": {"preemptions": 0}}) == {"preemptions": 0}
    with pytest.raises(ProtocolFault):
        counts({"stats": stats})


@pytest.mark.parametrize(
    "readings",
    [
        None,
        [[1, 32, 33, 0]],
        [[1, 32, -1, 0]],
        [[33, 32, 1, 0]],
        [[1, 32, 1, -1]],
        [[1, 32, 1]],
        [[1, 32, 1.0, 0]],
        [[1, 32, True, 0]],
        [[0, 0, 0, 2**51]],
        [[0, 0, 0, 0]] * 1001,
    ],
)
def test_readings_of_a_cache_that_cannot_be_are_a_fault(readings: object) -> None:
    assert kv_use({"readings": [[1, 32, 5, 0]]}) == [KVUse(1, 32, 5, 0)]
    with pytest.raises(ProtocolFault):
        kv_use({"readings": readings})


def test_sizes_and_scores_are_checked_too() -> None:
    assert sizes({"event": "memory", "device_bytes": 5}) == {"device_bytes": 5}
    assert scores({"scores": {"kl": [0.1]}}) == {"kl": [0.1]}
    with pytest.raises(ProtocolFault):
        sizes({"event": "memory", "device_bytes": -5})
    with pytest.raises(ProtocolFault):
        scores({"scores": [0.1]})

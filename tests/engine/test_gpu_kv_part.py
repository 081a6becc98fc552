"""The part of the GPU campaign that times attention under each KV policy, at a size for a CPU."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from codesign.engine.models.tiny import tiny_config
from codesign.registry import KV_POLICIES


@pytest.fixture(scope="module")
def part() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module("gpu_kv")


def counting(calls: list[int]) -> Callable[[Callable[[], None]], float]:
    def clock(launch: Callable[[], None]) -> float:
        launch()
        calls.append(1)
        return float(len(calls))

    return clock


def run(part: Any, clock: Any, seconds: float = 1e6) -> list[dict[str, Any]]:
    found = part.kv(
        seconds,
        architecture=tiny_config("LlamaForCausalLM"),
        device="cpu",
        contexts={1024: 4},
        attention="sdpa",
        clock=clock,
    )
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def test_every_policy_is_stepped_and_stands_beside_the_full_cache(part: Any) -> None:
    calls: list[int] = []
    rows = run(part, counting(calls))

    assert {row["case"].split()[0] for row in rows} == set(KV_POLICIES.names())
    assert not [row for row in rows if "absent" in row]
    assert len(calls) == len(rows) * 12
    full = rows[0]
    assert full["case"] == "full" and full["attention_ms"] == 8.0  # the median of steps 4 to 12
    for row in rows:
        assert row["x_full"]["kv_bytes"] == row["kv_bytes"] / full["kv_bytes"]
        assert row["time_over_bytes"] == pytest.approx(row["attention_ms"] / 8.0 / row["x_full"]["kv_bytes"])
    assert rows[1]["x_full"]["kv_bytes"] < 0.6  # int8


def test_a_case_that_cannot_be_timed_says_why(part: Any) -> None:
    def clock(launch: Callable[[], None]) -> float:
        raise RuntimeError("the device waited")

    assert {row["absent"] for row in run(part, clock)} == {"RuntimeError: the device waited"}
    assert {row["absent"] for row in run(part, clock, seconds=-1)} == {"no time left"}

"""The part of the GPU campaign that times attention, at a size for the interpreter and by a false clock."""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

BAR = {"rows": 40, "batch": 2, "least_share_of_copy": 0.7}


@pytest.fixture(scope="module")
def part() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[4] / "benchmarks")
        found = importlib.import_module("gpu_attention")
        patch.setattr(found, "NUM_KV_HEADS", 1)
        yield found


def clock(milliseconds: float) -> Callable[[Callable[[Tensor], Tensor], Tensor], list[float]]:
    """A clock by which copies take 1 ms and everything that attends `milliseconds`."""

    def timer(way: Callable[[Tensor], Tensor], query: Tensor) -> list[float]:
        return [milliseconds if way(query).dtype == torch.bfloat16 else 1.0] * 20

    return timer


def run(part: Any, timer: Any, seconds: float = 1e6) -> dict[str, Any]:
    found: dict[str, Any] = part.attention(
        seconds, device="cpu", contexts=(17, 40), batches=(1, 2), bar=BAR, timer=timer
    )
    return found


def test_every_way_is_checked_and_timed_at_every_size_and_the_bar_comes_first(
    part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, "candidates", lambda first: [first, dataclasses.replace(first, num_warps=8)])
    found = run(part, clock(1.25))

    ours = [f"triton {codec}{layout}" for codec in ("native", "int8", "fp8") for layout in ("", " paged")]
    ways = ["decode + sdpa fp8", "decode + sdpa int8", "sdpa native", *ours]
    where = [(row["rows"], row["batch"], row["way"]) for row in found["timed"]]
    assert sorted(where) == sorted((rows, batch, way) for rows in (17, 40) for batch in (1, 2) for way in ways)
    assert where[0] == (40, 2, "triton native")
    assert all(row["relative_error"] < 6e-3 and row["share_of_copy"] == pytest.approx(0.8) for row in found["timed"])
    shares = dict.fromkeys(("triton native", "triton native paged"), pytest.approx(0.8))
    assert found["bar"] == {**BAR, "share_of_copy": shares, "passed": True} and found["exit_status"] == 0
    assert sorted(row["way"] for row in found["tried"]) == sorted(2 * ours)


def test_a_missed_bar_fails_the_part(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "candidates", lambda first: [])
    found = run(part, clock(2.0))

    assert set(found["bar"]["share_of_copy"].values()) == {0.5}
    assert (found["bar"]["passed"], found["exit_status"]) == (False, 1)


def test_the_bar_holds_for_both_layouts(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "candidates", lambda first: [])
    measure = part.measure

    def slow_blocks(*args: Any) -> dict[str, Any]:
        times.append(1)
        figures: dict[str, Any] = measure(*args)
        return {**figures, "share_of_copy": 0.6} if len(times) == 2 else figures

    times: list[int] = []
    monkeypatch.setattr(part, "measure", slow_blocks)
    found = run(part, clock(1.0))

    assert found["bar"]["share_of_copy"] == {"triton native": 1.0, "triton native paged": 0.6}
    assert (found["bar"]["passed"], found["exit_status"]) == (False, 1)


def test_a_wrong_kernel_is_never_timed_and_fails_the_part(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = part.attend
    monkeypatch.setattr(part, "attend", lambda *args, **rest: (1.1 * right(*args, **rest)[0], None))
    monkeypatch.setattr(part, "candidates", lambda first: [])
    found = run(part, clock(1.0))

    wrong = [row for row in found["timed"] if "wrong" in row]
    assert {row["way"] for row in wrong} == {
        f"triton {codec}{layout}" for codec in ("native", "int8", "fp8") for layout in ("", " paged")
    }
    assert len(wrong) == 24
    assert not any("median_ms" in row for row in wrong) and found["exit_status"] == 1


def test_without_time_what_is_left_out_says_so(part: Any) -> None:
    found = run(part, clock(1.0), seconds=-1)

    assert found["exit_status"] == 1 and all(row["absent"] == "no time left" for row in found["timed"])


@pytest.mark.parametrize("num_rows", [64, 1000, 4096, 16384])
def test_every_candidate_covers_all_rows(part: Any, num_rows: int) -> None:
    from codesign.engine.kernels.triton.splits import decode_config

    first = decode_config(
        num_planes=256, num_queries=4, num_rows=num_rows, head_dim=128, dtype=torch.bfloat16, num_processors=132
    )
    found = part.candidates(first)

    assert found[0] == first and len(found) > 5
    for config in found:
        assert config.rows_per_split * config.num_splits >= num_rows and config.num_splits <= 64
        assert config.rows_per_split % config.block_r == 0

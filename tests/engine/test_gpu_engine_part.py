"""The part of the GPU campaign that times whole engines, at a size for a CPU."""

from typing import Any

import pytest

from codesign.engine.models.tiny import tiny_config
from tests.benchmarks import gpu_engine


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    pytest.importorskip("transformers", reason="the peer is not installed")
    return gpu_engine.engine(
        300.0,
        architecture=tiny_config("LlamaForCausalLM"),
        device="cpu",
        batches=(1, 2),
        prompt_tokens=8,
        output_tokens=4,
        cases={"codesign": {}, "codesign int8": {"weights": "int8"}, "of CUDA": {"attention": "triton"}},
    )


def test_every_contender_is_timed_at_every_batch_size_or_says_why_not(result: dict[str, Any]) -> None:
    timed = [(row["contender"], row["batch_size"]) for row in result["rows"] if "decode_ms" in row]
    [absent] = [row for row in result["rows"] if "absent" in row]

    names = ["transformers bf16, sdpa", "codesign", "codesign int8", "transformers bf16, sdpa, again"]
    assert timed == [(name, batch) for name in names for batch in (1, 2)]
    assert absent["contender"] == "of CUDA" and "its kernels are for CUDA" in absent["absent"]
    for row in result["rows"]:
        if "decode_ms" in row:
            assert row["num_gaps"] == 2 * 3 and row["prefill_ms"] > 0 and row["weight_gb_per_s"] > 0


def test_ratios_are_of_the_peers_time_over_ones_own(result: dict[str, Any]) -> None:
    rows = {(row["contender"], row["batch_size"]): row for row in result["rows"] if "decode_ms" in row}

    for figure in ("decode", "prefill"):
        own, peer = (rows[name, 2][f"{figure}_ms"] for name in ("codesign", gpu_engine.PEER))
        assert result[f"{figure}_beside_peer"]["codesign"][2] == pytest.approx(peer / own)
    assert result["decode_beside_peer"][gpu_engine.PEER] == {1: 1.0, 2: 1.0}


def test_without_time_what_is_left_out_says_so() -> None:
    found = gpu_engine.engine(-1.0, architecture=tiny_config("LlamaForCausalLM"), device="cpu", cases={"codesign": {}})

    assert [row["absent"] for row in found["rows"]] == ["no time left"] * 3

"""Several ranks against one: what they compute, hold, send, and when they do what."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codesign.engine.kernels import dense_matmul
from codesign.engine.kernels.compiled import Missing
from codesign.engine.models.shape import ARCHITECTURES
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.quantize.cpu import capability
from codesign.registry import KV_CODECS, KV_POLICIES, WEIGHT_FORMATS
from tests.engine.parallel.comparing import PLANS, run
from tests.engine.parallel.grid import CACHES, SHAPES

SEVERAL = [name for name in PLANS if name != "single"]
HIDDEN, VOCABULARY, TENSOR = 64, 131, "all_reduce"


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cache = tmp_path_factory.mktemp("cache")
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.parallel.grid"],
        cwd=Path(__file__).parents[3],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "XDG_CACHE_HOME": str(cache),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        check=True,
        timeout=280,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("plan", SEVERAL)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_tokens_are_those_of_one_rank(grid: dict[str, Any], architecture: str, plan: str) -> None:
    case = grid["architectures"][architecture][plan]

    assert case["difference"] < 1e-4
    assert all(gap < 1e-4 for gap in case["parted_at_gaps"])


def test_every_architecture_has_a_shape_of_its_own() -> None:
    assert set(SHAPES) == set(ARCHITECTURES)


@pytest.mark.parametrize("plan", ["tp2", "tp2xpp2"])
@pytest.mark.parametrize("policy", KV_POLICIES.names())
def test_each_policy_decides_as_on_one_rank_or_is_refused(grid: dict[str, Any], policy: str, plan: str) -> None:
    case = grid["policies"][policy][plan]

    if policy == "ada_kv":
        assert "kv.policy ada_kv with parallel.tensor_parallel_size" in case["refused"]
        return
    assert case["difference"] < 1e-4
    assert case["budgets"] == case["reference_budgets"]


@pytest.mark.parametrize("codec", KV_CODECS.names())
def test_each_codec_encodes_as_on_one_rank(grid: dict[str, Any], codec: str) -> None:
    assert grid["codecs"][codec]["tp2xpp2"]["difference"] < 1e-4


@pytest.mark.parametrize("cache", CACHES)
def test_each_cache_holds_and_bounds_what_it_does_on_one_rank(grid: dict[str, Any], cache: str) -> None:
    case = grid["caches"][cache]["tp2xpp2"]

    assert case["difference"] < 1e-4
    assert all(gap < 1e-4 for gap in case["parted_at_gaps"])
    assert case["num_slots"][0] == case["num_slots"][1] == (2 if cache == "bounded" else 4)


# Their codes or activations are rounded with what a rank has of a row.
ROUNDED_PER_RANK = ("fp8", "nf4", "w8a8")


@pytest.mark.parametrize("weights", WEIGHT_FORMATS.names())
def test_each_weight_format_multiplies_as_on_one_rank_or_is_refused(grid: dict[str, Any], weights: str) -> None:
    case = grid["formats"][weights]["tp2xpp2"]

    if weights == "mixed":
        assert "weights mixed with parallel sizes above 1" in case["refused"]
    elif weights in ROUNDED_PER_RANK:
        assert case["kl"] < 1e-3
    else:
        assert case["difference"] < 1e-4


@pytest.mark.parametrize("weights", ["native", "int8", "int4"])
def test_stages_that_pass_whole_steps_on_change_no_bit(grid: dict[str, Any], weights: str) -> None:
    """In bf16. Smaller micro-batches may: some kernels add up in another order for another number of rows."""
    assert grid["one_micro_batch"][weights]["difference"] == 0.0


@pytest.mark.parametrize("plan", SEVERAL)
def test_bf16_products_of_our_kernel_are_one_ranks_to_the_last_bit(grid: dict[str, Any], plan: str) -> None:
    """Whatever the number of rows, and with halves of the inputs on two ranks."""
    if isinstance(found := dense_matmul.load(), Missing):
        pytest.skip(found.reason)

    assert grid["bf16"][plan]["difference"] == 0.0


@pytest.mark.parametrize("plan", SEVERAL)
def test_bytes_are_those_of_all_ranks_and_no_more_than_one_rank_has(grid: dict[str, Any], plan: str) -> None:
    case = grid["architectures"]["Qwen3ForCausalLM"][plan]  # its KV heads divide, and its table is not tied

    assert len(case["bytes_per_rank"]) == len(case["ranks"])
    for name, total in case["bytes"].items():
        assert total == sum(rank[name] for rank in case["bytes_per_rank"])
    assert case["bytes"]["kv"] == case["reference_bytes"]["kv"]
    least, norms = case["reference_bytes"]["weights"], 8 * 64 * 4
    assert least <= case["bytes"]["weights"] <= least + norms


def test_copied_kv_heads_are_counted(grid: dict[str, Any]) -> None:
    case = grid["architectures"]["MistralForCausalLM"]["tp2"]  # one KV head

    assert case["bytes"]["kv"] == 2 * case["reference_bytes"]["kv"]
    assert [rank["kv_heads"] for rank in case["ranks"]] == [[0], [0]]


def steps(grid: dict[str, Any], layout: str) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    for step in grid["logs"][layout]["steps"]:
        yield step["plan"], step["logs"]


LAYOUTS = ["2x1x1", "1x2x1", "1x2x2", "1x2x4", "2x2x2"]


def check_what_is_sent(
    plan: dict[str, Any], logs: list[dict[str, Any]], *, tensor: int, stages: int, count: int, value_bytes: int
) -> None:
    """Per layer two sums of [N, hidden] in fp32, whatever the activations are; in their dtype one for the embedding, a
    part of the logits of every row, and the hidden states from stage to stage. Every micro-batch sends its own share.
    """
    num_parts, num_values = min(count, len(plan["slots"])), plan["num_tokens"] * HIDDEN
    for rank in logs:
        is_first, is_last = rank["stage"] == 0, rank["stage"] == stages - 1
        expected: dict[str, list[int]] = {}
        if tensor > 1:
            num_sums = 2 * (2 // stages)
            num_bytes = num_sums * num_values * 4 + is_first * num_values * value_bytes
            expected[TENSOR] = [(num_sums + is_first) * num_parts, num_bytes]
        if tensor > 1 and is_last and rank["tensor_rank"]:
            expected["gather"] = [num_parts, plan["num_rows"] * -(-VOCABULARY // tensor) * value_bytes]
        if not is_last:
            expected["send"] = [num_parts, num_values * value_bytes]
        expected["broadcast"] = [2, 2 * 512 * 8]  # the plan, in one frame, and the wish to see this
        assert rank["counts"] == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_sent_is_the_formula(grid: dict[str, Any], layout: str) -> None:
    tensor, stages, count = map(int, layout.split("x"))
    for plan, logs in steps(grid, layout):
        check_what_is_sent(plan, logs, tensor=tensor, stages=stages, count=count, value_bytes=4)


def test_parts_of_a_16_bit_sum_are_sent_in_fp32(grid: dict[str, Any]) -> None:
    """So the sums of a layer are twice the bytes that its activations are."""
    if not capability().startswith("AVX"):
        pytest.skip("no kernel here tells what it has before it rounds")
    for step in grid["bf16_logs"]["steps"]:
        check_what_is_sent(step["plan"], step["logs"], tensor=2, stages=2, count=2, value_bytes=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stage_runs_each_micro_batch_once_after_the_stage_before(grid: dict[str, Any], layout: str) -> None:
    count = int(layout.split("x")[2])
    for plan, logs in steps(grid, layout):
        order = list(range(min(count, len(plan["slots"]))))
        ends: dict[tuple[int, int, int], int] = {}
        begins: dict[tuple[int, int, int], int] = {}
        for rank in logs:
            events = rank["events"]
            wanted = [("run", index) for index in order]
            if rank["stage"]:
                wanted = [(what, index) for index in order for what in ("wait", "run")]
            assert [(what, index) for what, index, _, _ in events] == wanted
            times = [time for _, _, *both in events for time in both]
            assert times == sorted(times)
            for what, index, begin, end in events:
                if what == "run":
                    begins[rank["stage"], rank["tensor_rank"], index] = begin
                    ends[rank["stage"], rank["tensor_rank"], index] = end
        for (stage, tensor_rank, index), begin in begins.items():
            if stage:
                assert begin >= ends[stage - 1, tensor_rank, index]
        assert len(begins) == len(logs) * len(order)


def test_an_engine_listens_on_loopback_only_and_leaves_nobody(grid: dict[str, Any]) -> None:
    num_processes, *addresses = grid["listeners"]

    assert num_processes == "4"
    assert set(addresses) == {"127.0.0.1"}
    assert grid["children_left"] == 0


def test_the_allocators_figures_of_all_ranks_are_added(grid: dict[str, Any]) -> None:
    found = grid["device_memory"]

    assert found["num_ranks"] == 4
    assert found["sum"] == found["expected"]


def test_a_process_with_threads_starts_new_interpreters() -> None:
    """A fork of it could hang; what they compute is the same."""
    config = {"dtype": "fp32", "max_batch_size": 2, "max_model_len": 32}
    texts, stop = [[1, 2, 3, 4, 5, 6]], threading.Event()
    cores, thread = os.sched_getaffinity(0), threading.Thread(target=stop.wait)
    thread.start()
    try:
        found = run(tiny_spec(), config, "tp2", texts, num_prefill=3)
    finally:
        stop.set()
        thread.join()

    expected = run(tiny_spec(), config, "single", texts, num_prefill=3)
    assert (found.logits - expected.logits).abs().max() < 1e-4
    assert os.sched_getaffinity(0) == cores

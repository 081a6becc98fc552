"""Rules of every space: what is left out, and that nothing else is."""

from typing import Any

import pytest

from codesign.registry import KV_CODECS, KV_POLICIES, WEIGHT_FORMATS
from codesign.spec.engine_config import EngineConfig
from codesign.spec.hardware import Hardware
from codesign.spec.model import ModelSpec
from codesign.spec.rules import lacking, senseless, undrafted, unjudged, unpaid

TWO_OF_FOUR = {"name": "wanda", "pattern": "two_of_four"}
CPU = Hardware(name="x", device="cpu")


def config(**changes: Any) -> EngineConfig:
    return EngineConfig.from_dict(changes).resolve()


@pytest.mark.parametrize("name", [name for name in WEIGHT_FORMATS.names() if "method" in WEIGHT_FORMATS.knobs(name)])
def test_pruning_before_gptq_makes_no_sense_in_any_format(name: str) -> None:
    reason = senseless(config(prune="magnitude", weights={"name": name, "method": "gptq"}))

    assert reason is not None and "gptq pushes rounding errors into pruned weights" in reason
    assert senseless(config(prune="magnitude", weights={"name": name, "method": "rtn"})) is None
    assert senseless(config(weights={"name": name, "method": "gptq"})) is None


@pytest.mark.parametrize(("chunk", "is_refused"), [(512, False), (513, True)])
def test_a_prompt_chunk_larger_than_a_step_makes_no_sense(chunk: int, is_refused: bool) -> None:
    scheduler = {"name": "continuous", "prefill_chunk_tokens": chunk}
    reason = senseless(config(scheduler=scheduler, max_step_tokens=512))

    assert (reason is not None) == is_refused
    assert reason is None or "prefill_chunk_tokens 513 with max_step_tokens 512" in reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prune": TWO_OF_FOUR, "max_batch_size": 8}, "max_batch_size below 64"),
        ({"prune": TWO_OF_FOUR, "max_batch_size": 63}, "max_batch_size below 64"),
        ({"prune": TWO_OF_FOUR, "max_batch_size": 64}, None),
        ({"prune": TWO_OF_FOUR, "max_batch_size": 64, "weights": "int4"}, "with packed weights"),
        ({"prune": TWO_OF_FOUR, "max_batch_size": 256, "weights": "w8a8"}, "with packed weights"),
        ({"prune": {"name": "wanda", "sparsity": 0.5}, "max_batch_size": 8, "weights": "int4"}, None),
        ({"max_batch_size": 8, "weights": "int4"}, None),
    ],
)
def test_two_of_four_is_left_out_where_no_kernel_is_faster_for_it(changes: dict[str, Any], reason: str | None) -> None:
    found = unpaid(config(**changes))

    assert found is None if reason is None else reason in str(found)


def test_a_cpu_has_no_sparse_kernel_at_any_batch() -> None:
    asked = config(prune=TWO_OF_FOUR, max_batch_size=256)

    assert "no kernel there skips the zeros" in str(lacking(asked, CPU))
    assert lacking(asked, Hardware(name="x", device="cuda", compute_capability="9.0")) is None


@pytest.mark.parametrize("name", KV_CODECS.names())
def test_blocks_hold_the_codecs_whose_rows_are_encoded_one_by_one(name: str) -> None:
    reason = senseless(config(kv={"layout": "paged", "codec": name}))

    if KV_CODECS.create(name).group_size:
        assert reason is not None and f"kv.codec {name}" in reason and "use kv.codec native, int8 or fp8" in reason
    else:
        assert reason is None


@pytest.mark.parametrize("name", KV_POLICIES.names())
def test_blocks_hold_what_keeps_every_row(name: str) -> None:
    reason = senseless(config(kv={"layout": "paged", "policy": name}))

    assert reason is None if name == "full" else f"kv.policy {name}" in str(reason)


def test_blocks_lie_on_the_device() -> None:
    assert "kv.place offload" in str(senseless(config(kv={"layout": "paged", "place": "offload"})))


@pytest.mark.parametrize(
    ("kv", "said"),
    [
        ({"layout": "paged"}, None),
        ({"layout": "dense"}, "prefix_cache with kv.layout dense"),
        ({"layout": "paged", "codec": "int8"}, "prefix_cache with kv.codec int8"),
        ({"layout": "paged", "codec": "fp8"}, "prefix_cache with kv.codec fp8"),
    ],
)
def test_prefixes_are_shared_in_native_blocks(kv: dict[str, Any], said: str | None) -> None:
    reason = senseless(config(kv=kv, prefix_cache=True))

    assert reason is None if said is None else said in str(reason)


def test_the_unmodified_configuration_breaks_no_rule() -> None:
    plain = config()

    assert senseless(plain) is unpaid(plain) is lacking(plain, CPU) is unjudged(plain, ["tpot_ms"]) is None


@pytest.mark.parametrize("speculate", ["ngram", "draft_model"])
@pytest.mark.parametrize("name", [name for name in KV_POLICIES.names() if name != "full"])
def test_a_policy_that_evicts_does_not_speculate(name: str, speculate: str) -> None:
    policy = {"name": name, "kv_budget": 0.5}
    reason = senseless(config(kv={"policy": policy}, speculate=speculate))

    assert reason is not None and f"speculate {speculate} with kv.policy {name}" in reason
    assert senseless(config(kv={"policy": policy})) is None
    assert senseless(config(kv={"policy": {"name": name, "kv_budget": 1.0}}, speculate=speculate)) is None
    assert senseless(config(kv={"policy": {"name": name, "kv_budget": 4096}}, speculate=speculate)) is None


def test_a_full_cache_speculates_in_any_encoding() -> None:
    for codec in ("native", "int8", "fp8", "int4", "low_rank"):
        assert senseless(config(kv={"codec": codec}, speculate="draft_model")) is None


def test_a_draft_model_needs_a_draft_from_somewhere() -> None:
    model = ModelSpec(name="mine", path="/somewhere")
    with_draft = ModelSpec(name="mine", path="/somewhere", draft=ModelSpec(name="d", path="/elsewhere"))

    assert "'mine' names no draft" in (undrafted(config(speculate="draft_model"), model) or "")
    assert undrafted(config(speculate={"name": "draft_model", "draft": "/d"}), model) is None
    assert undrafted(config(speculate="draft_model"), with_draft) is None
    assert undrafted(config(speculate="ngram"), model) is undrafted(config(), model) is None

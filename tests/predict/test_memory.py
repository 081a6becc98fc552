"""The static estimate: right for known models, and never above what is really needed."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codesign.engine.kv.policies.streaming_llm import StreamingLLM
from codesign.engine.quantize.linear import Workspace
from codesign.predict.memory import ModelSize, estimate, kept_tokens
from codesign.registry import WEIGHT_FORMATS
from codesign.spec.engine_config import Choice, EngineConfig, KVConfig
from codesign.units import GIB

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SIZE = ModelSize.of(LLAMA_8B)


def test_parameters_of_llama_3_1_8b_without_its_norms() -> None:
    # 8,030,261,248 parameters, of which 65 norms of 4096.
    assert SIZE.linear_params + SIZE.other_params == 8_030_261_248 - 65 * 4096


def test_kv_bytes_of_a_full_cache() -> None:
    config = EngineConfig(max_batch_size=4, max_model_len=8192)

    # 2 x 32 layers x 8 heads x 128 x 2 bytes = 128 KiB per token
    assert estimate(SIZE, config).kv_bytes == 128 * 1024 * 4 * 8192


def test_a_draft_counts_where_it_is_used_and_its_cache_within_the_same_bound() -> None:
    draft = ModelSize(linear_params=1000, other_params=500, num_layers=2, num_kv_heads=1, head_dim=8)
    config = EngineConfig(max_batch_size=4, max_model_len=64, speculate=Choice("draft_model"))
    plain = estimate(SIZE, EngineConfig(max_batch_size=4, max_model_len=64))
    both = estimate(SIZE, config, draft)

    assert both.weights_bytes - plain.weights_bytes == 2 * 1500
    assert both.kv_bytes - plain.kv_bytes == 2 * 2 * 1 * 8 * 64 * 4 * 2
    assert estimate(SIZE, dataclasses.replace(config, kv_memory_bytes=plain.kv_bytes), draft).kv_bytes == plain.kv_bytes
    elsewhere = dataclasses.replace(config, speculate=Choice.of("draft_model", draft="elsewhere"))
    assert estimate(SIZE, elsewhere, draft) == estimate(SIZE, config) == plain


def test_four_bits_take_a_quarter_of_the_linear_layers() -> None:
    native = estimate(SIZE, EngineConfig())
    int4 = estimate(SIZE, EngineConfig(weights=Choice.of("int4", group_size=128)))

    assert native.weights_bytes - int4.weights_bytes == SIZE.linear_params * 3 // 2


@pytest.mark.parametrize("name", [name for name in WEIGHT_FORMATS.names() if name != "native"])
def test_every_format_is_counted_and_never_above_what_it_holds(name: str) -> None:
    """The bits of a weight as packed, scales included, are the upper bound."""
    knobs = {"emulated": True} if "emulated" in WEIGHT_FORMATS.knobs(name) else {}
    linear = WEIGHT_FORMATS.create(name, **knobs).pack(
        torch.randn(128, 256), None, dtype=torch.bfloat16, workspace=Workspace()
    )
    size = ModelSize(linear_params=128 * 256, other_params=0, num_layers=1, num_kv_heads=1, head_dim=1)

    assert 0 < estimate(size, EngineConfig(weights=Choice(name))).weights_bytes <= linear.num_bytes


def test_a_dense_copy_beside_packed_weights_counts() -> None:
    plain, shadowed = (
        estimate(SIZE, EngineConfig(weights=Choice.of("int4", shadow=shadow))).weights_bytes for shadow in (False, True)
    )

    assert shadowed - plain == 2 * SIZE.linear_params


def test_tied_embeddings_count_once() -> None:
    tied = ModelSize.of({**LLAMA_8B, "tie_word_embeddings": True})

    assert SIZE.other_params == 2 * tied.other_params


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (Choice("full"), 1000),
        (Choice.of("h2o", kv_budget=0.2), 200),
        (Choice.of("h2o", kv_budget=64), 64),
        (Choice.of("h2o", kv_budget=4000), 1000),
        (Choice("unheard_of"), 0),
        (Choice.of("odd", kv_budget=True), 0),
    ],
)
def test_rows_kept_by_a_policy(policy: Choice, kept: int) -> None:
    assert kept_tokens(policy, 1000) == kept


@pytest.mark.parametrize(
    ("codec", "share"),
    [
        (Choice("int8"), 1 / 2),
        (Choice("fp8"), 1 / 2),
        (Choice.of("int4", group_size=32), 1 / 4),
        (Choice.of("low_rank", rank=0.25, value_rank=96), 1 / 2),
        (Choice.of("low_rank", rank=0.25), 1 / 8),
    ],
    ids=str,
)
def test_share_of_a_bf16_cache_that_a_codec_needs_at_least(codec: Choice, share: float) -> None:
    native = estimate(SIZE, EngineConfig()).kv_bytes

    assert estimate(SIZE, EngineConfig(kv=KVConfig(policy=Choice("full"), codec=codec))).kv_bytes == native * share


def test_a_cache_that_does_not_lie_on_the_device_rules_nothing_out() -> None:
    offloaded = EngineConfig(kv=KVConfig(place=Choice("offload")), max_model_len=2**20)

    assert estimate(SIZE, offloaded).total_bytes == estimate(SIZE, offloaded).weights_bytes


def test_what_is_not_known_counts_as_nothing_so_that_nothing_is_ruled_out_wrongly() -> None:
    config = EngineConfig(weights=Choice("unheard_of"), kv=KVConfig(policy=Choice("full"), codec=Choice("unheard_of")))

    assert estimate(SIZE, config).kv_bytes == 0
    assert estimate(SIZE, config).weights_bytes == SIZE.other_params * 2


def test_a_bound_on_the_cache_bounds_the_estimate() -> None:
    config = dataclasses.replace(EngineConfig(max_batch_size=64, max_model_len=65536), kv_memory_bytes=GIB)

    assert estimate(SIZE, config).kv_bytes == GIB


def test_a_misfit_says_what_is_needed_and_what_is_there() -> None:
    needed = estimate(SIZE, EngineConfig())

    assert needed.misfit(24 * GIB) is None
    text = needed.misfit(8 * GIB)
    assert text is not None
    assert "needs at least 17 GiB" in text and "has 8 GiB" in text


@pytest.mark.parametrize("missing", list(LLAMA_8B))
def test_a_size_that_is_missing_is_an_error_unless_it_has_a_default(missing: str) -> None:
    plain = {key: value for key, value in LLAMA_8B.items() if key != missing}
    if missing == "num_key_value_heads":
        assert ModelSize.of(plain).num_kv_heads == 32
    else:
        with pytest.raises(KeyError):
            ModelSize.of(plain)


@given(
    kv_budget=st.one_of(st.integers(70, 5000), st.floats(0.05, 1.0)),
    max_model_len=st.integers(1500, 4000),
)
def test_the_estimate_counts_the_rows_that_the_engine_allocates(kv_budget: int | float, max_model_len: int) -> None:
    allocated = StreamingLLM(kv_budget=kv_budget).budgets(num_layers=2, max_model_len=max_model_len)

    assert {kept_tokens(Choice.of("streaming_llm", kv_budget=kv_budget), max_model_len)} == set(allocated)

from pathlib import Path
from typing import Any

import pytest
import torch

from codesign.engine.build import build_engine
from codesign.engine.models.shape import ARCHITECTURES
from codesign.engine.models.tiny import tiny_spec
from codesign.errors import InputError, Unsupported
from codesign.predict.memory import ModelSize, estimate
from codesign.registry import KV_CODECS
from codesign.spec.engine_config import Choice, EngineConfig
from codesign.spec.model import ModelSpec
from tests.engine.driving import generate, request, tiny_engine
from tests.engine.models.transformers_peer import peer, save


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_directory_written_by_transformers_generates_what_transformers_does(architecture: str, tmp_path: Path) -> None:
    model = peer(architecture)
    engine = build_engine(
        ModelSpec(name="peer", path=str(save(model, tmp_path))), EngineConfig(dtype="fp32", max_model_len=128)
    )
    item = request("a", 40, 20)
    prompt = torch.tensor([item.prompt_token_ids])
    expected = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=20,
        min_new_tokens=20,
        eos_token_id=None,
        pad_token_id=0,
    )

    assert generate(engine, request("a", 40, 20, ignore_eos=True))["a"] == expected[0, 40:].tolist()


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_facts_hold_the_bytes_that_theory_gives(dtype: str, size: int) -> None:
    facts = tiny_engine(dtype=dtype).facts()

    rows = 4 * 256 * 2 * 2  # slots, tokens, layers, KV heads
    # a kernel library may pad what it packs by about a KiB per layer
    assert 0 <= facts["bytes"]["weights"] - facts["resolved"]["num_parameters"] * size <= 32 * 1024
    assert rows * 2 * 16 * size <= facts["bytes"]["kv"] <= rows * (2 * 16 * size + 4) * 1.02
    assert facts["bytes"]["kv_staging"] == facts["bytes"]["workspace"] == 0
    assert facts["resolved"]["kv_budget_tokens"] == [256, 256]
    assert facts["resolved"]["dtype"] == dtype
    assert all(seconds >= 0 for seconds in facts["phases"].values())
    assert all(facts["kernels"].values())


@pytest.mark.parametrize(
    ("name", "knobs", "bits"),
    [
        ("native", {}, 16),
        ("int8", {}, 8),
        ("w8a8", {}, 8),
        ("fp8", {"emulated": True}, 8),
        ("int4", {}, 4 + 32 / 64),
        ("int4", {"group_size": 128, "symmetric": True}, 4 + 32 / 128),
        ("nf4", {}, 4 + 8 / 64 + 32 / 256 / 64),
        ("int3", {}, 3 + 32 / 64),
        ("int3", {"group_size": 128, "symmetric": True}, 3 + 16 / 128),
        ("int2", {}, 2 + 32 / 32),
    ],
)
def test_a_built_model_holds_the_bits_that_its_format_promises(name: str, knobs: dict[str, Any], bits: float) -> None:
    """Within 3 %: scales per row, norms and what kernel libraries pad are in it."""
    spec = tiny_spec(hidden_size=512, intermediate_size=1536, num_attention_heads=8, head_dim=64)
    config = EngineConfig(max_batch_size=1, max_model_len=64, weights=Choice.of(name, **knobs))
    engine = build_engine(spec, config)
    facts, shape = engine.facts(), engine.parts.model.shape
    outside = 2 * shape.vocab_size * shape.hidden_size

    theory = (facts["resolved"]["num_parameters"] - outside) * bits / 8 + outside * 2

    assert facts["bytes"]["weights"] == pytest.approx(theory, rel=0.03)


def test_tied_embeddings_are_counted_once() -> None:
    facts = tiny_engine(shape={"tie_word_embeddings": True}).facts()

    assert facts["bytes"]["weights"] == facts["resolved"]["num_parameters"] * 4


def test_random_model_of_fifty_million_parameters_builds_and_runs() -> None:
    """A Qwen2 shape: 0.05 B parameters, the head's logits near a spread of 1."""
    shape = {
        "vocab_size": 16000,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "head_dim": 64,
    }
    engine = build_engine(tiny_spec("Qwen2ForCausalLM", **shape), EngineConfig(dtype="bf16", max_model_len=64))
    facts = engine.facts()

    tokens = generate(engine, request("a", 20, 5), request("b", 5, 5))

    assert 50e6 < facts["resolved"]["num_parameters"] < 60e6
    assert facts["bytes"]["weights"] == pytest.approx(facts["resolved"]["num_parameters"] * 2, rel=0.01)
    assert all(len(ids) == 5 for ids in tokens.values())


def test_kv_memory_bounds_the_number_of_slots() -> None:
    whole = tiny_engine().facts()["bytes"]["kv"]

    bounded = tiny_engine(kv_memory_bytes=whole * 5 // 8)

    assert bounded.num_slots == bounded.facts()["resolved"]["num_slots"] == 2
    assert bounded.facts()["bytes"]["kv"] <= whole * 5 // 8
    requests = [request(str(index), 20, 10) for index in range(5)]
    assert generate(bounded, *requests) == generate(tiny_engine(), *requests)


@pytest.mark.parametrize("codec", KV_CODECS.names())
def test_every_codec_fills_the_memory_it_is_given_and_generates(codec: str) -> None:
    """Head size 32 so that every knob's default fits; half of what four native sequences need."""
    shape, config = {"head_dim": 32}, {"kv": {"codec": codec}, "max_model_len": 512}
    native = tiny_engine(shape=shape, max_model_len=512).facts()["bytes"]["kv"]
    engine = tiny_engine(shape=shape, kv_memory_bytes=native // 2, **config)
    single = tiny_engine(shape=shape, max_batch_size=1, **config)
    facts, one = engine.facts(), single.facts()["bytes"]["kv"]
    size = ModelSize(linear_params=0, other_params=0, num_layers=2, num_kv_heads=2, head_dim=32)

    assert facts["bytes"]["kv"] == one * engine.num_slots <= native // 2
    assert engine.num_slots == min(4, native // 2 // one)
    assert (engine.num_slots > 2) == (codec in ("int8", "int4", "fp8"))
    assert 0 < estimate(size, single.parts.config).kv_bytes <= one
    out = generate(engine, *[request(str(index), 150, 20, ignore_eos=True) for index in range(5)])
    assert all(len(tokens) == 20 for tokens in out.values())
    assert engine.facts()["bytes"]["kv_staging"] == 0


def test_a_codec_of_groups_with_a_policy_that_evicts_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"kv.codec 'int4' encodes groups of 32 tokens, of which kv.policy 'h2o'"):
        tiny_engine(kv={"policy": {"name": "h2o", "kv_budget": 64}, "codec": "int4"})


def test_kv_memory_too_small_for_one_sequence_says_the_need() -> None:
    one = tiny_engine(max_batch_size=1).facts()["bytes"]["kv"]

    assert tiny_engine(kv_memory_bytes=one).num_slots == 1
    with pytest.raises(Unsupported, match=f"kv_memory_bytes {one - 1}.*needs {one}"):
        tiny_engine(kv_memory_bytes=one - 1)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "context": ({}, {"max_model_len": 513}, "max_model_len 513 is longer than the 512 positions"),
    "window": (
        {"sliding_window": 100},
        {"max_model_len": 101},
        "max_model_len 101 is longer than the model's sliding window of 100",
    ),
    "step": ({}, {"max_step_tokens": 3}, "max_step_tokens 3 cannot hold one token of each of max_batch_size 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_combinations_that_make_no_sense_are_refused_by_name(case: str) -> None:
    shape, config, message = REFUSED[case]

    with pytest.raises(Unsupported, match=message):
        tiny_engine("MistralForCausalLM", shape=shape, **config)


def test_format_that_cannot_hold_a_layer_names_both() -> None:
    with pytest.raises(Unsupported, match=r"weight format 'int4' cannot hold layer 0 qkv \[128, 64\].*128"):
        tiny_engine(weights={"name": "int4", "group_size": 128})


@pytest.mark.parametrize("weights", ["int8", {"name": "int4", "group_size": 32}])
def test_quantised_engines_hold_fewer_bytes_and_generate(weights: object) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    native = tiny_engine(shape=shape, dtype="bf16").facts()["bytes"]["weights"]
    engine = tiny_engine(shape=shape, dtype="bf16", weights=weights)

    assert engine.facts()["bytes"]["weights"] < 0.75 * native
    assert len(generate(engine, request("a", 40, 10), request("b", 5, 10))["a"]) == 10


def test_window_as_long_as_the_context_is_fine() -> None:
    tiny_engine("MistralForCausalLM", shape={"sliding_window": 100}, max_model_len=100)


def test_rope_scaling_extends_the_context() -> None:
    tiny_engine(shape={"rope_scaling": {"type": "linear", "factor": 2.0}}, max_model_len=1024)


@pytest.mark.parametrize("device", ["gpu", "cpu:1", "cuda:x", "", "CPU", "mps"])
def test_unknown_device_is_an_input_error(device: str) -> None:
    with pytest.raises(InputError, match="unknown device"):
        build_engine(tiny_spec(), EngineConfig(), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_said() -> None:
    with pytest.raises(Unsupported, match="no usable CUDA device"):
        build_engine(tiny_spec(), EngineConfig(), device="cuda")


def test_number_of_threads_is_set_and_recorded() -> None:
    before = torch.get_num_threads()
    try:
        engine = build_engine(tiny_spec(), EngineConfig(max_model_len=64), num_threads=2)
        assert torch.get_num_threads() == engine.facts()["resolved"]["num_threads"] == 2
    finally:
        torch.set_num_threads(before)

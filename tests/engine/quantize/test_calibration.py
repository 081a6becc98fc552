"""Calibration sees what the engine computes, and later weights see what earlier ones became."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from codesign.bundled import target_path
from codesign.engine.build import build_engine
from codesign.engine.models.assemble import Assembler
from codesign.engine.models.random import RandomWeights
from codesign.engine.models.rope_scaling import rope_of
from codesign.engine.models.shape import read_shape
from codesign.engine.models.tiny import tiny_config, tiny_spec
from codesign.engine.quantize.calibration import LINEARS, Calibration
from codesign.engine.quantize.calibration_text import calibration_ids
from codesign.engine.quantize.formats.int3 import Int3
from codesign.engine.quantize.formats.native import Native
from codesign.engine.quantize.inputs import InputStats
from codesign.engine.quantize.linear import Linear, Workspace
from codesign.engine.step import StepPlan
from codesign.errors import Unsupported
from codesign.registry import WEIGHT_METHODS
from codesign.spec.engine_config import Choice, EngineConfig
from codesign.spec.model import ModelSpec
from tests.engine.driving import generate, request
from tests.engine.quantize.outliers import write_outlier_variant

SHAPE = read_shape(tiny_config("Qwen3ForCausalLM"), file=None)
IDS = torch.randint(0, SHAPE.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))


def dense_decoder():  # type: ignore[no-untyped-def]  # a decoder and its embedding
    source = RandomWeights(SHAPE, seed=0, dtype=torch.float32)
    assembler = Assembler(
        shape=SHAPE,
        weight_format=Native(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        workspace=Workspace(),
    )
    return assembler.build(source)


def test_hidden_states_end_as_those_of_the_engine() -> None:
    decoder = dense_decoder()
    calibration = Calibration(SHAPE, IDS, decoder.embedding, rope_of(SHAPE.rope, SHAPE.head_dim))
    for layer in decoder.layers:
        calibration.pack(layer, lambda name, _, layer=layer: getattr(layer, name), keeps_hessian=False)
    found = decoder.head(decoder.norm(calibration.hidden.flatten(0, 1))).view(3, 20, -1)

    engine = build_engine(tiny_spec("Qwen3ForCausalLM"), EngineConfig(dtype="fp32", max_batch_size=1, max_model_len=64))
    for row, ids in enumerate(IDS.tolist()):
        plan = StepPlan(
            frees=(0,),
            slots=(0,),
            query_lens=(20,),
            token_ids=tuple(ids),
            positions=tuple(range(20)),
            is_prompt=(True,),
            is_prompt_end=(True,),
            logits_rows=tuple(range(20)),
        )
        torch.testing.assert_close(found[row], engine.parts.runner.run(plan), rtol=1e-4, atol=1e-4)


def test_each_weight_sees_what_the_packed_ones_before_it_give() -> None:
    """Broken weights early in the layer change what later ones are calibrated on, in order."""
    seen: dict[bool, list[Tensor]] = {False: [], True: []}
    for breaks in (False, True):
        decoder = dense_decoder()
        calibration = Calibration(SHAPE, IDS, decoder.embedding, rope_of(SHAPE.rope, SHAPE.head_dim))
        for layer in decoder.layers:

            def repack(name: str, inputs: InputStats, layer=layer, breaks=breaks) -> Linear:  # type: ignore[no-untyped-def]
                seen[breaks].append(inputs.norm)
                linear: Linear = getattr(layer, name)
                if not breaks:
                    return linear
                return Native().wrap(linear.dequantize() * 0.5, None, workspace=Workspace())

            calibration.pack(layer, repack, keeps_hessian=False)

    assert len(seen[True]) == len(LINEARS) * SHAPE.num_layers
    torch.testing.assert_close(seen[True][0], seen[False][0])
    for broken, whole in zip(seen[True][1:], seen[False][1:], strict=True):
        assert not torch.allclose(broken, whole, rtol=1e-3)


def test_every_token_is_counted_once() -> None:
    decoder = dense_decoder()
    calibration = Calibration(SHAPE, IDS, decoder.embedding, rope_of(SHAPE.rope, SHAPE.head_dim))

    inputs = calibration.inputs(decoder.layers[0], "qkv", keeps_hessian=True)

    assert inputs.num_tokens == IDS.numel()
    assert float(inputs.hessian.diagonal().mean()) == pytest.approx(
        2 * float(inputs.norm.square().mean()) / 60, rel=1e-4
    )


@pytest.mark.parametrize("method", WEIGHT_METHODS.names())
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_every_method_builds_an_engine_that_generates(architecture: str, method: str) -> None:
    config = EngineConfig(
        dtype="fp32", max_batch_size=1, max_model_len=128, weights=Choice.of("int4", group_size=32, method=method)
    )

    engine = build_engine(tiny_spec(architecture), config)

    assert len(generate(engine, request("one", 20, 8))["one"]) == 8


def test_gptq_is_closer_to_the_model_than_rtn_on_the_bundled_target() -> None:
    logits = {}
    text = calibration_ids(ModelSpec(name="bundled", path=str(target_path())), 4096, 2048)[0, :128].tolist()
    for name, weights in {
        "native": Choice("native"),
        "rtn": Choice.of("int3", method="rtn"),
        "gptq": Choice.of("int3", method="gptq"),
    }.items():
        engine = build_engine(
            ModelSpec(name="bundled", path=str(target_path())),
            EngineConfig(weights=weights, max_batch_size=1, max_model_len=128),
        )
        plan = StepPlan(
            slots=(0,),
            query_lens=(128,),
            token_ids=tuple(text),
            positions=tuple(range(128)),
            is_prompt=(True,),
            is_prompt_end=(True,),
            logits_rows=tuple(range(128)),
        )
        logits[name] = engine.parts.runner.run(plan).log_softmax(-1)

    kl = {n: float((logits["native"].exp() * (logits["native"] - logits[n])).sum(-1).mean()) for n in ("rtn", "gptq")}
    assert kl["gptq"] < 0.75 * kl["rtn"]


def test_calibration_text_is_fixed_and_of_the_model(tmp_path: Path) -> None:
    spec = ModelSpec(name="bundled", path=str(target_path()))

    first, second = (calibration_ids(spec, 4096, 2048) for _ in range(2))

    assert torch.equal(first, second)
    assert first.shape == (32, 512)
    assert calibration_ids(spec, 4096, 100).shape == (32, 100)


def test_trained_weights_without_a_tokenizer_are_refused_for_calibrated_methods(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((target_path() / name).read_bytes())
    spec = ModelSpec(name="no tokenizer", path=str(tmp_path))

    with pytest.raises(Unsupported, match=r"tokenizer\.json; use method rtn or hqq"):
        build_engine(spec, EngineConfig(weights=Choice.of("int4", method="gptq")))
    assert json.loads((tmp_path / "config.json").read_text())
    build_engine(spec, EngineConfig(weights=Choice.of("int4", method="rtn"))).close()


def test_a_folded_layer_is_packed_with_the_norms_it_was_folded_into() -> None:
    """With codes fine enough to be exact, folding changes nothing."""
    spec = tiny_spec("Qwen2ForCausalLM")
    plain, folded = (
        generate(
            build_engine(spec, EngineConfig(dtype="fp32", max_model_len=128, weights=Choice.of("w8a8", method=method))),
            request("one", 30, 12),
        )
        for method in ("rtn", "smoothquant")
    )

    assert sum(a == b for a, b in zip(plain["one"], folded["one"], strict=True)) >= 6


def test_a_format_knows_whether_its_method_wants_to_see_inputs() -> None:
    assert Int3(method="gptq").method_member.needs_inputs
    assert not Int3(method="rtn").method_member.needs_inputs


def test_the_outlier_variant_is_the_same_function(tmp_path: Path) -> None:
    text = calibration_ids(ModelSpec(name="bundled", path=str(target_path())), 4096, 2048)[0, :64].tolist()
    plan = StepPlan(
        slots=(0,),
        query_lens=(64,),
        token_ids=tuple(text),
        positions=tuple(range(64)),
        is_prompt=(True,),
        is_prompt_end=(True,),
        logits_rows=tuple(range(64)),
    )
    variant = write_outlier_variant(target_path(), tmp_path / "variant", dtype=torch.float32)
    plain, changed = (
        build_engine(
            ModelSpec(name="model", path=str(path)), EngineConfig(dtype="fp32", max_batch_size=1, max_model_len=64)
        )
        for path in (target_path(), variant)
    )

    torch.testing.assert_close(changed.parts.runner.run(plan), plain.parts.runner.run(plan), rtol=1e-3, atol=1e-3)
    norms = [
        max(float(layer.input_norm.weight.abs().max()) for layer in engine.parts.model.layers)
        for engine in (plain, changed)
    ]
    assert norms[1] > 5 * norms[0]

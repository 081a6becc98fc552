"""What is exported is what was measured: read back by our own import, and named as the layout wants it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from codesign.bundled import target_path
from codesign.engine.build import build_engine
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.quantize.export import export_checkpoint
from codesign.engine.step import StepPlan
from codesign.errors import Unsupported
from codesign.spec.engine_config import Choice, EngineConfig
from codesign.spec.model import ModelSpec
from tests.engine.models.transformers_peer import peer, save


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(peer(request.param), tmp_path_factory.mktemp("original"))


def logits(path: Path, weights: Choice, dtype: str = "fp32") -> Tensor:
    config = EngineConfig(dtype=dtype, max_batch_size=1, max_model_len=64, weights=weights)  # type: ignore[arg-type]
    plan = StepPlan(
        slots=(0,),
        query_lens=(40,),
        token_ids=tuple(range(1, 41)),
        positions=tuple(range(40)),
        is_prompt=(True,),
        is_prompt_end=(True,),
        logits_rows=tuple(range(40)),
    )
    return build_engine(ModelSpec(name="model", path=str(path)), config).parts.runner.run(plan)


def export(folder: Path, target: Path, weights: Choice, prune: Choice = Choice("none")) -> Path:  # noqa: B008
    config = EngineConfig(dtype="fp32", max_batch_size=1, max_model_len=64, weights=weights, prune=prune)
    spec = ModelSpec(name="model", path=str(folder))
    files = export_checkpoint(spec, config, target, dtype=torch.float32)
    assert {file.name for file in files} >= {"config.json", "model.safetensors"}
    return target


@pytest.mark.parametrize(
    "weights",
    [
        Choice.of("int4", group_size=32),
        Choice.of("int4", group_size=32, symmetric=True),
        Choice.of("int3", group_size=32),
        Choice.of("int2", group_size=32, symmetric=True),
        Choice("int8"),
    ],
    ids=str,
)
def test_our_own_import_gives_the_same_logits(folder: Path, tmp_path: Path, weights: Choice) -> None:
    target = export(folder, tmp_path / "out", weights)

    wanted = logits(folder, weights)
    found = logits(target, Choice("native"))

    assert float((found - wanted).abs().max()) < 0.02 * float(wanted.std())


def test_native_weights_are_exported_as_plain_tensors(folder: Path, tmp_path: Path) -> None:
    target = export(folder, tmp_path / "out", Choice("native"), Choice.of("magnitude", sparsity=0.5))

    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    weight = load_file(target / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert logits(target, Choice("native")).isfinite().all()


def test_w8a8_is_written_as_integers_with_a_scale_per_row_and_per_token(folder: Path, tmp_path: Path) -> None:
    target = export(folder, tmp_path / "out", Choice("w8a8"))

    config = json.loads((target / "config.json").read_text())["quantization_config"]
    tensors = load_file(target / "model.safetensors")
    assert config["format"] == "int-quantized"
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    weight, scale = (tensors[f"model.layers.0.mlp.up_proj.{name}"] for name in ("weight", "weight_scale"))
    original = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.int8
    torch.testing.assert_close(weight.float() * scale, original, rtol=0, atol=float(scale.max()) * 0.51)


def test_mixed_formats_become_groups_that_name_their_layers(tmp_path: Path) -> None:
    folder = save(peer("LlamaForCausalLM", vocab_size=4096), tmp_path / "original")
    (folder / "tokenizer.json").write_bytes((target_path() / "tokenizer.json").read_bytes())

    target = export(folder, tmp_path / "out", Choice.of("mixed", bits=4.5, group_size=32))

    groups = json.loads((target / "config.json").read_text())["quantization_config"]["config_groups"]
    targets = [name for group in groups.values() for name in group["targets"]]
    assert len(groups) > 1
    assert len(set(targets)) == len(targets) == 2 * 7


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (Choice("nf4"), "'nf4' have no layout in compressed-tensors"),
        (Choice("fp8"), "'fp8' have no layout in compressed-tensors"),
        (Choice.of("fp8", emulated=True), "'fp8' have no layout in compressed-tensors"),
        (Choice.of("int4", group_size=32, method="hqq"), "hqq"),
    ],
    ids=str,
)
def test_what_the_layout_cannot_hold_is_refused(tmp_path: Path, weights: Choice, message: str) -> None:
    folder = save(peer("LlamaForCausalLM", intermediate_size=128), tmp_path / "original")

    with pytest.raises(Unsupported, match=message):
        export(folder, tmp_path / "out", weights)


def test_random_weights_and_quantised_checkpoints_are_refused(folder: Path, tmp_path: Path) -> None:
    config = EngineConfig(dtype="fp32", max_model_len=64)
    with pytest.raises(Unsupported, match="random weights"):
        export_checkpoint(tiny_spec(), config, tmp_path / "out", dtype=torch.float32)

    target = export(folder, tmp_path / "first", Choice.of("int4", group_size=32))
    with pytest.raises(Unsupported, match="quantised already"):
        export(target, tmp_path / "second", Choice("native"))

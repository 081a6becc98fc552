"""Checkpoints that other tools quantised: each layout is written value by value (`writers.py`) and read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.quantize.grid import AffineGrid
from codesign.engine.quantize.layout import pack_stream, unpack_stream
from codesign.engine.step import StepPlan
from codesign.errors import InputError, Unsupported
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from tests.engine.models.transformers_peer import peer, save
from tests.engine.quantize.layouts.writers import awq, compressed, gptq, rows_packed

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = EngineConfig(dtype="fp32", max_batch_size=1, max_model_len=64)


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 70), st.integers(0, 10**6))
def test_streams_of_bits_are_those_of_the_plain_packer_and_come_back(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)

    words = pack_stream(codes, bits)

    assert torch.equal(words, rows_packed(codes, bits))
    assert torch.equal(unpack_stream(words, bits, count), codes)


CASES: dict[str, dict[str, Any]] = {
    "gptq 4": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False},
    "gptq 4 v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
    "gptq 4 symmetric": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True},
    "gptq 4 act-order": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
    "gptq 4 whole rows": {"quant_method": "gptq", "bits": 4, "group_size": -1},
    "gptq 3": {"quant_method": "gptq", "bits": 3, "group_size": 32},
    "gptq 2": {"quant_method": "gptq", "bits": 2, "group_size": 32},
    "gptq 8": {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    **{
        f"compressed-tensors {bits} {'symmetric' if symmetric else 'asymmetric'}": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": 32},
                }
            },
            "ignore": ["lm_head"],
        }
        for bits, symmetric in ((4, True), (4, False), (3, True), (8, True), (2, False))
    },
    "compressed-tensors act-order": {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "group_0": {
                "weights": {
                    "num_bits": 4,
                    "symmetric": False,
                    "strategy": "group",
                    "group_size": 32,
                    "actorder": "group",
                }
            }
        },
    },
    "compressed-tensors channel": {
        "quant_method": "compressed-tensors",
        "config_groups": {"g": {"weights": {"num_bits": 8, "symmetric": True, "strategy": "channel"}}},
    },
}


def quantised(folder: Path, target: Path, config: dict[str, Any], *, dense: tuple[str, ...] = ()) -> Path:
    """Writes `folder` quantised as `config` says, and beside it `target`-dense: the weights that this means."""
    weights = config.get("config_groups", {}).get("group_0") or config.get("config_groups", {}).get("g") or {}
    weights = weights.get("weights", config)
    bits, size = weights.get("bits", weights.get("num_bits")), weights.get("group_size", -1)
    symmetric = weights.get("sym", weights.get("symmetric", False))
    scatters = bool(weights.get("desc_act") or weights.get("actorder"))
    tensors = load_file(folder / "model.safetensors")
    written, meant = dict(tensors), dict(tensors)
    for name in list(tensors):
        stem = name.removesuffix("weight")
        if not name.endswith("weight") or name.split(".")[-2] not in LINEARS or name.split(".")[-2] in dense:
            continue
        weight = tensors[name].float()
        num_in = weight.shape[1]
        own = AffineGrid(
            bits=bits,
            group_size=size if size > 0 else None,
            is_symmetric=symmetric,
            scale_dtype=torch.float16,
        )
        groups = own.num_groups(num_in)
        order = (
            torch.randperm(num_in, generator=torch.Generator().manual_seed(num_in))
            if scatters
            else torch.arange(num_in)
        )
        g_idx = torch.empty(num_in, dtype=torch.int64)
        g_idx[order] = torch.arange(num_in) // (num_in // groups)
        found = own.quantize(weight[:, order], own.fit(weight[:, order]))
        zero = own.zero_points(found.fit)
        if zero is None:
            zero = torch.full(found.fit.scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
        codes = torch.empty_like(found.codes)
        codes[:, order] = found.codes
        scale = found.fit.scale.half()
        exact = (codes.float() - zero.float()[:, g_idx]) * scale.float()[:, g_idx]
        meant[name] = exact
        del written[name]
        method = config["quant_method"]
        if method == "gptq":
            version = 2 if config.get("checkpoint_format") == "gptq_v2" else 1
            new = gptq(codes, zero, scale, g_idx, bits=bits, version=version)
        elif method == "awq":
            new = awq(codes, zero, scale)
        else:
            new = compressed(codes, None if symmetric else zero, scale, bits=bits, g_idx=g_idx if scatters else None)
        written.update({f"{stem}{suffix}": tensor for suffix, tensor in new.items()})
    for where, content, extra in (
        (target, written, {"quantization_config": config}),
        (dense_beside(target), meant, {}),
    ):
        where.mkdir(parents=True)
        plain = json.loads((folder / "config.json").read_text())
        (where / "config.json").write_text(json.dumps({**plain, **extra}))
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, where / "model.safetensors")
    return target


def dense_beside(target: Path) -> Path:
    return target.with_name(f"{target.name}-dense")


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Qwen2ForCausalLM"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(peer(request.param), tmp_path_factory.mktemp("original"))


def build(path: Path, **changes: Any) -> Engine:
    config = EngineConfig.from_dict({**CONFIG.to_dict(), **changes})
    return build_engine(ModelSpec(name=path.name, path=str(path)), config)


def logits(engine: Engine) -> Tensor:
    plan = StepPlan(
        frees=(0,),
        slots=(0,),
        query_lens=(40,),
        token_ids=tuple(range(1, 41)),
        positions=tuple(range(40)),
        is_prompt=(True,),
        is_prompt_end=(True,),
        logits_rows=tuple(range(40)),
    )
    return engine.parts.runner.run(plan)


@pytest.mark.parametrize("case", CASES)
def test_a_quantised_directory_computes_with_the_weights_it_means(folder: Path, tmp_path: Path, case: str) -> None:
    path = quantised(folder, tmp_path / "model", CASES[case])

    found, wanted = build(path), build(dense_beside(path))

    spread = float(logits(wanted).std())
    assert float((logits(found) - logits(wanted)).abs().max()) < 0.01 * spread  # fp16 offsets
    assert found.facts()["bytes"]["weights"] < 0.75 * wanted.facts()["bytes"]["weights"]


def test_bf16_runs_through_the_kernel_of_the_format(folder: Path, tmp_path: Path) -> None:
    engine = build(quantised(folder, tmp_path / "model", CASES["awq"]), dtype="bf16")

    assert "int4" in engine.facts()["kernels"]["weights"]
    assert logits(engine).isfinite().all()


def test_linears_that_are_not_quantised_stay_dense(folder: Path, tmp_path: Path) -> None:
    path = quantised(folder, tmp_path / "model", CASES["gptq 4"], dense=("o_proj",))

    found = build(path)

    assert "aten::linear" in found.facts()["kernels"]["weights"]
    assert float((logits(found) - logits(build(dense_beside(path)))).abs().max()) < 0.05


def test_a_half_quantised_projection_is_refused(folder: Path, tmp_path: Path) -> None:
    path = quantised(folder, tmp_path / "model", CASES["gptq 4"], dense=("k_proj",))

    with pytest.raises(Unsupported, match="qkv: one part is quantised and another is not"):
        build(path)


@pytest.mark.parametrize("changes", [{"weights": {"name": "int8"}}, {"prune": {"name": "magnitude"}}])
def test_another_format_of_a_quantised_checkpoint_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = quantised(folder, tmp_path / "model", CASES["gptq 4"])

    with pytest.raises(Unsupported, match=r"already quantised .* only be run as it is"):
        build(path, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quant_method": "bitsandbytes"}, InputError, "unknown layout"),
        ({"quant_method": None}, InputError, "quant_method"),
        ({"bits": 5}, InputError, "must be 2, 3, 4 or 8"),
        ({"bits": "4"}, InputError, "whole number"),
        ({"group_size": 48}, InputError, "no whole groups of 48"),
        ({"checkpoint_format": "marlin"}, InputError, "gptq or gptq_v2"),
        ({"quant_method": "awq", "version": "gemv"}, Unsupported, "gemv"),
        ({"quant_method": "compressed-tensors"}, InputError, "config_groups"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, Unsupported, "float-quantized"),
        ({"group_size": 16}, InputError, "has shape"),
    ],
)
def test_what_cannot_be_read_is_said_with_the_file(
    folder: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = quantised(folder, tmp_path / "model", CASES["gptq 4"])
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update(changes)
    (path / "config.json").write_text(json.dumps(config))

    with pytest.raises(error, match=message) as caught:
        build(path)
    assert str(path) in str(caught.value)


def test_groups_that_are_not_even_are_refused(folder: Path, tmp_path: Path) -> None:
    path = quantised(folder, tmp_path / "model", CASES["gptq 4"])
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.g_idx"][3] = 1
    save_file(tensors, path / "model.safetensors")

    with pytest.raises(InputError, match="g_idx does not hold 32 inputs of every group"):
        build(path)

"""Our decoder against transformers, number by number, and proof that the comparison sees the classic bugs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codesign.engine.models import decoder, rope_scaling
from codesign.engine.models.assemble import Assembler
from codesign.engine.models.decoder import Decoder
from codesign.engine.models.load import Checkpoint, read_config
from codesign.engine.models.rope_scaling import rope_frequencies
from codesign.engine.models.shape import ARCHITECTURES, read_shape
from codesign.engine.quantize.formats.native import Native
from codesign.engine.quantize.linear import Workspace
from codesign.engine.runner import SingleRunner
from codesign.engine.step import StepPlan
from tests.engine import reference_attention
from tests.engine.models.transformers_peer import peer, peer_logits, save
from tests.engine.reference_attention import ReferenceAttention

BOUND = 1e-4  # of the logits' standard deviation
NUM_POSITIONS = 512


def random_tokens(count: int, *, vocab_size: int = 128, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count,), generator=generator).tolist()


def whole_prompt(token_ids: list[int]) -> StepPlan:
    count = len(token_ids)
    return StepPlan(
        slots=(0,),
        query_lens=(count,),
        token_ids=tuple(token_ids),
        positions=tuple(range(count)),
        is_prompt=(True,),
        is_prompt_end=(True,),
        logits_rows=tuple(range(count)),
    )


def load_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    shape = read_shape(read_config(folder), file=folder / "config.json")
    assembler = Assembler(
        shape=shape, weight_format=Native(), dtype=dtype, device=torch.device("cpu"), workspace=Workspace()
    )
    return assembler.build(Checkpoint(folder, dtype=dtype))


def our_logits(folder: Path, token_ids: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    model = load_decoder(folder, dtype)
    inv_freq, scaling = rope_frequencies(model.shape.rope, model.shape.head_dim)
    return SingleRunner(model, ReferenceAttention(inv_freq, scaling), torch.device("cpu")).run(whole_prompt(token_ids))


def worst_error(folder: Path, model: Any, token_ids: list[int]) -> float:
    """Largest difference in units of the logits' standard deviation, which must be at least 1."""
    expected = peer_logits(model, token_ids)
    assert expected.std() >= 1
    return float((our_logits(folder, token_ids) - expected).abs().max() / expected.std())


VARIANTS = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-mha": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama-theta": ("LlamaForCausalLM", {"rope_theta": 500000.0}),
    "mistral": ("MistralForCausalLM", {}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 512}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3-head-dim-biases": ("Qwen3ForCausalLM", {"head_dim": 32, "attention_bias": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree_with_transformers_over_512_positions(variant: str, tmp_path: Path) -> None:
    architecture, changes = VARIANTS[variant]
    model = peer(architecture, **changes)

    error = worst_error(save(model, tmp_path), model, random_tokens(NUM_POSITIONS))

    assert error <= BOUND


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 0.8,
    },
}


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [(kind, name) for kind in ("linear", "llama3", "yarn") for name in ARCHITECTURES]
    + [("yarn-mscale", "LlamaForCausalLM"), ("yarn-attention-factor", "LlamaForCausalLM")],
)
def test_logits_agree_past_the_original_context_under_rope_scaling(
    kind: str, architecture: str, tmp_path: Path
) -> None:
    model = peer(architecture, max_position_embeddings=512, rope_parameters={"rope_theta": 10000.0, **SCALINGS[kind]})

    error = worst_error(save(model, tmp_path), model, random_tokens(NUM_POSITIONS))

    assert error <= BOUND


@pytest.mark.parametrize("kind", SCALINGS)
def test_older_spelling_of_rope_scaling_means_the_same(kind: str) -> None:
    common = {"architectures": ["LlamaForCausalLM"], **peer("LlamaForCausalLM").config.to_dict()}
    common.pop("rope_parameters")
    newer = read_shape({**common, "rope_parameters": {"rope_theta": 7.0, **SCALINGS[kind]}})
    older = {**SCALINGS[kind], "type": kind.split("-")[0]}
    older.pop("rope_type")

    assert read_shape({**common, "rope_theta": 7.0, "rope_scaling": older}) == newer


def plant_no_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_attention, "rotate_half_split", lambda x, angle, scaling: x)


def plant_interleaved_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    def rotate(x: Tensor, angle: Tensor, scaling: float) -> Tensor:
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)

    monkeypatch.setattr(reference_attention, "rotate_half_split", rotate)


def plant_wrong_theta(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rope_scaling.RopeScaling
    monkeypatch.setattr(rope_scaling, "RopeScaling", lambda **values: right(**{**values, "theta": 9000.0}))


def plant_missing_qk_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decoder.DecoderLayer.project

    def project(self: decoder.DecoderLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.q_norm = self.k_norm = None
        return right(self, x)

    monkeypatch.setattr(decoder.DecoderLayer, "project", project)


def plant_dropped_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Native.pack
    monkeypatch.setattr(Native, "pack", lambda self, weight, bias, **rest: right(self, weight, None, **rest))


BUGS = {
    "no rope": (plant_no_rope, "LlamaForCausalLM"),
    "interleaved halves": (plant_interleaved_halves, "LlamaForCausalLM"),
    "wrong theta": (plant_wrong_theta, "LlamaForCausalLM"),
    "missing qk-norm": (plant_missing_qk_norm, "Qwen3ForCausalLM"),
    "dropped bias": (plant_dropped_bias, "Qwen2ForCausalLM"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_comparison_fails_with_a_planted_bug(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, architecture = BUGS[bug]
    model = peer(architecture)
    folder, tokens = save(model, tmp_path), random_tokens(NUM_POSITIONS)
    assert worst_error(folder, model, tokens) <= BOUND

    plant(monkeypatch)

    assert worst_error(folder, model, tokens) > 100 * BOUND


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_close(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = peer(architecture)
    tokens = random_tokens(64)
    expected = peer_logits(model, tokens)

    logits = our_logits(save(model, tmp_path), tokens, dtype)

    assert logits.dtype == torch.float32
    assert (logits - expected).abs().mean() / expected.std() < (0.03 if dtype == torch.bfloat16 else 0.005)

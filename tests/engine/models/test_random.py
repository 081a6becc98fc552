import pytest
import torch

from codesign.engine.models.random import RandomWeights
from codesign.engine.models.shape import read_shape
from codesign.engine.models.tiny import tiny_config

SHAPE = read_shape(tiny_config())
LARGE = {"model.layers.0.mlp.up_proj.weight": (4096, 1024), "model.layers.1.mlp.up_proj.weight": (4096, 1024)}


def source(seed: int = 0, dtype: torch.dtype = torch.float32) -> RandomWeights:
    return RandomWeights(SHAPE, seed=seed, dtype=dtype)


def test_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    first, again, other = (source(seed).read(LARGE) for seed in (3, 3, 4))

    assert all(torch.equal(first[name], again[name]) for name in LARGE)
    assert not any(torch.equal(first[name], other[name]) for name in LARGE)


def test_tensors_and_rows_of_a_large_model_differ() -> None:
    first, second = source().read(LARGE).values()

    assert not torch.equal(first, second)
    assert len(torch.unique(first[:, 0])) > 4000
    assert torch.linalg.matrix_rank(first[:64]) == 64


def test_spread_keeps_activations_near_one() -> None:
    first, _ = source().read(LARGE).values()

    assert abs(first.std() * 1024**0.5 - 1) < 0.02
    assert (torch.randn(8, 1024) @ first.T).std().sub(1).abs() < 0.05


def test_norms_are_ones_and_dtype_is_kept() -> None:
    found = source(dtype=torch.bfloat16).read({"model.norm.weight": (64,), **LARGE})

    assert torch.equal(found["model.norm.weight"], torch.ones(64, dtype=torch.bfloat16))
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())


def test_a_large_model_draws_a_million_numbers_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda count, **rest: drawn.append(count) or randn(count, **rest))
    held = source(dtype=torch.bfloat16)

    for index in range(10):
        held.read({f"model.layers.{index}.mlp.up_proj.weight": (4864, 896)})

    assert sum(drawn) < 1.1e6

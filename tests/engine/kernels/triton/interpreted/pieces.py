"""The small operations in one launch against the operations of torch: at most one last place apart in 16 bits."""

import pytest
import torch
from torch import Tensor

from codesign.engine.build import build_engine
from codesign.engine.kernels.plain import PLAIN
from codesign.engine.kernels.triton.fused import TritonFused
from codesign.engine.models.tiny import tiny_spec
from codesign.spec.engine_config import EngineConfig
from tests.engine.driving import generate, request

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the value: in 16 bits one last place and a little; in fp32 what sums in another order leave.
RTOL = {torch.float32: 2e-6, torch.bfloat16: 2**-7 * 1.01, torch.float16: 2**-10 * 1.01}
# Beneath the smallest normal number a last place is this.
ATOL = {torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 6e-8}
FUSED = TritonFused()


def near(ours: Tensor, plain: Tensor) -> bool:
    dtype = plain.dtype
    assert ours.dtype == dtype and ours.shape == plain.shape
    return torch.allclose(ours.float(), plain.float(), rtol=RTOL[dtype], atol=ATOL[dtype], equal_nan=True)


def values(*size: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    return (torch.randn(size, generator=torch.Generator().manual_seed(sum(size))) * spread).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "size"), [(0, 64), (1, 1), (1, 64), (3, 70), (5, 1500)])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 100.0])
def test_norm_and_residual(num_rows: int, size: int, spread: float, dtype: torch.dtype) -> None:
    x, change = values(num_rows, size, dtype=dtype, spread=spread), values(num_rows, size, dtype=dtype).flip(-1)
    weight = values(size, dtype=dtype)

    total, normed = FUSED.add_norm(x, change, weight, 1e-6)

    assert torch.equal(total, PLAIN.add_norm(x, change, weight, 1e-6)[0])
    # Two roundings: of the normalised value and of its product with the weight.
    for ours, plain in (
        (normed, PLAIN.norm(total, weight, 1e-6)),
        (FUSED.norm(x, weight, 1e-6), PLAIN.norm(x, weight, 1e-6)),
    ):
        assert near(ours, plain)
        assert not plain.numel() or dtype == torch.float32 or (ours == plain).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy's, where it is meant
@pytest.mark.parametrize(("num_rows", "size"), [(0, 32), (1, 5), (3, 160), (2, 1300)])
def test_silu_times_up(num_rows: int, size: int, dtype: torch.dtype) -> None:
    gate_up = values(num_rows, 2 * size, dtype=dtype, spread=8.0)
    if num_rows:
        gate_up[0, :4] = torch.tensor([float("inf"), -300.0, 300.0, float("nan")])

    ours, plain = FUSED.silu_mul(gate_up), PLAIN.silu_mul(gate_up)

    assert near(ours, plain)
    is_equal = (ours == plain) | plain.isnan()
    assert not plain.numel() or dtype == torch.float32 or is_equal.float().mean() > 0.97


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "num_q", "num_k", "size"), [(0, 2, 1, 16), (1, 4, 2, 64), (5, 3, 1, 80)])
def test_heads(num_tokens: int, num_q: int, num_k: int, size: int, dtype: torch.dtype) -> None:
    q, k, v = values(num_tokens, num_q + 2 * num_k, size, dtype=dtype).split((num_q, num_k, num_k), dim=1)
    weights = values(size, dtype=dtype), values(size, dtype=dtype).flip(0)
    cos, signed_sin = (
        values(num_tokens, 1, size, dtype=torch.float32),
        values(num_tokens, 1, size, dtype=torch.float32).flip(-1),
    )

    normed, plain_normed = FUSED.norm_heads(q, k, *weights, 1e-6), PLAIN.norm_heads(q, k, *weights, 1e-6)
    turned, plain_turned = FUSED.rotate(q, k, cos, signed_sin), PLAIN.rotate(q, k, cos, signed_sin)

    assert all(map(near, normed, plain_normed))
    for ours, plain in zip(turned, plain_turned, strict=True):  # a difference may vanish next to what it is made of
        assert torch.allclose(ours.float(), plain.float(), rtol=RTOL[dtype], atol=1e-6)
    row = torch.arange(num_tokens * num_k).flip(0) + 1  # the first row and the last stay as they are
    ours, plain = torch.ones(2, 2, num_tokens * num_k + 2, size, dtype=dtype)
    query = FUSED.rotate_into(q, k, v, cos, signed_sin, key=ours[0], value=ours[1], rows=row)
    plain_query = PLAIN.rotate_into(q, k, v, cos, signed_sin, key=plain[0], value=plain[1], rows=row)
    keys = torch.ones(2, *ours.shape[1:], dtype=dtype)
    FUSED.rotate_rows(k, cos, signed_sin, key=keys[0], rows=row)
    PLAIN.rotate_rows(k, cos, signed_sin, key=keys[1], rows=row)
    for found, wanted in ((query, plain_query), (ours, plain), keys):
        assert torch.allclose(found.float(), wanted.float(), rtol=RTOL[dtype], atol=1e-6)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_an_engine_runs_on_them_and_says_so(architecture: str) -> None:
    tokens, words = [], []
    for is_fused in (True, False):
        plain = {"dtype": "fp32", "max_batch_size": 2, "max_model_len": 64, "kernels": {"fused": is_fused}}
        engine = build_engine(tiny_spec(architecture), EngineConfig.from_dict(plain))
        words.append(engine.facts()["kernels"]["fused"])
        tokens.append(generate(engine, *(request(name, 8, 4, ignore_eos=True) for name in ("a", "b"))))

    assert words[0].startswith("triton::fused (residual + RMSNorm") and words[1] == "none"
    assert tokens[0] == tokens[1]

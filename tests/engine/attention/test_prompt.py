"""Prompt chunks through the compiled kernel: against fp64, and the same bits however a prompt is cut."""

import pytest
import torch
from torch import Tensor

from codesign.engine.attention.calls import Call, Span, cut
from codesign.engine.attention.prompt import PromptAttention
from codesign.registry import ATTENTION

CPU, DIM, NUM_KV_HEADS = torch.device("cpu"), 32, 2


def prompts(dtype: torch.dtype = torch.bfloat16, backend: str = "sdpa") -> PromptAttention:
    return PromptAttention(
        ATTENTION.create(backend), num_kv_heads=NUM_KV_HEADS, head_dim=DIM, scale=0.2, dtype=dtype, device=CPU
    )


needs_kernel = pytest.mark.skipif(prompts().kernel.startswith("aten"), reason="no bf16 attention kernel here")


def tensors(num_rows: int, num_groups: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """query [R, H, D], key and value [H_kv, R, D]."""
    generator = torch.Generator().manual_seed(num_rows)
    query = torch.randn(num_rows, NUM_KV_HEADS * num_groups, DIM, generator=generator)
    key, value = torch.randn(2, NUM_KV_HEADS, num_rows, DIM, generator=generator)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def chunk(num_past: int, num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> Call:
    (call,) = cut([Span(0, 0, num_tokens, num_past, True, True)], num_groups=1, dtype=dtype, device=CPU)
    return call


def reference(query: Tensor, key: Tensor, value: Tensor, num_past: int) -> Tensor:
    num_groups = query.shape[1] // NUM_KV_HEADS
    key, value = (rows.double().repeat_interleave(num_groups, dim=0) for rows in (key, value))
    score = query.double().transpose(0, 1) @ key.mT * 0.2
    token = num_past + torch.arange(len(query))[:, None]
    weight = score.masked_fill(torch.arange(key.shape[1]) > token, float("-inf")).softmax(dim=-1)
    return (weight @ value).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_groups", [1, 7])
@pytest.mark.parametrize("num_past", [0, 5, 1030])
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 130, 600])
def test_a_chunk_attends_as_in_fp64(num_tokens: int, num_past: int, num_groups: int, dtype: torch.dtype) -> None:
    query, key, value = tensors(num_past + num_tokens, num_groups, dtype)

    found = prompts(dtype)(query[num_past:], key, value, chunk(num_past, num_tokens, dtype))

    expected = reference(query[num_past:], key, value, num_past)
    bound = 2e-5 if dtype == torch.float32 else 1e-2
    assert found.dtype == dtype
    assert float((found.double() - expected).norm()) <= bound * float(expected.norm())


@needs_kernel
@pytest.mark.parametrize("sizes", [(200,), (1, 199), (64, 64, 72), (100, 100), (13,) * 15 + (5,)])
def test_a_prompt_gets_the_same_bits_however_it_is_cut(sizes: tuple[int, ...]) -> None:
    attend, (query, key, value) = prompts(), tensors(200, 7)
    whole = torch.cat([attend(query[i : i + 1], key[:, : i + 1], value[:, : i + 1], chunk(i, 1)) for i in range(200)])

    found, start = [], 0
    for size in sizes:
        own = slice(start, start + size)
        found.append(attend(query[own], key[:, : own.stop], value[:, : own.stop], chunk(start, size)))
        start += size

    assert torch.equal(torch.cat(found), whole)


@needs_kernel
def test_rows_may_lie_in_a_larger_cache_or_token_by_token() -> None:
    attend, (query, key, value) = prompts(), tensors(90, 2)
    roomy = torch.full((2, NUM_KV_HEADS, 128, DIM), torch.nan, dtype=torch.bfloat16)
    roomy[:, :, :90] = torch.stack((key, value))
    by_token = [rows.transpose(0, 1).contiguous().transpose(0, 1) for rows in (key, value)]

    expected = attend(query, key, value, chunk(0, 90))

    assert torch.equal(attend(query, *roomy[:, :, :90], chunk(0, 90)), expected)
    assert torch.equal(attend(query, *by_token, chunk(0, 90)), expected)


def test_the_reference_backend_stays_plain() -> None:
    assert prompts(backend="eager").kernel == ATTENTION.create("eager").kernel

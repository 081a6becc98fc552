"""Every registered backend against a float64 softmax: shapes that decode, verification and prefill really ask for.

A backend that cannot run on this device skips here; test_triton.py runs this file once more where it can.
"""

import math

import pytest
import torch
from torch import Tensor

from codesign.engine.attention import weights as weights_module
from codesign.registry import ATTENTION
from tests.engine.usable_backends import backend_or_skip

# Half precision: the inputs are exact, rounding of the softmax weights and of the output remains.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    q, k, v = (part.double() for part in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)))
    score = q @ k.mT * scale
    if mask is not None:
        score = score + mask.double()
    if is_causal:
        score = score + torch.full(score.shape[-2:], -math.inf, dtype=torch.float64).triu(1)
    return score.softmax(dim=-1) @ v


def draw(
    num_batch: int, num_heads: int, num_kv_heads: int, num_queries: int, num_rows: int, head_dim: int
) -> list[Tensor]:
    """Views of a larger cache, as the store hands them out."""
    generator = torch.Generator().manual_seed(num_batch + num_heads + num_rows)
    query = torch.randn(num_batch, num_heads, num_queries, head_dim, generator=generator)
    cache = torch.randn(2, num_batch, num_kv_heads, num_rows + 5, head_dim, generator=generator)
    return [query, cache[0, :, :, :num_rows], cache[1, :, :, :num_rows]]


def check(
    name: str, dtype: torch.dtype, parts: list[Tensor], *, mask: Tensor | None = None, is_causal: bool = False
) -> None:
    query, key, value = (part.to(dtype) for part in parts)
    mask = None if mask is None else mask.to(dtype)
    backend = ATTENTION.create(name)
    out = backend.attend(query, key, value, mask=mask, is_causal=is_causal, scale=0.2)

    assert out.dtype == dtype and out.shape == query.shape
    error = (out.double() - plain(query, key, value, mask, is_causal, 0.2)).abs().max()
    assert error < TOLERANCE[dtype]


DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
BACKENDS = pytest.mark.parametrize("name", [backend_or_skip(name) for name in ATTENTION.names()])


@BACKENDS
@DTYPES
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_groups", [1, 4, 8])
@pytest.mark.parametrize("num_rows", [1, 31, 32, 33, 200])
def test_folded_output_tokens(name: str, dtype: torch.dtype, head_dim: int, num_groups: int, num_rows: int) -> None:
    check(name, dtype, draw(3, 2, 2, num_groups, num_rows, head_dim))


@BACKENDS
@DTYPES
def test_ragged_rows_are_hidden_by_a_broadcast_mask(name: str, dtype: torch.dtype) -> None:
    lengths = torch.tensor([1, 7, 40])
    mask = torch.zeros(3, 40).masked_fill(torch.arange(40) >= lengths[:, None], -math.inf)

    check(name, dtype, draw(3, 2, 2, 4, 40, 64), mask=mask[:, None, None])


@BACKENDS
@DTYPES
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("num_queries", [1, 2, 33, 150])
def test_whole_prompt_is_causal(name: str, dtype: torch.dtype, num_groups: int, num_queries: int) -> None:
    check(name, dtype, draw(1, 2 * num_groups, 2, num_queries, num_queries, 64), is_causal=True)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("num_past", [1, 64])
def test_later_chunk_sees_the_past_and_itself_causally(name: str, dtype: torch.dtype, num_past: int) -> None:
    rows = torch.arange(num_past + 9)
    mask = torch.zeros(9, num_past + 9).masked_fill(rows > rows[num_past:, None], -math.inf)

    check(name, dtype, draw(1, 6, 2, 9, num_past + 9, 64), mask=mask[None, None])


@BACKENDS
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_columns_of_output_tokens_are_their_weights(name: str, num_tokens: int) -> None:
    query, key, value = draw(3, 2, 2, 4 * num_tokens, 40, 64)
    seen = torch.tensor([1, 7, 40])[:, None] - (num_tokens - 1 - torch.arange(4 * num_tokens) % num_tokens)
    mask = torch.zeros(3, 4 * num_tokens, 40).masked_fill(torch.arange(40) >= seen.clamp(min=1)[..., None], -math.inf)
    out, columns = ATTENTION.create(name).attend_columns(
        query, key, value, num_tokens=num_tokens, mask=mask[:, None], scale=0.2
    )

    weight = (query.double() @ key.double().mT * 0.2 + mask[:, None]).softmax(dim=-1)
    assert (out.double() - weight @ value.double()).abs().max() < 1e-5
    assert (columns.double() - weight.view(3, 2, 4, num_tokens, 40).mean(dim=2)).abs().max() < 1e-6


@BACKENDS
@pytest.mark.parametrize("num_past", [0, 64])
def test_column_sums_of_a_prompt_chunk(name: str, num_past: int) -> None:
    query, key, _ = draw(1, 6, 2, 40, num_past + 40, 64)
    hidden = torch.arange(num_past + 40) > torch.arange(num_past, num_past + 40)[:, None]
    mask = torch.zeros(40, num_past + 40).masked_fill(hidden, -math.inf)[None, None]
    sums = ATTENTION.create(name).column_sums(
        query, key, mask=mask if num_past else None, is_causal=not num_past, scale=0.2, decay=0.9
    )

    score = query.double() @ key.double().repeat_interleave(3, 1).mT * 0.2 + mask
    share = 0.9 ** torch.arange(39, -1, -1, dtype=torch.float64)
    expected = (share @ score.softmax(dim=-1)).view(1, 2, 3, -1).mean(dim=2)
    assert (sums.double() - expected).abs().max() < 1e-4


@pytest.mark.parametrize("is_causal", [True, False])
def test_tiles_change_nothing_but_the_memory(monkeypatch: pytest.MonkeyPatch, is_causal: bool) -> None:
    query, key, value = draw(1, 4, 2, 50, 50, 16)
    mask = None if is_causal else torch.zeros(1, 1, 50, 50).masked_fill(torch.rand(50, 50) < 0.3, -math.inf)
    backend = ATTENTION.create("eager")
    whole = backend.attend(query, key, value, mask=mask, is_causal=is_causal, scale=0.2)
    sums = weights_module.column_sums(query, key, mask=mask, is_causal=is_causal, scale=0.2)
    monkeypatch.setattr(weights_module, "_TILE_SCORES", 4 * 50 * 7)

    assert [tile.stop - tile.start for tile in weights_module.query_tiles(query, 50)] == [7] * 7 + [1]
    tiled = backend.attend(query, key, value, mask=mask, is_causal=is_causal, scale=0.2)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-6)
    tiled_sums = weights_module.column_sums(query, key, mask=mask, is_causal=is_causal, scale=0.2)
    torch.testing.assert_close(tiled_sums, sums, rtol=0, atol=1e-5)


def test_column_sums_of_a_prompt_add_up_to_the_number_of_queries() -> None:
    query, key, _ = draw(1, 6, 2, 40, 40, 16)

    sums = weights_module.column_sums(query, key, mask=None, is_causal=True, scale=0.2)

    torch.testing.assert_close(sums.sum(dim=-1), torch.full((1, 2), 40.0))

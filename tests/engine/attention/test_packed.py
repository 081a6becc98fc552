"""A whole step in one call: against fp64, cut in pieces by a rule, and the same bits as each sequence alone."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from codesign.engine.attention import packed
from codesign.engine.engine import Engine
from codesign.engine.kernels import kv_attention
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.kv_attention import KVAttention, Queries, row_starts
from codesign.engine.step import StepPlan
from codesign.spec.request import Request
from tests.engine.driving import generate, request, tiny_engine

NUM_KV_HEADS, CAPACITY, DIM, SCALE = 2, 700, 64, 0.15
FOUND = kv_attention.load()


def kernel() -> KVAttention:
    if isinstance(FOUND, Missing) or isinstance(FOUND.bf16, Missing):
        pytest.skip("no bf16 attention kernel here")
    return FOUND


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 1500)), min_size=1, max_size=12))
def test_pieces_are_every_token_once_in_order_and_few_enough_at_once(sequences: list[tuple[int, int]]) -> None:
    calls = packed.cut(sequences)

    found: list[list[tuple[int, int]]] = [[] for _ in sequences]
    start = 0
    for call in calls:
        assert call.tokens == slice(start, start := start + sum(call.num_tokens))
        assert max(call.num_tokens) <= 32
        assert sum(call.num_tokens) <= 512
        assert call.num_rows == max(past + own for past, own in zip(call.past, call.num_tokens, strict=True))
        for index, past, own in zip(call.of, call.past, call.num_tokens, strict=True):
            found[index].append((past, own))
    for (num_past, num_tokens), own in zip(sequences, found, strict=True):
        edges = list(itertools.accumulate([count for _, count in own], initial=num_past))
        assert [past for past, _ in own] == edges[:-1]
        assert edges[-1] == num_past + num_tokens
        assert max(count for _, count in own) - min(count for _, count in own) <= 1


def test_a_step_without_tokens_is_no_call() -> None:
    assert packed.cut([]) == ()


def attend(query: Tensor, key: Tensor, value: Tensor, sequences: list[tuple[int, int]], slots: list[int]) -> Tensor:
    """[N, H, D] over rows [S, H_kv, C, D]."""
    calls, found = packed.cut(sequences), kernel()

    def run(queries: Queries, number: int) -> None:
        starts = [(slots[index] * NUM_KV_HEADS + head) * CAPACITY for index in calls[number].of for head in (0, 1)]
        found.native(queries, key, value, row_starts(starts))

    return packed.attend(query, calls, run, num_kv_heads=NUM_KV_HEADS, scale=SCALE)


def rows_and_queries(num_slots: int, num_tokens: int, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    key, value = torch.randn(2, num_slots, NUM_KV_HEADS, CAPACITY, DIM).bfloat16()
    return torch.randn(num_tokens, NUM_KV_HEADS * num_groups, DIM).bfloat16(), key, value


MIXED = [(0, 1), (31, 1), (600, 3), (0, 65), (40, 200), (5, 1), (0, 400)]  # rows before, tokens


@pytest.mark.parametrize("num_groups", [1, 7])
def test_outputs_and_prompts_of_one_step_attend_as_in_fp64(num_groups: int) -> None:
    slots = [6, 0, 3, 2, 5, 1, 4]
    query, key, value = rows_and_queries(7, sum(own for _, own in MIXED), num_groups)
    found, start = attend(query, key, value, MIXED, slots), 0
    for (num_past, num_tokens), slot in zip(MIXED, slots, strict=True):
        own = slice(start, start := start + num_tokens)
        rows = [part[slot].double().repeat_interleave(num_groups, dim=0) for part in (key, value)]
        score = query[own].double().transpose(0, 1) @ rows[0].mT * SCALE
        hidden = torch.arange(CAPACITY) > num_past + torch.arange(num_tokens)[:, None]
        expected = (score.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ rows[1]).transpose(0, 1)

        torch.testing.assert_close(found[own].double(), expected, rtol=0, atol=2e-2)


def test_a_sequence_gets_the_same_bits_alone_and_token_by_token() -> None:
    slots = [6, 0, 3, 2, 5, 1, 4]
    query, key, value = rows_and_queries(7, sum(own for _, own in MIXED), 7)
    together, start = attend(query, key, value, MIXED, slots), 0
    for (num_past, num_tokens), slot in zip(MIXED, slots, strict=True):
        own = slice(start, start := start + num_tokens)
        alone = attend(query[own], key, value, [(num_past, num_tokens)], [slot])
        one_by_one = attend(query[own], key, value, [(num_past + i, 1) for i in range(num_tokens)], [slot] * num_tokens)

        assert torch.equal(together[own], alone)
        assert torch.equal(together[own], one_by_one)


HEADS = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 4}
LAYOUTS = {"dense": {}, "paged": {"layout": "paged"}}


def engine(**config: object) -> Engine:
    return tiny_engine(shape=HEADS, dtype="bf16", **config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_that_only_frees_is_run(layout: str) -> None:
    built = engine(kv=LAYOUTS[layout])
    generate(built, request("a", 40, 3))

    logits = built.parts.runner.run(StepPlan(frees=(0,)))

    assert logits.shape[0] == 0


def requests() -> list[Request]:
    return [request(f"r{i}", 3 + 29 * i % 120, 5 + 7 * i % 30, logprobs=3) for i in range(9)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_requests_get_the_same_tokens_in_any_company(layout: str) -> None:
    """Products and attention of a row depend on that row alone, so this needs no margin between the likeliest."""
    kernel()
    alone: dict[str, list[int]] = {}
    for own in requests():
        alone |= generate(engine(max_batch_size=1), own)

    for max_step_tokens in (8, 40, 300):
        together = engine(max_batch_size=4, max_step_tokens=max_step_tokens, kv=LAYOUTS[layout])
        assert "attend_native_bf16" in str(together.facts()) or "attend_paged_bf16" in str(together.facts())
        assert generate(together, *requests()) == alone

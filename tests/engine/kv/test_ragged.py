"""Heads with different numbers of rows: the same memory, each head its own rows, none lost or shared."""

from typing import Any

import pytest
import torch
from random_plans import random_plans
from replay import MAX_MODEL_LEN, MAX_QUERY_LEN, NUM_KV_HEADS, NUM_SLOTS, draw, make_attention

from codesign.engine.attention.layer import Attention
from codesign.engine.attention.rope import Rope
from codesign.engine.batch import Batch
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.kv_attention import KVAttention
from codesign.engine.kv.policies.ada_kv import AdaKV
from codesign.engine.kv.policies.snapkv import SnapKV
from codesign.engine.kv.policy import Prompt
from codesign.engine.kv.ragged import RaggedGroup
from codesign.engine.step import StepPlan, decode_plan
from codesign.registry import ATTENTION, KV_CODECS

BUDGET = 12
POLICY = AdaKV(kv_budget=BUDGET, window_tokens=4, num_sink_tokens=1, kernel_size=1, floor_fraction=0.0)


def run(attention: Attention, plan: StepPlan, generator: torch.Generator) -> torch.Tensor:
    """[L, N, H, D]"""
    batch = Batch.of(plan, torch.device("cpu"))
    attention.begin(batch)
    layers = range(len(attention.kv_budget_tokens))
    out = torch.stack([attention(layer, *draw(generator, len(plan.token_ids)), batch) for layer in layers])
    attention.end(batch)
    return out


def prompt_plan(length: int, *, frees: tuple[int, ...] = ()) -> StepPlan:
    return StepPlan(
        frees=frees,
        slots=(0,),
        query_lens=(length,),
        token_ids=(0,) * length,
        positions=tuple(range(length)),
        is_prompt=(True,),
        is_prompt_end=(True,),
    )


def group_of(attention: Attention) -> RaggedGroup:
    (group,) = attention.store.groups
    assert isinstance(group, RaggedGroup)
    return group


def test_allocated_bytes_are_those_of_equal_heads_and_follow_the_budget() -> None:
    ragged, equal = make_attention(POLICY), make_attention(SnapKV(kv_budget=BUDGET, window_tokens=4, num_sink_tokens=1))
    num_rows = ragged.store.position.shape[0]

    assert ragged.kv_bytes == equal.kv_bytes
    assert num_rows == len(ragged.kv_budget_tokens) * NUM_SLOTS * NUM_KV_HEADS * (BUDGET + MAX_QUERY_LEN)


def test_heads_really_differ_and_their_rows_lie_side_by_side_inside_the_slot() -> None:
    attention, generator = make_attention(POLICY), torch.Generator().manual_seed(0)
    run(attention, prompt_plan(40), generator)
    group = group_of(attention)
    places = [group.heads(index, 0, 40) for index in range(len(group.layers))]

    assert any(len({count for _, count in own}) > 1 for own in places)
    for own in places:
        assert sum(count for _, count in own) == NUM_KV_HEADS * BUDGET
        ends = [first + count + MAX_QUERY_LEN for first, count in own]
        assert [first for first, _ in own] == [0, *ends[:-1]]
        assert ends[-1] == NUM_KV_HEADS * (BUDGET + MAX_QUERY_LEN)


def test_row_counts_stay_what_the_prompt_made_them_and_the_window_moves_on() -> None:
    attention, generator = make_attention(POLICY), torch.Generator().manual_seed(0)
    run(attention, prompt_plan(36), generator)
    group = group_of(attention)
    before = [group.heads(index, 0, 36) for index in range(len(group.layers))]
    selected = [group.position[index, 0].view(-1).tolist() for index in range(len(group.layers))]
    for step in range(9):
        run(attention, decode_plan([0], [0], [36 + step], commits=[(0, 1)] if step else ()), generator)
    attention.store.commit([(0, 1)])

    for index, places in enumerate(before):
        assert group.heads(index, 0, 45) == places
        position = group.position[index, 0].view(-1).tolist()
        for first, count in places:
            assert position[first : first + count - 4] == selected[index][first : first + count - 4]
            assert sorted(position[first + count - 4 : first + count]) == [41, 42, 43, 44]


def test_a_short_prompt_after_a_ragged_one_finds_equal_heads_again() -> None:
    used, fresh = make_attention(POLICY), make_attention(POLICY)
    run(used, prompt_plan(40), torch.Generator().manual_seed(0))
    outs = []
    for attention, frees in ((used, (0,)), (fresh, ())):
        generator = torch.Generator().manual_seed(1)
        run(attention, prompt_plan(5, frees=frees), generator)
        outs.append(run(attention, decode_plan([0], [0], [5]), generator))
    group = group_of(used)

    assert not any(group.is_ragged(index, 0) for index in range(len(group.layers)))
    assert torch.equal(group.row_start, group_of(fresh).row_start)
    assert torch.equal(*outs)


@pytest.mark.parametrize("seed", [0, 1])
def test_one_call_of_the_kernel_equals_a_call_per_slot_and_head(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, each = make_attention(POLICY), make_attention(POLICY)
    if isinstance(at_once._attend_slots.native, Missing):
        pytest.skip(at_once._attend_slots.native.reason)
    each._attend_slots.native = Missing("for comparison")
    num_calls, call = 0, KVAttention.native

    def counted(*args: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        call(*args)

    monkeypatch.setattr(KVAttention, "native", counted)
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    for plan in random_plans(
        seed, num_steps=40, num_slots=NUM_SLOTS, max_model_len=MAX_MODEL_LEN, max_query_len=MAX_QUERY_LEN
    ):
        outs = [run(attention, plan, own) for attention, own in zip((at_once, each), generators, strict=True)]
        torch.testing.assert_close(*outs, rtol=0, atol=2e-6)

    assert num_calls > 10


def test_a_head_of_more_rows_than_its_layers_budget_is_read_whole() -> None:
    """The kernel cuts the rows of a head into pieces of 1024, and must be told of the longest head for that."""
    num_tokens, counts, budget = 2600, (2100, 102), 1101
    attention = Attention(
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        scale=0.125,
        rope=Rope(inv_freq=torch.ones(32)),
        policy=AdaKV(kv_budget=budget, window_tokens=4),
        codec=KV_CODECS.create("native"),
        backend=ATTENTION.create("sdpa"),
        num_slots=2,
        max_model_len=num_tokens + 8,
        max_query_len=1,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(0)
    group, native = group_of(attention), attention._attend_slots.native
    for slot in range(2):
        key, value = torch.randn(2, 2, num_tokens, 64, generator=generator).bfloat16()
        prompt = Prompt(key=key, value=value, window_query=None, column_sums=None, scale=0.125)
        kept = [head * num_tokens + num_tokens - count + torch.arange(count) for head, count in enumerate(counts)]
        group.admit(0, slot, prompt, torch.cat(kept))
        attention.store.append(slot, num_tokens)
    batch = Batch.of(decode_plan([0, 1], [0, 0], [num_tokens] * 2), torch.device("cpu"))
    q, k, v = torch.randn(2, 8, 64, generator=generator).bfloat16().split((4, 2, 2), dim=1)
    attention.begin(batch)

    outs = []
    for attention._attend_slots.native in (native, Missing("for comparison")):
        outs.append(attention(0, q, k, v, batch))

    torch.testing.assert_close(*outs, rtol=0, atol=2e-2)


@pytest.mark.parametrize("seed", range(3))
def test_layer_never_holds_more_rows_than_its_budget(seed: int) -> None:
    attention, generator = make_attention(POLICY), torch.Generator().manual_seed(seed)
    group, store = group_of(attention), attention.store
    plans = random_plans(
        seed, num_steps=40, num_slots=NUM_SLOTS, max_model_len=MAX_MODEL_LEN, max_query_len=MAX_QUERY_LEN
    )
    for plan in plans:
        run(attention, plan, generator)
        for slot in range(NUM_SLOTS):
            num_tokens = store.num_tokens[slot]
            if (0, slot) not in attention.staged_prompts:
                for index in range(len(group.layers)):
                    rows = sum(count for _, count in group.heads(index, slot, num_tokens))
                    assert rows == NUM_KV_HEADS * min(num_tokens, BUDGET)

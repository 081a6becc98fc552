"""The paged cache by itself: which plans it refuses, what it counts, and that output tokens copy nothing."""

import dataclasses
from typing import Any

import pytest
import torch
from replay import NUM_KV_HEADS, NUM_LAYERS, NUM_SLOTS, draw
from test_paged_contract import MAX_MODEL_LEN, NUM_BLOCKS, ROW_CODECS, paged

from codesign.engine.attention import blocks
from codesign.engine.attention.paged import PagedAttention
from codesign.engine.batch import Batch
from codesign.engine.kernels import kv_attention
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kv.paged import PagedStore
from codesign.engine.step import StepPlan, decode_plan

CPU = torch.device("cpu")
needs_kernel = pytest.mark.skipif(isinstance(kv_attention.load(), Missing), reason=str(kv_attention.load()))


def chunk(
    slot: int, first: int, length: int, *, blocks: tuple[int, ...] = (), is_end: bool = True, **rest: Any
) -> StepPlan:
    return StepPlan(
        slots=(slot,),
        query_lens=(length,),
        token_ids=(0,) * length,
        positions=tuple(range(first, first + length)),
        is_prompt=(True,),
        is_prompt_end=(is_end,),
        blocks=(blocks,),
        **rest,
    )


def decode(slot: int, position: int, *, blocks: tuple[int, ...] = (), **rest: Any) -> StepPlan:
    return dataclasses.replace(decode_plan([slot], [0], [position], **rest), blocks=(blocks,))


def run(attention: PagedAttention, plan: StepPlan, seed: int = 0) -> torch.Tensor:
    """[L, N, H, D]"""
    batch, generator = Batch.of(plan, CPU), torch.Generator().manual_seed(seed)
    attention.begin(batch)
    outs = [
        attention(layer, *draw(generator, len(plan.token_ids)), batch)
        for layer in range(NUM_LAYERS if plan.slots else 0)
    ]
    attention.end(batch)
    return torch.stack(outs) if outs else torch.empty(0)


def check_that_nothing_is_copied(codec: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences of unlike lengths in slots out of order, each with drafts, beside the plain way that copies."""
    expected = verified(paged(codec, "eager"))
    monkeypatch.delattr(PagedStore, "read")

    torch.testing.assert_close(verified(paged(codec, backend)), expected, rtol=0, atol=5e-6)


def verified(attention: PagedAttention) -> torch.Tensor:
    run(attention, chunk(2, 0, 70, blocks=(7, 1, 4)), seed=1)
    run(attention, chunk(0, 0, 31, blocks=(3, 9)), seed=2)
    run(attention, chunk(3, 0, 32, blocks=(0, 11)), seed=3)
    drafts = StepPlan(
        slots=(3, 0, 2),
        query_lens=(3, 3, 3),
        token_ids=(0,) * 9,
        positions=(32, 33, 34, 31, 32, 33, 70, 71, 72),
        is_prompt=(False,) * 3,
        is_prompt_end=(False,) * 3,
    )
    return run(attention, drafts, seed=4)


@needs_kernel
@pytest.mark.parametrize("codec", ROW_CODECS)
def test_output_tokens_are_read_where_they_lie(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_nothing_is_copied(codec, "sdpa", monkeypatch)


@needs_kernel
def test_the_kernel_is_named_and_so_is_what_stands_in_for_it() -> None:
    assert paged().kernel == "codesign::attend_paged, prompts aten::scaled_dot_product_attention"
    assert paged("int8").kernel == "codesign::attend_paged_int8, prompts aten::scaled_dot_product_attention"
    assert paged(backend="eager").kernel.endswith(", in fp32 over rows copied out of blocks (plain)")


def test_a_few_sequences_are_copied_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = verified(paged(backend="eager"))
    monkeypatch.setattr(blocks, "MAX_DECODED", {"cpu": 1})
    sizes: list[int] = []
    read = PagedStore.read

    def noted(store: PagedStore, layer: int, table: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(table))
        return read(store, layer, table, num_rows)

    monkeypatch.setattr(PagedStore, "read", noted)

    assert torch.equal(verified(paged(backend="eager")), expected)
    assert set(sizes) == {1}


TWO_BLOCKS = chunk(0, 0, 64, blocks=(5, 2))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (chunk(1, 0, 3, blocks=(5,)), "slot 1: block 5 is in use"),
        (chunk(1, 0, 40, blocks=(6, 6)), "slot 1: block 6 twice"),
        (chunk(1, 0, 3, blocks=(NUM_BLOCKS,)), f"slot 1: block {NUM_BLOCKS} of {NUM_BLOCKS}"),
        (chunk(1, 0, 3, blocks=(-1,)), "slot 1: block -1 of"),
        (chunk(1, 0, 3, blocks=(6, 7, 8, 9, 10, 11)), "slot 1: a table of more than 5 blocks"),
        (chunk(1, 0, 33, blocks=(6,)), "slot 1: 33 tokens, and a table of 1 blocks of 32"),
        (decode(0, 64), "slot 0: 65 tokens, and a table of 2 blocks"),
        (chunk(1, 0, 3), "slot 1: 3 tokens, and a table of 0 blocks"),
        (chunk(1, 31, 3, blocks=(5, 6), num_cached=(31,)), "31 cached tokens in 2 blocks after 0; they must be whole"),
        (chunk(1, 64, 3, blocks=(5,), num_cached=(64,)), "64 cached tokens in 1 blocks after 0"),
        (chunk(1, -32, 3, blocks=(5,), num_cached=(-32,)), "-32 cached tokens"),
        (chunk(0, 96, 3, blocks=(6,), num_cached=(32,)), "32 cached tokens in 1 blocks after 2"),
        (chunk(1, 32, 3, blocks=(6, 7), num_cached=(32,)), "block 6 is given as cached, and 0 of its 32 rows"),
        (chunk(1, 0, 3, blocks=(5, 7), num_cached=(32,)), "positions 0 to 2, 3 of them, after 32 tokens"),
        (StepPlan(truncates=((0, 65),)), "cannot keep 65 of 64 tokens"),
        (decode(0, 64, blocks=(6,), commits=[(0, 1)]), "cannot commit 1 of 0 pending rows"),
    ],
)
def test_a_plan_with_wrong_blocks_is_refused(plan: StepPlan, said: str) -> None:
    attention = paged()
    run(attention, TWO_BLOCKS)

    with pytest.raises(ValueError, match=said):
        attention.begin(Batch.of(plan, CPU))


def test_blocks_whose_rows_are_not_all_written_are_not_cached() -> None:
    """Neither those of a prompt that is still coming in, nor those of drafts that were rejected, nor of tokens taken
    back."""
    attention = paged()
    run(attention, chunk(0, 0, 31, blocks=(5,)))
    with pytest.raises(ValueError, match="31 of its 32 rows"):
        attention.begin(Batch.of(chunk(1, 32, 1, blocks=(5, 6), num_cached=(32,)), CPU))
    run(attention, decode(0, 31))
    with pytest.raises(ValueError, match="31 of its 32 rows"):
        attention.begin(Batch.of(chunk(1, 32, 1, blocks=(5, 6), num_cached=(32,), commits=((0, 0),)), CPU))
    run(attention, decode(0, 31))
    with pytest.raises(ValueError, match="20 of its 32 rows"):
        plan = chunk(1, 32, 1, blocks=(5, 6), num_cached=(32,), commits=((0, 1),), truncates=((0, 20),))
        attention.begin(Batch.of(plan, CPU))


def test_a_block_that_is_given_as_empty_holds_nothing_any_more() -> None:
    attention = paged()
    run(attention, TWO_BLOCKS)
    run(attention, chunk(1, 0, 1, blocks=(5,), frees=(0,)))

    with pytest.raises(ValueError, match="block 5 is given as cached, and 1 of its 32 rows"):
        attention.begin(Batch.of(chunk(2, 32, 3, blocks=(5, 6), num_cached=(32,)), CPU))


def test_tokens_in_shared_blocks_are_not_taken_back() -> None:
    attention = paged()
    run(attention, TWO_BLOCKS)
    run(attention, chunk(1, 32, 3, blocks=(5, 6), num_cached=(32,)))
    for slot in (0, 1):
        with pytest.raises(ValueError, match="others share what comes after them"):
            attention.begin(Batch.of(StepPlan(truncates=((slot, 31),)), CPU))
    attention.begin(Batch.of(StepPlan(truncates=((0, 32), (1, 32))), CPU))

    assert attention.store.num_tokens[:2] == [32, 32]


def test_what_was_written_first_is_read_by_who_shares_it_after_its_writer_is_gone() -> None:
    alone, shared = paged(), paged()
    run(alone, chunk(0, 0, 32, blocks=(1,)), seed=1)
    run(shared, chunk(0, 0, 32, blocks=(8,)), seed=1)
    expected = run(alone, chunk(0, 32, 5, blocks=(2,)), seed=2)
    out = run(shared, chunk(3, 32, 5, blocks=(8, 0), num_cached=(32,), frees=(0,)), seed=2)

    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_tokens_taken_back_are_as_if_they_had_never_been() -> None:
    ahead, straight = paged(), paged()
    for attention in (ahead, straight):
        run(attention, chunk(0, 0, 30, blocks=(4, 1)))
    for position in range(30, 34):
        run(ahead, decode(0, position, commits=[(0, 1)] if position > 30 else ()), seed=1)
    again = decode(0, 31, commits=[(0, 1)])
    taken_back = run(ahead, dataclasses.replace(again, truncates=((0, 31),)), seed=2)
    run(straight, decode(0, 30), seed=1)

    assert torch.equal(taken_back, run(straight, again, seed=2))


@pytest.mark.parametrize("codec", [name for name in ROW_CODECS if name != "native"])
def test_rounded_rows_are_never_those_of_another_prompt(codec: str) -> None:
    attention = paged(codec)
    run(attention, TWO_BLOCKS)

    with pytest.raises(ValueError, match="rounded cannot stand in"):
        attention.begin(Batch.of(chunk(1, 32, 3, blocks=(5, 6), num_cached=(32,)), CPU))


def test_use_counts_rows_blocks_and_what_sharing_saves() -> None:
    attention = paged()
    assert attention.kv_use.fragmentation == 0 and attention.kv_use.blocks_used == 0
    run(attention, chunk(0, 0, 70, blocks=(5, 2, 7)))
    run(attention, chunk(1, 64, 1, blocks=(5, 2, 3), num_cached=(64,)))
    run(attention, decode(1, 65))
    use = attention.kv_use

    assert (use.num_blocks, use.blocks_used, use.rows_allocated) == (NUM_BLOCKS, 4, 128)
    assert use.rows_used == 64 + 6 + 2
    assert use.fragmentation == 1 - 72 / 128
    assert use.shared_bytes == 2 * attention.block_bytes
    run(attention, StepPlan(frees=(0,)))
    assert (attention.kv_use.blocks_used, attention.kv_use.shared_bytes) == (3, 0)
    run(attention, StepPlan(frees=(1,)))
    assert attention.kv_use == dataclasses.replace(use, blocks_used=0, rows_allocated=0, rows_used=0, shared_bytes=0)


@pytest.mark.parametrize(("codec", "row_bytes"), [("native", 8 * 4), ("int8", 8 + 2), ("fp8", 8 + 2)])
def test_bytes_are_those_of_blocks_and_table(codec: str, row_bytes: int) -> None:
    attention = paged(codec)
    table_bytes = NUM_SLOTS * 5 * 4

    assert attention.block_bytes == 2 * NUM_LAYERS * NUM_KV_HEADS * 32 * row_bytes
    assert attention.kv_bytes == NUM_BLOCKS * attention.block_bytes + table_bytes
    assert attention.kv_place == {"cpu memory": attention.kv_bytes}
    assert attention.kv_budget_tokens == (MAX_MODEL_LEN,) * NUM_LAYERS


def test_a_prompt_that_is_freed_halfway_leaves_nothing_staged() -> None:
    attention = paged("int8")
    run(attention, chunk(0, 0, 30, blocks=(5,), is_end=False))
    assert attention.staging_bytes > 0
    run(attention, chunk(1, 0, 5, blocks=(5,), frees=(0,)))

    assert attention.staging_bytes == 0

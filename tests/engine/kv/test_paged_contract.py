"""The paged cache replays random traffic beside the slow oracle and beside the dense cache, and agrees with both."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from block_plans import in_blocks, sharing_plans
from oracle import Held, Oracle, Read, Row
from random_plans import random_plans
from replay import (
    BOUNDS,
    HEAD_DIM,
    MAX_QUERY_LEN,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    NUM_SLOTS,
    SCALE,
    TOLERANCE,
    draw,
    make_oracle,
    rope,
)

from codesign.engine.attention.layer import Attention
from codesign.engine.attention.paged import PagedAttention
from codesign.engine.batch import Batch
from codesign.engine.kernels.pieces import Pieces, choose
from codesign.engine.kernels.plain import PLAIN, Plain
from codesign.engine.kv.paged import PagedStore
from codesign.engine.kv.policies.full import Full
from codesign.engine.kv.tables import num_blocks_of
from codesign.engine.step import BLOCK_TOKENS, StepPlan
from codesign.registry import ATTENTION, KV_CODECS
from tests.engine.usable_backends import USABLE_BACKENDS

CPU = torch.device("cpu")
MAX_MODEL_LEN = 150  # five blocks, the last of them never whole
NUM_BLOCKS = NUM_SLOTS * num_blocks_of(MAX_MODEL_LEN)
TRAFFIC: dict[str, Any] = {
    "num_slots": NUM_SLOTS,
    "max_model_len": MAX_MODEL_LEN,
    "max_query_len": MAX_QUERY_LEN,
}
ROW_CODECS = [name for name in KV_CODECS.names() if not KV_CODECS.create(name).group_size]


def arguments(codec: str, backend: str) -> dict[str, Any]:
    return {
        "num_layers": NUM_LAYERS,
        "num_heads": NUM_HEADS,
        "num_kv_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "scale": SCALE,
        "rope": rope(),
        "policy": Full(),
        "codec": KV_CODECS.create(codec),
        "backend": ATTENTION.create(backend),
        "num_slots": NUM_SLOTS,
        "max_model_len": MAX_MODEL_LEN,
        "max_query_len": MAX_QUERY_LEN,
        "dtype": torch.float32,
        "device": CPU,
    }


def paged(codec: str = "native", backend: str = "sdpa", pieces: Pieces = PLAIN) -> PagedAttention:
    return PagedAttention(**arguments(codec, backend), num_blocks=NUM_BLOCKS, pieces=pieces)


def replay(attention: PagedAttention, plans: Iterable[StepPlan], *, seed: int = 0) -> int:
    """Beside the oracle, which is given copies of rows where the plan gives blocks that hold them.

    Returns how many tokens came from blocks that another sequence had written.
    """
    oracle, generator = make_oracle(Full(), "full", max_model_len=MAX_MODEL_LEN), torch.Generator().manual_seed(seed)
    held: dict[tuple[int, int, int], list[Row]] = {}  # (block, layer, KV head) -> its rows
    num_cached = 0
    for plan in plans:
        batch = Batch.of(plan, CPU)
        oracle.begin(StepPlan(commits=plan.commits))
        oracle.begin(StepPlan(frees=plan.frees))
        attention.begin(batch)
        for slot, blocks, own in zip(plan.slots, plan.blocks, plan.num_cached, strict=bool(plan.num_cached)):
            if own:
                adopt_blocks(oracle, held, slot, blocks[: own // BLOCK_TOKENS])
                num_cached += own
        for layer in range(NUM_LAYERS):
            q, k, v = draw(generator, len(plan.token_ids))
            out = attention(layer, q, k, v, batch)
            read = None if attention.codec.is_native else reader(attention, oracle, plan, layer)
            expected = oracle.step(plan, layer, q.double().numpy(), k.double().numpy(), v.double().numpy(), read)
            assert np.abs(out.numpy() - expected).max(initial=0) < TOLERANCE
        attention.end(batch)
        note_blocks(attention, oracle, held)
    return num_cached


def adopt_blocks(
    oracle: Oracle, held: dict[tuple[int, int, int], list[Row]], slot: int, blocks: tuple[int, ...]
) -> None:
    for layer in range(NUM_LAYERS):
        for kv_head in range(NUM_KV_HEADS):
            rows = [copy.copy(row) for block in blocks for row in held[block, layer, kv_head]]
            oracle.heads[layer][slot][kv_head].rows = {row.position: row for row in rows}


def note_blocks(attention: PagedAttention, oracle: Oracle, held: dict[tuple[int, int, int], list[Row]]) -> None:
    store = attention.store
    for slot, table in enumerate(store.tables.blocks):
        for layer in range(NUM_LAYERS):
            for kv_head in range(NUM_KV_HEADS):
                rows = oracle.heads[layer][slot][kv_head].rows
                assert sorted(rows) == list(range(store.num_tokens[slot]))
                for index in range(store.num_tokens[slot] // BLOCK_TOKENS):
                    positions = range(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
                    held[table[index], layer, kv_head] = [rows[position] for position in positions]


def reader(attention: PagedAttention, oracle: Oracle, plan: StepPlan, layer: int) -> Read:
    """What the blocks of output tokens hold in this layer, once its rows have been written."""
    starts, store = plan.query_starts, attention.store
    bound = BOUNDS[type(attention.codec).__module__.rpartition(".")[2]]

    def read(index: int, kv_head: int) -> Held:
        count = plan.positions[starts[index]] + plan.query_lens[index]
        pair = store.read(layer, store.table_of([plan.slots[index]], count), count)
        bits = torch.stack(pair, dim=-2)[0, kv_head].double().numpy()
        position = np.arange(count)
        return Held(position, bits, oracle.rotate(bits[:, 0], -position), np.full(count, bound), np.full(count, True))

    return read


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("backend", USABLE_BACKENDS)
def test_random_traffic_with_shared_prefixes_agrees_with_the_oracle(backend: str, seed: int) -> None:
    plans = sharing_plans(seed, num_steps=120, num_blocks=NUM_BLOCKS, **TRAFFIC)

    assert replay(paged(backend=backend), plans, seed=seed) > 10 * BLOCK_TOKENS


def test_fused_pieces_write_rows_into_blocks() -> None:
    pieces = choose(True, dtype=torch.float32, device=CPU)
    if isinstance(pieces, Plain):
        pytest.skip(pieces.kernel)
    plans = sharing_plans(7, num_steps=60, num_blocks=NUM_BLOCKS, **TRAFFIC)

    assert replay(paged(pieces=pieces), plans, seed=7) > 0


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("backend", USABLE_BACKENDS)
@pytest.mark.parametrize("codec", [name for name in ROW_CODECS if name != "native"])
def test_encoded_rows_in_blocks_agree_with_the_oracle(codec: str, backend: str, seed: int) -> None:
    plans = random_plans(seed, num_steps=60, **TRAFFIC)

    replay(paged(codec, backend), in_blocks(plans, num_blocks=NUM_BLOCKS, num_slots=NUM_SLOTS, seed=seed), seed=seed)


@pytest.mark.parametrize("backend", USABLE_BACKENDS)
@pytest.mark.parametrize("codec", ROW_CODECS)
def test_random_traffic_gives_what_the_dense_cache_gives(codec: str, backend: str) -> None:
    """But for rounding: calls are cut otherwise, and native rows are read by another kernel."""
    dense, attention = Attention(**arguments(codec, backend)), paged(codec, backend)
    plans = list(random_plans(3, num_steps=60, **TRAFFIC))
    generator = torch.Generator().manual_seed(3)
    for plan, own in zip(plans, in_blocks(plans, num_blocks=NUM_BLOCKS, num_slots=NUM_SLOTS, seed=3), strict=True):
        batch, own_batch = Batch.of(plan, CPU), Batch.of(own, CPU)
        dense.begin(batch)
        attention.begin(own_batch)
        for layer in range(NUM_LAYERS):
            q, k, v = draw(generator, len(plan.token_ids))
            expected = dense(layer, q, k, v, batch)
            torch.testing.assert_close(attention(layer, q, k, v, own_batch), expected, rtol=0, atol=5e-6)
        dense.end(batch)
        attention.end(own_batch)

    assert attention.store.num_tokens == dense.store.num_tokens
    assert attention.staging_bytes == dense.staging_bytes


def heads_over_each_other(store: PagedStore) -> None:
    store._head.zero_()


def blocks_in_another_order(store: PagedStore) -> None:
    own = store.table_of
    store.table_of = lambda slots, num_rows: own(slots, num_rows).roll(1, 2)  # type: ignore[method-assign]


def blocks_of_another_slot(store: PagedStore) -> None:
    own = store.table_of
    store.table_of = lambda slots, num_rows: own(slots[::-1], num_rows)  # type: ignore[method-assign]


@pytest.mark.parametrize("bug", [heads_over_each_other, blocks_in_another_order, blocks_of_another_slot])
@pytest.mark.parametrize("backend", USABLE_BACKENDS)
def test_the_oracle_sees_rows_that_are_not_where_they_belong(backend: str, bug: Callable[[PagedStore], None]) -> None:
    attention = paged(backend=backend)
    bug(attention.store)
    plans = sharing_plans(0, num_steps=30, num_blocks=NUM_BLOCKS, **TRAFFIC)

    with pytest.raises(AssertionError):
        replay(attention, plans)

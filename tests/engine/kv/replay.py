"""Replays plans through the real Attention and the oracle side by side and compares outputs, rows and scores."""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from oracle import Array, Held, Oracle, Read

from codesign.engine.attention.layer import Attention
from codesign.engine.attention.rope import Rope
from codesign.engine.batch import Batch
from codesign.engine.kv.policy import KVPolicy
from codesign.engine.step import StepPlan
from codesign.registry import ATTENTION, KV_CODECS

CPU = torch.device("cpu")
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_SLOTS = 3, 4, 2, 8, 4
MAX_MODEL_LEN, MAX_QUERY_LEN = 48, 3
TOLERANCE = 2e-5  # fp32 against float64
# Knobs that make small traffic fill groups; at full rank nothing but rounding is lost, wherever rows stand.
CODEC_KNOBS: dict[str, dict[str, Any]] = {
    "int4": {"group_size": 8, "residual_tokens": 3},
    "low_rank": {"group_size": 8, "residual_tokens": 3, "rank": HEAD_DIM, "value_rank": HEAD_DIM},
}
# Error that a codec may make of a row, as a share of the row's norm: int8 half a step of max / 127 in each of 8 values,
# fp8 half of the last of three mantissa bits, int4 half a step of a range that other rows stretch.
BOUNDS = {"int8": 0.505 * HEAD_DIM**0.5 / 127, "fp8": 2**-4 + 2**-8, "int4": 0.5, "low_rank": 1e-5}
SCALE = HEAD_DIM**-0.5 * 2  # sharper than usual: decisions far from ties


def rope(head_dim: int = HEAD_DIM) -> Rope:
    return Rope(1 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim))


def make_attention(
    policy: KVPolicy,
    *,
    codec: str = "native",
    backend: str = "sdpa",
    cls: type[Attention] = Attention,
) -> Attention:
    return cls(
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        scale=SCALE,
        rope=rope(),
        policy=policy,
        codec=KV_CODECS.create(codec, **CODEC_KNOBS.get(codec, {})),
        backend=ATTENTION.create(backend),
        num_slots=NUM_SLOTS,
        max_model_len=MAX_MODEL_LEN,
        max_query_len=MAX_QUERY_LEN,
        dtype=torch.float32,
        device=CPU,
    )


def make_oracle(policy: KVPolicy, name: str) -> Oracle:
    return Oracle(
        policy=policy,
        name=name,
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        num_slots=NUM_SLOTS,
        scale=SCALE,
        inv_freq=rope().inv_freq.double().numpy(),
        max_model_len=MAX_MODEL_LEN,
    )


def draw(generator: torch.Generator, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of one layer."""
    q = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, generator=generator)
    k = torch.randn(num_tokens, NUM_KV_HEADS, HEAD_DIM, generator=generator)
    v = torch.randn(num_tokens, NUM_KV_HEADS, HEAD_DIM, generator=generator)
    return q, k, v


def replay(attention: Attention, oracle: Oracle, plans: Iterable[StepPlan], *, seed: int = 0) -> int:
    """Returns how many rows were evicted at commits, so that a test can tell that it saw evictions."""
    generator = torch.Generator().manual_seed(seed)
    num_evicted = 0
    for plan in plans:
        batch = Batch.of(plan, CPU)
        before = num_rows(oracle) + sum(count for _, count in plan.commits) * NUM_LAYERS * NUM_KV_HEADS
        oracle.begin(StepPlan(commits=plan.commits))
        num_evicted += before - num_rows(oracle)
        oracle.begin(StepPlan(frees=plan.frees))
        attention.begin(batch)
        compare_rows(attention, oracle)
        for layer in range(NUM_LAYERS):
            q, k, v = draw(generator, len(plan.token_ids))
            out = attention(layer, q, k, v, batch)
            read = None if attention.codec.is_native else reader(attention, oracle, plan, layer)
            expected = oracle.step(plan, layer, q.double().numpy(), k.double().numpy(), v.double().numpy(), read)
            assert np.abs(out.numpy() - expected).max(initial=0) < TOLERANCE
        attention.end(batch)
    return num_evicted


def reader(attention: Attention, oracle: Oracle, plan: StepPlan, layer: int) -> Read:
    """What the slots of output tokens hold in this layer, once its rows have been written."""
    store, policy, codec = attention.store, attention.policy, attention.codec
    group = next(group for group in store.groups if layer in group.layers)
    layer_index, starts = group.layers.index(layer), plan.query_starts
    bound = BOUNDS[type(codec).__module__.rpartition(".")[2]]

    @functools.cache
    def rows(index: int) -> tuple[Array, ...]:
        """The fields of Held, with H_kv in front."""
        slot, num_tokens = plan.slots[index], plan.positions[starts[index]]
        num_past = group.rows_after(num_tokens)
        count = num_past + plan.query_lens[index]
        key, value = group.read(layer_index, slice(slot, slot + 1), slice(NUM_KV_HEADS), count)
        bits = torch.stack((key, value), dim=-2)[0].double().numpy()
        position = group.position[layer_index, slot, :, :count].numpy()
        is_turned = (position < policy.num_sink_tokens) & (policy.key_space == "pre_rope")
        stands = position + is_turned * (num_tokens - num_past)
        is_encoded = position < codec.encoded_tokens(num_tokens) if codec.group_size else np.full(position.shape, True)
        bounds = np.where(is_encoded, bound, 0.0)
        return position, bits, oracle.rotate(bits[:, :, 0], -stands), bounds, is_encoded & ~is_turned

    def read(index: int, kv_head: int) -> Held:
        return Held(*(part[kv_head] for part in rows(index)))

    return read


def num_rows(oracle: Oracle) -> int:
    return sum(len(head.rows) for slots in oracle.heads for heads in slots for head in heads)


def compare_rows(attention: Attention, oracle: Oracle) -> None:
    """Committed rows of every (layer, slot, KV head): how many, which positions, which scores."""
    store = attention.store
    for group in store.groups:
        for index, layer in enumerate(group.layers):
            for slot in range(NUM_SLOTS):
                if (layer, slot) in attention.staged_prompts:
                    continue
                count = group.rows_after(store.num_tokens[slot])
                for kv_head, head in enumerate(oracle.heads[layer][slot]):
                    position = group.position[index, slot, kv_head, :count].tolist()
                    assert sorted(position) == sorted(head.rows), (layer, slot, kv_head)
                    if group.column is not None:
                        column = group.column[index, slot, kv_head, :count].numpy()
                        expected = [head.rows[p].column for p in position]
                        assert np.abs(column - expected).max(initial=0) < TOLERANCE

"""Replays plans through the real Attention and the oracle side by side and compares outputs, rows and scores."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from oracle import Held, Oracle, Read

from codesign.engine.attention.layer import Attention
from codesign.engine.attention.rope import Rope
from codesign.engine.attention.switched import SwitchedAttention
from codesign.engine.batch import Batch
from codesign.engine.kv.place import ON_DEVICE, KVPlace
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
    num_slots: int = NUM_SLOTS,
    max_query_len: int = MAX_QUERY_LEN,
    place: KVPlace = ON_DEVICE,
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
        num_slots=num_slots,
        max_model_len=MAX_MODEL_LEN,
        max_query_len=max_query_len,
        dtype=torch.float32,
        device=CPU,
        place=place,
    )


def make_oracle(policy: KVPolicy, name: str, *, max_model_len: int = MAX_MODEL_LEN) -> Oracle:
    return Oracle(
        policy=policy,
        name=name,
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        num_slots=NUM_SLOTS,
        scale=SCALE,
        inv_freq=rope().inv_freq.double().numpy(),
        max_model_len=max_model_len,
        max_query_len=MAX_QUERY_LEN,
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

    def read(index: int, kv_head: int) -> Held:
        slot, num_tokens = plan.slots[index], plan.positions[starts[index]]
        first, num_past = group.heads(layer_index, slot, num_tokens)[kv_head]
        count = num_past + plan.query_lens[index]
        if codec.group_size:
            pair = group.read(layer_index, slice(slot, slot + 1), slice(kv_head, kv_head + 1), count)
        else:
            own = (slice(first, first + count),)
            arenas = [
                [part[layer_index, slot].flatten(0, 1)[own] for part in parts] for parts in (group.key, group.value)
            ]
            pair = tuple(codec.decode(tuple(arena), store.dtype)[None, None] for arena in arenas)
        bits = torch.stack(pair, dim=-2)[0, 0].double().numpy()
        position = group.position[layer_index, slot].flatten()[first : first + count].numpy()
        is_turned = (position < policy.num_sink_tokens) & (policy.key_space == "pre_rope")
        stands = position + is_turned * (num_tokens - num_past)
        is_encoded = position < codec.encoded_tokens(num_tokens) if codec.group_size else np.full(position.shape, True)
        bounds = np.where(is_encoded, bound, 0.0)
        return Held(position, bits, oracle.rotate(bits[:, 0], -stands), bounds, is_encoded & ~is_turned)

    return read


def replay_classes(
    attention: SwitchedAttention, oracles: list[Oracle], plans: Iterable[StepPlan], *, seed: int = 0
) -> list[int]:
    """As `replay`, each class of slots beside an oracle of its own; rows evicted at commits, class by class."""
    generator, num_evicted = torch.Generator().manual_seed(seed), [0] * len(oracles)
    classes, first = [], 0
    for part in attention.parts:
        classes.append(range(first, first + len(part.store.num_tokens)))
        first = classes[-1].stop
    for plan in plans:
        batch = Batch.of(plan, CPU)
        alone = [restricted(plan, slots) for slots in classes]
        for index, (oracle, (own, _)) in enumerate(zip(oracles, alone, strict=True)):
            before = num_rows(oracle) + sum(count for _, count in own.commits) * NUM_LAYERS * NUM_KV_HEADS
            oracle.begin(StepPlan(commits=own.commits))
            num_evicted[index] += before - num_rows(oracle)
            oracle.begin(StepPlan(frees=own.frees))
        attention.begin(batch)
        for part, oracle in zip(attention.parts, oracles, strict=True):
            compare_rows(part, oracle)
        for layer in range(NUM_LAYERS):
            q, k, v = draw(generator, len(plan.token_ids))
            if not plan.token_ids:
                continue
            out = attention(layer, q, k, v, batch)
            for part, oracle, (own, tokens) in zip(attention.parts, oracles, alone, strict=True):
                read = None if part.codec.is_native else reader(part, oracle, own, layer)
                expected = oracle.step(own, layer, *(x[tokens].double().numpy() for x in (q, k, v)), read)
                assert np.abs(out[tokens].numpy() - expected).max(initial=0) < TOLERANCE
        attention.end(batch)
    return num_evicted


def restricted(plan: StepPlan, slots: range) -> tuple[StepPlan, list[int]]:
    """What these slots, counted from the first of them, see of a plan, and which of its tokens that is."""
    starts, parts = plan.query_starts, []
    for index, slot in enumerate(plan.slots):
        if slot in slots:
            tokens = range(starts[index], starts[index + 1])
            parts.append((slot - slots.start, tokens, plan.is_prompt[index], plan.is_prompt_end[index]))
    tokens = [token for _, own, _, _ in parts for token in own]
    own_plan = StepPlan(
        commits=tuple((slot - slots.start, count) for slot, count in plan.commits if slot in slots),
        frees=tuple(slot - slots.start for slot in plan.frees if slot in slots),
        slots=tuple(slot for slot, _, _, _ in parts),
        query_lens=tuple(len(own) for _, own, _, _ in parts),
        token_ids=(0,) * len(tokens),
        positions=tuple(plan.positions[token] for token in tokens),
        is_prompt=tuple(is_prompt for _, _, is_prompt, _ in parts),
        is_prompt_end=tuple(is_end for _, _, _, is_end in parts),
    )
    return own_plan, tokens


def num_rows(oracle: Oracle) -> int:
    return sum(len(head.rows) for slots in oracle.heads for heads in slots for head in heads)


def compare_rows(attention: Attention, oracle: Oracle) -> None:
    """Committed rows of every (layer, slot, KV head): how many, which positions, which scores."""
    store = attention.store
    for group in store.groups:
        for index, layer in enumerate(group.layers):
            for slot in range(len(store.num_tokens)):
                if (layer, slot) in attention.staged_prompts:
                    continue
                places = group.heads(index, slot, store.num_tokens[slot])
                assert sum(count for _, count in places) == NUM_KV_HEADS * group.rows_after(store.num_tokens[slot])
                for kv_head, head in enumerate(oracle.heads[layer][slot]):
                    first, count = places[kv_head]
                    position = group.position[index, slot].flatten()[first : first + count].tolist()
                    assert sorted(position) == sorted(head.rows), (layer, slot, kv_head)
                    if group.column is not None:
                        column = group.column[index, slot].flatten()[first : first + count].numpy()
                        expected = [head.rows[p].column for p in position]
                        assert np.abs(column - expected).max(initial=0) < TOLERANCE

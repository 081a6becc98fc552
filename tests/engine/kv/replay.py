"""Replays plans through the real Attention and the oracle side by side and compares outputs, rows and scores."""

from collections.abc import Iterable

import numpy as np
import torch
from oracle import Oracle

from codesign.engine.attention.layer import Attention
from codesign.engine.attention.rope import Rope
from codesign.engine.attention.switched import SwitchedAttention
from codesign.engine.batch import Batch
from codesign.engine.kv.policy import KVPolicy
from codesign.engine.step import StepPlan
from codesign.registry import ATTENTION, KV_CODECS

CPU = torch.device("cpu")
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_SLOTS = 3, 4, 2, 8, 4
MAX_MODEL_LEN, MAX_QUERY_LEN = 48, 3
TOLERANCE = 2e-5  # fp32 against float64
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
) -> Attention:
    return cls(
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        scale=SCALE,
        rope=rope(),
        policy=policy,
        codec=KV_CODECS.create(codec),
        backend=ATTENTION.create(backend),
        num_slots=num_slots,
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
            expected = oracle.step(plan, layer, q.double().numpy(), k.double().numpy(), v.double().numpy())
            assert np.abs(out.numpy() - expected).max(initial=0) < TOLERANCE
        attention.end(batch)
    return num_evicted


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
            for oracle, (own, tokens) in zip(oracles, alone, strict=True):
                expected = oracle.step(own, layer, *(part[tokens].double().numpy() for part in (q, k, v)))
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

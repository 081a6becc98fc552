"""SwitchedAttention: consecutive slots under different KV policies, each class an Attention with a cache of its own.

plan      slots 0 2 3 7                     classes: slots 0-1 full, slots 2-7 snapkv
class 0   slots 0         its tokens        begin, call, end as if it were alone
class 1   slots 0 1 5     its tokens
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from codesign.engine.attention.fixed import FixedStep
from codesign.engine.attention.layer import Attention
from codesign.engine.attention.paged import PagedAttention
from codesign.engine.batch import Batch
from codesign.engine.kv.place import ON_DEVICE, KVPlace
from codesign.engine.kv.policy import KVPolicy
from codesign.engine.step import StepPlan


def make_attention(
    *, policy: KVPolicy, num_slots: int, num_blocks: int | None = None, place: KVPlace = ON_DEVICE, **rest: Any
) -> "AnyAttention":
    """What `policy` asks for, in blocks where their number is given; `rest` as in Attention, whose errors it raises."""
    if num_blocks is not None:
        return PagedAttention(policy=policy, num_slots=num_slots, num_blocks=num_blocks, **rest)
    classes = policy.slot_policies(num_slots)
    parts = [Attention(policy=own, num_slots=count, place=place, **rest) for count, own in classes]
    return parts[0] if len(parts) == 1 else SwitchedAttention(policy, parts)


@dataclasses.dataclass(frozen=True)
class _Share:
    """One class's part of a step; tokens [n] are its rows of the packed [N], None all of them."""

    batch: Batch
    tokens: Tensor | None


class SwitchedAttention:
    """parts: class after class, each with as many slots as its store has."""

    def __init__(self, policy: KVPolicy, parts: list[Attention]) -> None:
        self.policy, self.parts = policy, parts
        self._shares: list[_Share] = []

    @property
    def kernel(self) -> str:
        return "; ".join(dict.fromkeys(part.kernel for part in self.parts))

    @property
    def kv_budget_tokens(self) -> tuple[int, ...]:
        """Rows kept per KV head, layer by layer, in the slots that keep least."""
        return tuple(min(own) for own in zip(*(part.kv_budget_tokens for part in self.parts), strict=True))

    @property
    def kv_bytes(self) -> int:
        return sum(part.kv_bytes for part in self.parts)

    @property
    def kv_place(self) -> dict[str, int]:
        """Memory -> bytes of the cache that lie there."""
        found: dict[str, int] = {}
        for part in self.parts:
            for memory, num_bytes in part.kv_place.items():
                found[memory] = found.get(memory, 0) + num_bytes
        return found

    @property
    def staging_bytes(self) -> int:
        return sum(part.staging_bytes for part in self.parts)

    def begin(self, batch: Batch) -> None:
        self._shares, first = [], 0
        for part in self.parts:
            stop = first + len(part.store.num_tokens)
            share = _share(batch, range(first, stop))
            part.begin(share.batch)
            self._shares.append(share)
            first = stop

    def fixed(self) -> FixedStep | None:
        """None: which tokens are whose is known in Python alone."""
        return None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        out = None
        for part, share in zip(self.parts, self._shares, strict=True):
            tokens = share.tokens
            if tokens is None:
                return part(layer, q, k, v, share.batch)
            if len(tokens):
                out = torch.empty_like(q) if out is None else out
                out[tokens] = part(layer, q[tokens], k[tokens], v[tokens], share.batch)
        assert out is not None, "a step has tokens"
        return out

    def end(self, batch: Batch) -> None:
        for part, share in zip(self.parts, self._shares, strict=True):
            part.end(share.batch)
        self._shares = []


def _share(batch: Batch, slots: range) -> _Share:
    plan, starts = batch.plan, batch.plan.query_starts
    own = [index for index, slot in enumerate(plan.slots) if slot in slots]
    tokens = [token for index in own for token in range(starts[index], starts[index + 1])]
    part = StepPlan(
        commits=tuple((slot - slots.start, count) for slot, count in plan.commits if slot in slots),
        truncates=tuple((slot - slots.start, count) for slot, count in plan.truncates if slot in slots),
        frees=tuple(slot - slots.start for slot in plan.frees if slot in slots),
        slots=tuple(plan.slots[index] - slots.start for index in own),
        query_lens=tuple(plan.query_lens[index] for index in own),
        token_ids=tuple(plan.token_ids[token] for token in tokens),
        positions=tuple(plan.positions[token] for token in tokens),
        is_prompt=tuple(plan.is_prompt[index] for index in own),
        is_prompt_end=tuple(plan.is_prompt_end[index] for index in own),
    )
    if tokens and len(tokens) == len(plan.token_ids):
        return _Share(dataclasses.replace(batch, plan=part), None)
    row = torch.tensor(tokens, dtype=torch.int64, device=batch.positions.device)
    return _Share(Batch(plan=part, token_ids=batch.token_ids[row], positions=batch.positions[row]), row)


AnyAttention = Attention | SwitchedAttention | PagedAttention

"""Attention: what the model calls; rotary positions, the KV store, the policy and the backend behind one function.

    attention.begin(batch)                          # once per step: commits, frees, index tensors, masks
    x = attention(layer, q, k, v, batch)            # in every layer: rotate, write, read, attend
    attention.end(batch)                            # once per step: what was a prompt chunk now counts

The model never rotates and never sees a cache.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from codesign.engine.attention import packed
from codesign.engine.attention.backend import AttentionBackend
from codesign.engine.attention.calls import Call
from codesign.engine.attention.fixed import FixedStep
from codesign.engine.attention.group_steps import GroupStep, GroupSteps, Packed
from codesign.engine.attention.output import OutputAttention
from codesign.engine.attention.prompt import PromptAttention
from codesign.engine.attention.ragged import attend_ragged
from codesign.engine.attention.rope import Rope
from codesign.engine.attention.rules import check_plan, check_runs
from codesign.engine.batch import Batch
from codesign.engine.kernels.kv_attention import Queries
from codesign.engine.kernels.pieces import Pieces
from codesign.engine.kernels.plain import PLAIN
from codesign.engine.kv.codec import KVCodec
from codesign.engine.kv.group import LayerGroup
from codesign.engine.kv.place import ON_DEVICE, KVPlace
from codesign.engine.kv.policy import KVPolicy
from codesign.engine.kv.ragged import RaggedGroup
from codesign.engine.kv.recent import RecentQueries
from codesign.engine.kv.staging import StagedPrompt
from codesign.engine.kv.store import DenseStore


@dataclasses.dataclass(frozen=True)
class _Step:
    """Attributes:
    output_tokens: which packed tokens are output tokens; None means all of them.
    rows: [L, n * H_kv] where those go, layers in the store's order; None without any.
    recent_rows: where the queries of those go, for a policy that looks at recent ones.
    """

    cos: Tensor
    signed_sin: Tensor
    output_tokens: Tensor | None
    rows: Tensor | None
    recent_rows: Tensor | None
    groups: tuple[GroupStep, ...]

    @functools.cached_property
    def layer_rows(self) -> tuple[Tensor, ...]:
        """Layer after layer."""
        return () if self.rows is None else self.rows.unbind(0)


class Attention:
    """Args:
    scale: of the softmax, usually head_dim ** -0.5.
    max_query_len: most output tokens of one sequence in one step (1, or K + 1 to verify K drafts).

    Raises:
        ValueError: a KV budget too small for its policy.
        Unsupported: a backend that cannot run on this device, a codec that cannot overwrite rows with a policy that
            evicts, or a place that has no room or does not go with them.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        rope: Rope,
        policy: KVPolicy,
        codec: KVCodec,
        backend: AttentionBackend,
        num_slots: int,
        max_model_len: int,
        max_query_len: int,
        dtype: torch.dtype,
        device: torch.device,
        place: KVPlace = ON_DEVICE,
        pieces: Pieces = PLAIN,
    ) -> None:
        check_runs(backend, device)
        self._pieces = pieces
        self.policy, self.codec, self.backend = policy, codec, backend
        self._cos, self._signed_sin = rope.tables(max_model_len, device)
        self.store = DenseStore(
            num_layers=num_layers,
            num_slots=num_slots,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_model_len=max_model_len,
            max_query_len=max_query_len,
            policy=policy,
            codec=codec,
            rope_tables=(self._cos, self._signed_sin),
            dtype=dtype,
            device=device,
            place=place,
        )
        is_bounded = any(group.is_bounded for group in self.store.groups)
        if policy.needs_keys:
            for group in (own for own in self.store.groups if own.is_bounded):
                group.recent = RecentQueries(
                    len(group.layers),
                    num_slots,
                    num_heads,
                    head_dim,
                    window_tokens=policy.window_tokens,
                    max_query_len=max_query_len,
                    scale=scale,
                    dtype=dtype,
                    device=device,
                )
        self._is_native = codec.is_native and self.store.stream is None
        heads: dict[str, Any] = {"num_kv_heads": num_kv_heads, "scale": scale, "head_dim": head_dim}
        heads |= {"dtype": dtype, "device": device}
        self._attend_prompts = PromptAttention(backend, **heads)
        self._attend_slots = OutputAttention(codec, backend, prompts=self._attend_prompts.kernel, **heads)
        self._group_steps = GroupSteps(
            self.store,
            self._attend_slots,
            (self._cos, self._signed_sin),
            num_groups=num_heads // num_kv_heads,
            dtype=dtype,
        )
        self.kernel = self._attend_slots.named(
            has_weights=is_bounded and policy.evidence == "column_sums",
            has_ragged=is_bounded and policy.head_budgets == "ragged",
        )
        self.staged_prompts: dict[tuple[int, int], StagedPrompt] = {}  # (layer, slot)
        self._scale, self._max_model_len, self._max_query_len = scale, max_model_len, max_query_len
        self._num_kv_heads, self._device = num_kv_heads, device
        self._row_of = {layer: row for row, layer in enumerate(self.store.layer_order)}
        self._where = {
            layer: (number, index)
            for number, group in enumerate(self.store.groups)
            for index, layer in enumerate(group.layers)
        }
        self._step: _Step | None = None

    @property
    def kv_budget_tokens(self) -> tuple[int, ...]:
        """Most rows kept per KV head, layer by layer."""
        return self.store.budgets

    @property
    def kv_bytes(self) -> int:
        """Bytes of the slots: a constant, allocated when the engine is built."""
        return self.store.num_bytes

    @property
    def kv_place(self) -> dict[str, int]:
        """Memory -> bytes of the slots that lie there; buffers, which `kv_bytes` leaves out, by name."""
        return self.store.num_bytes_in

    @property
    def staging_bytes(self) -> int:
        """Bytes of prompts that are still coming in."""
        storages = [tensor.untyped_storage() for prompt in self.staged_prompts.values() for tensor in prompt.tensors()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def begin(self, batch: Batch) -> None:
        """Raises ValueError for a plan that breaks the rules of StepPlan or outgrows `max_model_len`."""
        plan = batch.plan
        self.store.commit(plan.commits)
        for slot, num_tokens in plan.truncates:
            self.store.truncate(slot, num_tokens)
        for slot in plan.frees:
            self.store.release(slot)
            for layer in self._where:
                self.staged_prompts.pop((layer, slot), None)
        starts = plan.query_starts
        check_plan(
            plan,
            num_tokens=self.store.num_tokens,
            num_pending=self.store.num_pending,
            max_model_len=self._max_model_len,
            max_query_len=self._max_query_len,
        )
        output_tokens, rows = self._reserve(batch, starts)
        groups = tuple(self._group_steps.of(group, batch, starts) for group in self.store.groups)
        self.store.fetch(plan.slots, plan.is_prompt)
        recent_rows = None
        recent = next((group.recent for group in self.store.groups if group.recent is not None), None)
        if rows is not None and recent is not None:
            facts = zip(plan.slots, plan.query_lens, strict=True)
            token_slots = torch.tensor([own for own, length in facts for _ in range(length)], device=self._device)
            output = slice(None) if output_tokens is None else output_tokens
            recent_rows = recent.rows(token_slots[output], batch.positions[output])
        cos, signed_sin = self._cos[batch.positions], self._signed_sin[batch.positions]
        self._step = _Step(cos[:, None], signed_sin[:, None], output_tokens, rows, recent_rows, groups)

    def _reserve(self, batch: Batch, starts: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
        """Which packed tokens are output tokens (None: all), and the rows [L, n * H_kv] they go to."""
        plan = batch.plan
        output = [index for index, is_prompt in enumerate(plan.is_prompt) if not is_prompt]
        if not output:
            return None, None
        tokens, positions = None, batch.positions
        if len(output) < len(plan.slots):
            ranges = [range(starts[index], starts[index + 1]) for index in output]
            tokens = torch.tensor([token for own in ranges for token in own], device=self._device)
            positions = positions[tokens]
        pending = [(plan.slots[index], plan.query_lens[index]) for index in output]
        first_positions = [plan.positions[starts[index]] for index in output]
        return tokens, self.store.reserve(pending, first_positions, positions)

    def fixed(self) -> FixedStep | None:
        """The step that has begun, if it consists of output tokens, equally many of each sequence, that are read from
        where tensors say, and nothing else is done for them."""
        step, output = self._step, self._attend_slots
        assert step is not None, "begin(batch) comes first"
        is_plain = step.rows is not None and step.output_tokens is None and self.store.stream is None
        if not (is_plain and output.is_indexed and output.finds_slots):
            return None
        groups = []
        for group, own in zip(self.store.groups, step.groups, strict=True):
            if len(own.calls) != 1 or group.sinks is not None:
                return None
            most = group.num_slot_rows if isinstance(group, RaggedGroup) else 0
            groups.append(GroupStep((own.calls[0].fixed(most=group.capacity, most_of_plane=most),)))
        facts = dataclasses.replace(step, groups=tuple(groups))

        def resume() -> None:
            self._step = facts

        return FixedStep(facts, resume)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """[N, H, D] from q [N, H, D] and k, v [N, H_kv, D], packed as in the batch, before RoPE."""
        stream = self.store.stream
        if stream is None:
            return self._attend_layer(layer, q, k, v)
        stream.enter(layer)
        out = self._attend_layer(layer, q, k, v)
        stream.leave(layer)
        return out

    def _attend_layer(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        step = self._step
        assert step is not None, "begin(batch) comes first"
        number, index = self._where[layer]
        group, part = self.store.groups[number], step.groups[number]
        if group.sinks is not None:
            if part.new_sinks is not None:
                group.sinks.store(index, part.new_sinks, k)
            if part.turn is not None:
                group.sinks.apply(index, part.turn, self._pieces)
        if part.packed is not None:
            return self._attend_packed(part.packed, group, index, q, k, v, step)
        tokens = step.output_tokens
        if step.rows is not None and tokens is None and self._is_native:
            q = self._pieces.rotate_into(
                *(q, k, v, step.cos, step.signed_sin),
                key=self.store.key[0],
                value=self.store.value[0],
                rows=step.layer_rows[self._row_of[layer]],
            )
        else:
            q, k = self._pieces.rotate(q, k, step.cos, step.signed_sin)
            if step.rows is not None:
                rows = step.layer_rows[self._row_of[layer]]
                self.store.write(layer, rows, *((k, v) if tokens is None else (k[tokens], v[tokens])))
        if group.recent is not None and step.recent_rows is not None:
            group.recent.write(index, step.recent_rows, q if tokens is None else q[tokens])
        if len(part.calls) == 1:
            return self._attend(part.calls[0], layer, group, index, q, k, v)
        out = q.new_empty(q.shape)
        for call in part.calls:
            own = call.tokens
            out[own] = self._attend(call, layer, group, index, q[own], k[own], v[own])
        return out

    def _attend_packed(
        self, own: Packed, group: LayerGroup, index: int, q: Tensor, k: Tensor, v: Tensor, step: _Step
    ) -> Tensor:
        kernel, ((key,), (value,)) = self._attend_slots.packed, (group.near_key[index], group.near_value[index])
        assert kernel is not None
        q = self._pieces.rotate_into(
            *(q, k, v, step.cos, step.signed_sin),
            key=self.store.key[0],
            value=self.store.value[0],
            rows=own.rows[index],
        )

        def run(queries: Queries, number: int) -> None:
            kernel.native(queries, key, value, own.first[number])

        return packed.attend(q, own.calls, run, num_kv_heads=self._num_kv_heads, scale=self._scale)

    def _attend(self, call: Call, layer: int, group: LayerGroup, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[n, H, D] of the tokens of one call."""
        if call.is_prompt:
            return self._attend_prompt(call, layer, group, index, q, k, v)
        return self._attend_output(call, group, index, q)

    def _attend_output(self, call: Call, group: LayerGroup, index: int, q: Tensor) -> Tensor:
        """Output tokens: B slots in one call, straight from the cache."""
        spans = call.spans if call.planes is None else ()
        if isinstance(group, RaggedGroup) and any(group.is_ragged(index, span.slot) for span in spans):
            where = self._attend_slots.native, self.backend, group, index, call
            return attend_ragged(*where, q, num_kv_heads=self._num_kv_heads, scale=self._scale)
        if group.column is not None:
            return self._attend_slots.scored(q, group, index, call)
        out, _ = self._attend_slots(q, group, index, call, want_columns=False)
        return out

    def _attend_prompt(
        self, call: Call, layer: int, group: LayerGroup, index: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """A prompt chunk; when it is the last one of a staged layer, its rows are selected and admitted here."""
        (span,) = call.spans
        query, new_key, new_value = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)  # [H, n, D]
        if not group.is_staged:
            slot_key, slot_value = group.near_key[index][0][span.slot], group.near_value[index][0][span.slot]
            slot_key[:, span.num_past : call.num_rows] = new_key
            slot_value[:, span.num_past : call.num_rows] = new_value
            if self.store.stream is not None:
                kept_rows = group.stretches(index, span.slot, call.num_rows, first=span.num_past)
                self.store.stream.keep(layer, kept_rows)
            key, value = slot_key[:, : call.num_rows], slot_value[:, : call.num_rows]
            return self._attend_prompts(q, key, value, call)
        where = (layer, span.slot)
        staged = self.staged_prompts.get(where)
        if staged is None:
            staged = self.staged_prompts[where] = StagedPrompt(self.policy, max_model_len=self._max_model_len)
        key, value = staged.append(new_key, new_value, query, is_last=span.is_prompt_end)
        if group.column is not None:
            sums = self.backend.column_sums(
                query[None],
                key[None],
                mask=call.mask,
                is_causal=call.is_causal,
                scale=self._scale,
                decay=self.policy.column_decay,
            )
            staged.add_column_sums(sums[0])
        out = self._attend_prompts(q, key, value, call)
        if span.is_prompt_end:
            prompt = staged.finish(self._scale)
            num_rows = group.rows_after(call.num_rows)
            kept = self.policy.select(prompt, num_rows) if num_rows < call.num_rows else None
            group.admit(index, span.slot, prompt, kept)
            if self.store.stream is not None:
                self.store.stream.keep(layer, group.stretches(index, span.slot, call.num_rows))
            del self.staged_prompts[where]
        return out

    def end(self, batch: Batch) -> None:
        """Prompt chunks commit by themselves: a prompt is never rejected."""
        plan = batch.plan
        for slot, length, is_prompt in zip(plan.slots, plan.query_lens, plan.is_prompt, strict=True):
            if is_prompt:
                self.store.append(slot, length)
        self._step = None

"""PagedAttention: as Attention, over a cache in blocks that keeps every row (`kv.layout` paged).

    begin    commits, truncates, frees; then tables grow and what is about to be written is checked against them
    call     new rows are written into blocks; output tokens read them through the table
    end      what was a prompt chunk now counts

Where one kernel reads blocks for all tokens of a step, prompts too, it does. Otherwise a prompt chunk looks at its
own rows as they are, and at those before it copied together once per layer. A codec that rounds sees a prompt only at
its end: until then it is staged in native precision, as in every cache here. Blocks of such a codec are never given as
cached: a prompt that began with them would see rounded rows where alone it sees native ones, and give other tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from codesign.engine.attention import packed
from codesign.engine.attention.backend import AttentionBackend
from codesign.engine.attention.blocks import BlockAttention
from codesign.engine.attention.calls import Call, Span, cut
from codesign.engine.attention.fixed import FixedStep
from codesign.engine.attention.prompt import PromptAttention
from codesign.engine.attention.rope import Rope
from codesign.engine.attention.rules import check_plan, check_runs
from codesign.engine.batch import Batch
from codesign.engine.kernels.kv_attention import Queries
from codesign.engine.kernels.pieces import Pieces
from codesign.engine.kernels.plain import PLAIN
from codesign.engine.kv.codec import KVCodec
from codesign.engine.kv.paged import BlockUse, PagedStore
from codesign.engine.kv.place import ON_DEVICE
from codesign.engine.kv.policy import KVPolicy
from codesign.engine.kv.staging import StagedPrompt
from codesign.engine.step import BLOCK_TOKENS, StepPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step:
    """Attributes:
    written: packed tokens whose rows go into blocks now; None means all of them.
    rows: [n * H_kv] where those go.
    packed: the calls of the whole step and the blocks [B, H_kv, n] of their pieces, where one kernel does all of it.
    calls: else, with the blocks of the sequences of each.
    admitted: slot -> rows of its whole prompt, where that is staged and ends now.
    """

    cos: Tensor
    signed_sin: Tensor
    written: Tensor | None
    rows: Tensor
    has_prompts: bool
    packed: tuple[tuple[packed.PackedCall, Tensor], ...]
    calls: tuple[tuple[Call, Tensor], ...]
    admitted: dict[int, Tensor]


class PagedAttention:
    """Args:
    policy: one that keeps every row.
    codec: one that encodes each row by itself.
    scale: of the softmax, usually head_dim ** -0.5.
    num_blocks: blocks of 32 rows of all layers and KV heads.
    max_query_len: most output tokens of one sequence in one step (1, or K + 1 to verify K drafts).

    Raises:
        Unsupported: a backend that cannot run on this device.
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
        num_blocks: int,
        max_model_len: int,
        max_query_len: int,
        dtype: torch.dtype,
        device: torch.device,
        pieces: Pieces = PLAIN,
    ) -> None:
        check_runs(backend, device)
        self.policy, self.codec, self.backend, self._pieces = policy, codec, backend, pieces
        self.kv_budget_tokens = policy.budgets(num_layers=num_layers, max_model_len=max_model_len)
        assert set(self.kv_budget_tokens) == {max_model_len}, "blocks keep every row"
        self._cos, self._signed_sin = rope.tables(max_model_len, device)
        self.store = PagedStore(
            num_layers=num_layers,
            num_slots=num_slots,
            num_blocks=num_blocks,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_model_len=max_model_len,
            codec=codec,
            dtype=dtype,
            device=device,
        )
        heads: dict[str, Any] = {"num_kv_heads": num_kv_heads, "scale": scale, "head_dim": head_dim}
        heads |= {"dtype": dtype, "device": device}
        self._attend_prompts = PromptAttention(backend, **heads)
        self._attend_blocks = BlockAttention(codec, backend, prompts=self._attend_prompts.kernel, **heads)
        self.kernel = self._attend_blocks.kernel
        self.staged_prompts: dict[tuple[int, int], StagedPrompt] = {}  # (layer, slot)
        self._num_layers, self._num_groups, self._scale = num_layers, num_heads // num_kv_heads, scale
        self._max_model_len, self._max_query_len = max_model_len, max_query_len
        self._dtype, self._device = dtype, device
        self._step: _Step | None = None

    @property
    def num_blocks(self) -> int:
        return self.store.num_blocks

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return self.store.block_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of blocks and table: a constant, allocated when the engine is built."""
        return self.store.num_bytes

    @property
    def kv_place(self) -> dict[str, int]:
        """Memory -> bytes of the cache that lie there."""
        return {ON_DEVICE.memory(self._device): self.kv_bytes}

    @property
    def kv_use(self) -> BlockUse:
        """What the blocks hold at this moment: how much is unused, and what sharing saves."""
        return self.store.use

    @property
    def staging_bytes(self) -> int:
        """Bytes of prompts that are still coming in."""
        storages = [tensor.untyped_storage() for prompt in self.staged_prompts.values() for tensor in prompt.tensors()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def begin(self, batch: Batch) -> None:
        """Raises ValueError for a plan that breaks the rules of StepPlan, outgrows `max_model_len`, or gives blocks
        that are too few, in use, not what they are said to be, or shared where they would be written."""
        plan, store = batch.plan, self.store
        store.commit(plan.commits)
        for slot, num_tokens in plan.truncates:
            store.truncate(slot, num_tokens)
        for slot in plan.frees:
            store.release(slot)
            for layer in range(self._num_layers):
                self.staged_prompts.pop((layer, slot), None)
        if not self.codec.is_native and any(plan.num_cached):
            raise ValueError("rows that are rounded cannot stand in for those of another prompt")
        store.grow(plan)
        check_plan(
            plan,
            num_tokens=store.num_tokens,
            num_pending=store.num_pending,
            max_model_len=self._max_model_len,
            max_query_len=self._max_query_len,
        )
        spans = self._spans(plan)
        admitted = {
            span.slot: self._rows([(span.slot, span.num_rows)], torch.arange(span.num_rows, device=self._device))
            for span in spans
            if self._is_staged(span) and span.is_prompt_end
        }
        for span in spans:
            is_staged = self._is_staged(span) and not span.is_prompt_end
            store.reserve(span.slot, span.num_queries, is_pending=not span.is_prompt, is_staged=is_staged)
        written, rows = self._written(batch, spans)
        whole: tuple[packed.PackedCall, ...] = ()
        calls: tuple[Call, ...] = ()
        if self._attend_blocks.packed is not None:
            whole = packed.cut([(span.num_past, span.num_queries) for span in spans])
        else:
            calls = cut(
                spans,
                num_groups=self._num_groups,
                dtype=self._dtype,
                device=self._device,
                has_tables=True,
                is_ragged=self._attend_blocks.is_ragged,
                is_indexed=self._attend_blocks.is_indexed,
            )
        cos, signed_sin = self._cos[batch.positions], self._signed_sin[batch.positions]
        self._step = _Step(
            cos=cos[:, None],
            signed_sin=signed_sin[:, None],
            written=written,
            rows=rows,
            has_prompts=any(plan.is_prompt),
            packed=tuple((own, self._table([spans[index] for index in own.of], own.num_rows)) for own in whole),
            calls=tuple((call, self._table(call.spans, call.num_rows)) for call in calls),
            admitted=admitted,
        )

    def fixed(self) -> FixedStep | None:
        """The step that has begun, if it consists of output tokens, equally many of each sequence, that are read from
        where tensors say."""
        step = self._step
        assert step is not None, "begin(batch) comes first"
        if step.has_prompts or len(step.calls) != 1 or not self._attend_blocks.is_indexed:
            return None
        call = step.calls[0][0].fixed(most=self.store.table.shape[1] * BLOCK_TOKENS)
        facts = dataclasses.replace(step, calls=((call, self.store.table_of(call.slot_ids, call.num_rows)),))

        def resume() -> None:
            self._step = facts

        return FixedStep(facts, resume)

    def _table(self, spans: Sequence[Span], num_rows: int) -> Tensor:
        return self.store.table_of([span.slot for span in spans], num_rows)

    def _spans(self, plan: StepPlan) -> list[Span]:
        starts = plan.query_starts
        return [
            Span(
                slot,
                starts[index],
                plan.query_lens[index],
                self.store.num_tokens[slot],
                plan.is_prompt[index],
                plan.is_prompt_end[index],
            )
            for index, slot in enumerate(plan.slots)
        ]

    def _is_staged(self, span: Span) -> bool:
        return span.is_prompt and not self.codec.is_native

    def _written(self, batch: Batch, spans: Sequence[Span]) -> tuple[Tensor | None, Tensor]:
        """Which packed tokens are written into blocks now (None: all), and the rows they go to."""
        own = [span for span in spans if not self._is_staged(span)]
        tokens, positions = None, batch.positions
        if len(own) < len(spans):
            tokens = torch.tensor(
                [token for span in own for token in span.tokens], dtype=torch.int64, device=self._device
            )
            positions = positions[tokens]
        return tokens, self._rows([(span.slot, span.num_queries) for span in own], positions)

    def _rows(self, counts: Sequence[tuple[int, int]], positions: Tensor) -> Tensor:
        """Rows of positions [n], slot after slot, each (slot, how many of them)."""
        slots, lengths = torch.tensor(counts, dtype=torch.int64, device=self._device).view(-1, 2).unbind(1)
        return self.store.rows(torch.repeat_interleave(slots, lengths, output_size=len(positions)), positions)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """[N, H, D] from q [N, H, D] and k, v [N, H_kv, D], packed as in the batch, before RoPE."""
        step = self._step
        assert step is not None, "begin(batch) comes first"
        if step.packed or (self.codec.is_native and not step.has_prompts):
            (key,), (value,) = self.store.parts(layer)
            q = self._pieces.rotate_into(
                *(q, k, v, step.cos, step.signed_sin),
                key=key.view(-1, key.shape[3]),
                value=value.view(-1, key.shape[3]),
                rows=step.rows,
            )
        else:
            q, k = self._pieces.rotate(q, k, step.cos, step.signed_sin)
            if len(step.rows):
                tokens = step.written
                self.store.write(layer, step.rows, *((k, v) if tokens is None else (k[tokens], v[tokens])))
        if step.packed:
            return self._attend_packed(layer, q)
        if len(step.calls) == 1:
            return self._attend(*step.calls[0], layer, q, k, v)
        out = q.new_empty(q.shape)
        for call, table in step.calls:
            own = call.tokens
            out[own] = self._attend(call, table, layer, q[own], k[own], v[own])
        return out

    def _attend_packed(self, layer: int, q: Tensor) -> Tensor:
        step, kernel, ((key,), (value,)) = self._step, self._attend_blocks.packed, self.store.parts(layer)
        assert step is not None and kernel is not None

        def run(queries: Queries, number: int) -> None:
            kernel.paged(queries, step.packed[number][1], key, value)

        calls = [call for call, _ in step.packed]
        return packed.attend(q, calls, run, num_kv_heads=key.shape[1], scale=self._scale)

    def _attend(self, call: Call, table: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[n, H, D] of the tokens of one call."""
        if call.is_prompt:
            return self._attend_prompt(call, table, layer, q, k, v)
        return self._attend_blocks(q, self.store, layer, call, table)

    def _attend_prompt(self, call: Call, table: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (span,) = call.spans
        query, key, value = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)  # [H, n, D]
        if self._is_staged(span):
            key, value = self._staged(span, layer, query, key, value)
        elif span.num_past:
            (key,), (value,) = self.store.read(layer, table, call.num_rows)
        return self._attend_prompts(q, key, value, call)

    def _staged(self, span: Span, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt so far in native precision; encoded and written into its blocks where it ends."""
        where, step = (layer, span.slot), self._step
        assert step is not None
        if where not in self.staged_prompts:
            self.staged_prompts[where] = StagedPrompt(self.policy, max_model_len=self._max_model_len)
        key, value = self.staged_prompts[where].append(key, value, query, is_last=span.is_prompt_end)
        if span.is_prompt_end:
            del self.staged_prompts[where]
            self.store.write(layer, step.admitted[span.slot], key.transpose(0, 1), value.transpose(0, 1))
        return key, value

    def end(self, batch: Batch) -> None:
        """Prompt chunks commit by themselves: a prompt is never rejected."""
        plan = batch.plan
        for slot, length, is_prompt in zip(plan.slots, plan.query_lens, plan.is_prompt, strict=True):
            if is_prompt:
                self.store.append(slot, length)
        self._step = None

"""What each layer group does in a step, cut as the kernels that read its rows can take it.

    packed     one kernel reads rows as they lie for every token of the step, prompts too (`packed.py`)
    calls      otherwise: output tokens of neighbouring slots, or of any where slots stand in tensors; and each prompt
               chunk (`calls.py`)

Beside that the sinks of a policy that turns them, and KV heads of different lengths where each is read by itself.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from codesign.engine.attention import packed
from codesign.engine.attention.calls import Call, Planes, Span, cut
from codesign.engine.attention.output import OutputAttention
from codesign.engine.batch import Batch
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.kv_attention import row_starts
from codesign.engine.kv.group import LayerGroup
from codesign.engine.kv.ragged import RaggedGroup
from codesign.engine.kv.sinks import NewSinks, Turn
from codesign.engine.kv.store import DenseStore


@dataclasses.dataclass(frozen=True)
class Packed:
    """Attributes:
    first: of each call, where the rows of its pieces begin.
    rows: of each layer, where all keys and values of the step go.
    """

    calls: tuple[packed.PackedCall, ...]
    first: tuple[Any, ...]
    rows: Sequence[Tensor]


@dataclasses.dataclass(frozen=True)
class GroupStep:
    """Attributes:
    calls: of its backend; empty where the step is packed.
    packed: the kernel's calls for the tokens of the whole step, prompts too.
    """

    calls: tuple[Call, ...] = ()
    new_sinks: NewSinks | None = None
    turn: Turn | None = None
    packed: Packed | None = None


class GroupSteps:
    """Args:
    output: what will read the rows of output tokens.
    rope_tables: cos and signed_sin [max_model_len, D].
    """

    def __init__(
        self,
        store: DenseStore,
        output: OutputAttention,
        rope_tables: tuple[Tensor, Tensor],
        *,
        num_groups: int,
        dtype: torch.dtype,
    ) -> None:
        self._store, self._output, self._rope_tables = store, output, rope_tables
        self._num_groups, self._dtype = num_groups, dtype

    def of(self, group: LayerGroup, batch: Batch, starts: tuple[int, ...]) -> GroupStep:
        """Its part of the step; `starts` are the plan's `query_starts`."""
        plan, spans = batch.plan, list[Span]()
        for index, slot in enumerate(plan.slots):
            is_prompt, num_tokens = plan.is_prompt[index], self._store.num_tokens[slot]
            num_past = num_tokens if is_prompt else group.rows_after(num_tokens)
            spans.append(
                Span(slot, starts[index], plan.query_lens[index], num_past, is_prompt, plan.is_prompt_end[index])
            )
        if self._is_packed(group):
            return GroupStep(packed=self._packed(group, batch, spans))
        calls = self._calls(group, spans)
        if group.sinks is None:
            return GroupStep(calls)
        tokens = [(token, span.slot, plan.positions[token]) for span in spans for token in span.tokens]
        shifts = [(span.slot, plan.positions[span.start] - span.num_past) for span in spans if not span.is_prompt]
        return GroupStep(calls, group.sinks.new(tokens), group.sinks.turn(shifts, *self._rope_tables))

    def _is_packed(self, group: LayerGroup) -> bool:
        has_kernel = self._output.packed is not None and self._store.stream is None
        return has_kernel and not group.is_staged and group.recent is None

    def _packed(self, group: LayerGroup, batch: Batch, spans: Sequence[Span]) -> Packed:
        calls = packed.cut([(span.num_past, span.num_queries) for span in spans])
        slots = torch.tensor([span.slot for span in spans for _ in span.tokens], dtype=torch.int64)
        first = [row_starts(group.first_rows(spans[index].slot for index in own.of)) for own in calls]
        return Packed(calls, tuple(first), group.rows(slots, batch.positions))

    def _calls(self, group: LayerGroup, spans: Sequence[Span]) -> tuple[Call, ...]:
        output, is_ragged = self._output, isinstance(group, RaggedGroup)
        # Heads of different lengths that nothing reads in one call are masked or taken one by one.
        needs_masks = is_ragged and isinstance(output.native, Missing) and not output.is_indexed
        calls = cut(
            spans,
            num_groups=self._num_groups,
            dtype=self._dtype,
            device=self._store.device,
            has_tables=output.finds_slots and (output.is_indexed or not is_ragged),
            is_ragged=output.is_ragged and not needs_masks,
            is_indexed=output.is_indexed,
        )
        if not isinstance(group, RaggedGroup):
            return calls
        return tuple(_with_planes(call, group) for call in calls)


def _with_planes(call: Call, group: RaggedGroup) -> Call:
    """With the rows of each head, where these are read from tensors."""
    if call.index is None:
        return call
    slots = [span.slot for span in call.spans]
    index, num_rows = group.planes(slots, call.index[:, : len(slots)], call.num_queries)
    return dataclasses.replace(call, planes=Planes(index, max(num_rows, call.num_rows)))

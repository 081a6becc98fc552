"""How one step is cut into backend calls, so that its cost follows the sum of the lengths, not batch size x longest.

Output tokens of neighbouring slots whose row counts are alike share one call over a slice of the cache (no copy);
a sequence much longer or shorter than its neighbour starts a new one. Each prompt chunk is a call of its own.

    slots      0     1   2   3   4          rows   2048  64  64  64  64
    calls     [0]   [1 . . . . . 4]         work   2048  +  4 x 64

What reads counts and slots from tensors takes all output tokens with equally many queries in one call.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Padded rows may be this share of the rows that count. Below 64 rows a call costs more than what it would save.
_MAX_PADDING = 0.2
_CHEAP_ROWS = 64
# Rows of calls that one recording serves: this, then twice as many, and so on.
LEAST_FIXED_ROWS = 256
_ALIGNED = 4  # int32 in 16 bytes: Triton compiles a kernel anew for pointers that are less


class Span(NamedTuple):  # a tuple because every sequence of every step makes one per layer group
    """One sequence of the step as one layer group sees it.

    Attributes:
        slot: where its rows are.
        start: its first token in the packed [N].
        num_queries: its tokens in this step.
        num_past: rows before them, all of them visible to each.
        is_prompt: a prompt chunk, not output tokens.
        is_prompt_end: the chunk that ends the prompt.
    """

    slot: int
    start: int
    num_queries: int
    num_past: int
    is_prompt: bool
    is_prompt_end: bool

    @property
    def tokens(self) -> range:
        return range(self.start, self.start + self.num_queries)

    @property
    def num_rows(self) -> int:
        return self.num_past + self.num_queries


@dataclasses.dataclass(frozen=True)
class Planes:
    """KV heads of different lengths, each by itself.

    Attributes:
        index: [2, L, B * H_kv] int32: rows that the last token of the sequence sees, and which row of the layer is the
            first of them.
        num_rows: of the longest.
    """

    index: Tensor
    num_rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One backend call: neighbouring slots, equally many queries each, one row count.

    Attributes:
        spans: the sequences, packed tokens consecutive, and slots too unless `cut` was told that any can share.
        num_rows: rows read of each: the largest of the spans.
        mask: additive in the compute dtype, [B, 1, 1, R] or [B, 1, G * Q, R] (output tokens), [n, R] (prompt chunk);
            None where every query sees every row, or where `is_causal` says which.
        index: [2, B'] int32, B' >= B: counts, then slots, where `cut` was told that they are read from there.
        planes: the KV heads, where the group is ragged and `index` is read.
        is_fixed: `spans` say how many sequences there are and nothing else.
    """

    spans: tuple[Span, ...]
    num_rows: int
    mask: Tensor | None
    is_causal: bool
    device: torch.device
    index: Tensor | None = None
    planes: Planes | None = None
    is_fixed: bool = False

    @functools.cached_property
    def counts(self) -> Tensor:
        """[B] int32 rows of each sequence: what its last token sees. For kernels that need no mask."""
        assert self.index is not None
        return self.index[0, : len(self.spans)]

    @functools.cached_property
    def slot_ids(self) -> Tensor:
        """[B] int32."""
        assert self.index is not None
        return self.index[1, : len(self.spans)]

    def fixed(self, most: int, *, most_of_plane: int = 0) -> "Call":
        """The same with nothing in Python that other steps with as many sequences and tokens would have otherwise:
        rows are rounded up, to at most `most` (those of a plane to `most_of_plane`); what is beyond a count is not
        read."""
        planes = self.planes
        if planes is not None:
            planes = dataclasses.replace(planes, num_rows=_rounded(planes.num_rows, most_of_plane))
        spans = _fixed_spans(len(self.spans), self.num_queries)
        return dataclasses.replace(
            self, spans=spans, num_rows=_rounded(self.num_rows, most), planes=planes, is_fixed=True
        )

    @functools.cached_property
    def past(self) -> tuple[int, ...]:
        """[B] rows before the tokens of each sequence."""
        return tuple(span.num_past for span in self.spans)

    @property
    def is_prompt(self) -> bool:
        return self.spans[0].is_prompt

    @property
    def num_queries(self) -> int:
        return self.spans[0].num_queries

    @property
    def tokens(self) -> slice:
        return slice(self.spans[0].start, self.spans[-1].start + self.num_queries)

    @property
    def slots(self) -> slice:
        return slice(self.spans[0].slot, self.spans[-1].slot + 1)

    @functools.cached_property
    def where(self) -> slice | Tensor:
        """Indexes the slots in their order, whether they are neighbours or not."""
        if self.is_fixed:
            return self.slot_ids
        slots = [span.slot for span in self.spans]
        if slots == list(range(slots[0], slots[-1] + 1)):
            return self.slots
        return torch.tensor(slots, device=self.device)

    @property
    def work(self) -> int:
        """Rows times queries."""
        return len(self.spans) * self.num_queries * self.num_rows


def cut(
    spans: Sequence[Span],
    *,
    num_groups: int,
    dtype: torch.dtype,
    device: torch.device,
    has_tables: bool = False,
    is_ragged: bool = False,
    is_indexed: bool = False,
) -> tuple[Call, ...]:
    """The calls of a step, in packed order.

    Args:
        has_tables: any slots can share a call, since what reads them is told where the rows of each are.
        is_ragged: output tokens are read by what takes sequences of any lengths: none is padded and no mask is needed.
        is_indexed: and by what finds counts and slots in tensors.
    """
    runs: list[list[Span]] = []
    longest = total = 0
    for span in spans:
        rows = span.num_rows
        if runs and _are_neighbours(runs[-1][-1], span, has_tables):
            padding = max(longest, rows) * (len(runs[-1]) + 1) - total - rows
            if is_ragged or padding <= max(_MAX_PADDING * (total + rows), _CHEAP_ROWS):
                runs[-1].append(span)
                longest, total = max(longest, rows), total + rows
                continue
        runs.append([span])
        longest = total = rows
    return tuple(_call(run, num_groups, dtype, device, is_ragged, is_indexed) for run in runs)


def _are_neighbours(last: Span, span: Span, has_tables: bool) -> bool:
    is_output = not (span.is_prompt or last.is_prompt)
    return is_output and (has_tables or span.slot == last.slot + 1) and span.num_queries == last.num_queries


def _call(
    run: list[Span], num_groups: int, dtype: torch.dtype, device: torch.device, is_ragged: bool, is_indexed: bool
) -> Call:
    first = run[0]
    num_rows = max(span.num_rows for span in run)
    is_causal = first.is_prompt and first.num_past == 0
    needs_mask = not is_causal and (first.is_prompt or not is_ragged)
    mask = None
    if needs_mask and (first.num_queries > 1 or any(span.num_rows != num_rows for span in run)):
        past = torch.tensor([span.num_past for span in run], device=device)
        query = torch.arange(first.num_queries, device=device)
        is_hidden = torch.arange(num_rows, device=device) > (past[:, None] + query)[..., None]  # [B, Q, R]
        mask = torch.zeros(is_hidden.shape, dtype=dtype, device=device).masked_fill_(is_hidden, float("-inf"))
        if not first.is_prompt and first.num_queries > 1:
            mask = mask.repeat(1, num_groups, 1)
        mask = mask[:, None]
    index = None
    if is_indexed and not first.is_prompt:
        padding = [0] * (-len(run) % _ALIGNED)
        facts = [[span.num_rows for span in run] + padding, [span.slot for span in run] + padding]
        index = torch.tensor(facts, dtype=torch.int32, device=device)
    return Call(spans=tuple(run), num_rows=num_rows, mask=mask, is_causal=is_causal, device=device, index=index)


def _rounded(num_rows: int, most: int) -> int:
    return min(max(LEAST_FIXED_ROWS, 1 << (num_rows - 1).bit_length()), most)


@functools.lru_cache(maxsize=1024)
def _fixed_spans(num_sequences: int, num_queries: int) -> tuple[Span, ...]:
    return tuple(Span(-1, index * num_queries, num_queries, 0, False, False) for index in range(num_sequences))

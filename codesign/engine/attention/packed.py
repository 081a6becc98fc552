"""Tokens of many sequences, outputs and prompts alike, in one call of the compiled kernel as they lie packed in a step.

A sequence with many tokens, a prompt, is cut into pieces that all read the same rows: enough for every thread, and rows
that come after a piece are not read for it. Nothing is padded, copied together or masked.

    step          s0 s1 s2   p p p p p p p p        three sequences with one token each, and a prompt chunk
    pieces        0  1  2    3 3 3 3 4 4 4 4

What a token gets does not depend on the piece it is in nor on its neighbours: the kernel adds rows up in parts that
depend on their number alone.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from codesign.engine.kernels.kv_attention import Queries

_PIECE = 32  # tokens
_AT_ONCE = 512  # tokens in one call, so that its memory grows with the rows alone


@dataclasses.dataclass(frozen=True)
class PackedCall:
    """Pieces of sequences that go into one call.

    Attributes:
        tokens: of the packed ones.
        of: [B] which sequence each piece is of.
        past: [B] rows before its first token.
        num_tokens: [B]
        num_rows: that the longest reads.
    """

    tokens: slice
    of: tuple[int, ...]
    past: tuple[int, ...]
    num_tokens: tuple[int, ...]
    num_rows: int


def cut(sequences: Sequence[tuple[int, int]]) -> tuple[PackedCall, ...]:
    """Sequences as (rows before its tokens, tokens), packed one after the other, as few calls as may be."""
    calls: list[list[tuple[int, int, int]]] = []
    taken = _AT_ONCE
    for piece in _pieces(sequences):
        if taken + piece[2] > _AT_ONCE:
            calls.append([])
            taken = 0
        calls[-1].append(piece)
        taken += piece[2]
    found, start = [], 0
    for own in calls:
        of, past, num_tokens = zip(*own, strict=True)
        tokens = slice(start, start + sum(num_tokens))
        found.append(PackedCall(tokens, of, past, num_tokens, max(map(sum, zip(past, num_tokens, strict=True)))))
        start = tokens.stop
    return tuple(found)


def _pieces(sequences: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(sequence, rows before, tokens) of pieces that are as even as can be."""
    for index, (num_past, num_tokens) in enumerate(sequences):
        count = -(-num_tokens // _PIECE)
        edges = [num_tokens * i // count for i in range(count + 1)]
        for first, last in itertools.pairwise(edges):
            yield index, num_past + first, last - first


def attend(
    query: Tensor, calls: Sequence[PackedCall], run: Callable[[Queries, int], None], *, num_kv_heads: int, scale: float
) -> Tensor:
    """[N, H, D] for the packed query [N, H, D].

    Args:
        run: attends to the rows of a call, given its queries and its number.
    """
    out = query.new_empty(query.shape)  # contiguous, whatever the query is
    for number, own in enumerate(calls):
        is_all = len(calls) == 1
        queries = Queries(
            query if is_all else query[own.tokens],
            own.past,
            num_kv_heads=num_kv_heads,
            num_tokens=own.num_tokens,
            num_rows=own.num_rows,
            scale=scale,
            want_columns=False,
            out=out if is_all else out[own.tokens],
        )
        run(queries, number)
    return out

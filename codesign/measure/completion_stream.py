"""One streamed completion: from the pieces that a server sends to tokens with times.

An OpenAI-compatible server streams text. How many tokens a piece holds is taken from what says it best:

    choices[0].token_ids                    vLLM with `return_token_ids`: exact, with the ids
    usage.completion_tokens in each piece   vLLM with `continuous_usage_stats`: exact
    usage.completion_tokens at the end      the total is exact; a piece with text is one token, then one without text,
                                            and what is left came with the last piece
    nothing                                 a piece with text is one token

All tokens of a piece have its time: a server that sends several at once (speculation, or a client that reads late)
shows gaps of 0 between them and one long gap before them, which is what its reader sees.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from codesign.measure.session import TokenEvent, TrialFailed
from codesign.results.record import Outcome
from codesign.spec.request import Request

_FINISH_REASONS = ("stop", "length")


@dataclasses.dataclass(frozen=True)
class _Piece:
    time_s: float
    has_text: bool
    token_ids: tuple[int, ...] | None
    total: int | None  # tokens so far, as the server counts them


class CompletionStream:
    """The answer to one request as it comes in.

    Args:
        sent_s: when the request left.
    """

    def __init__(self, request: Request, *, sent_s: float) -> None:
        self._request, self._sent_s = request, sent_s
        self._pieces: list[_Piece] = []
        self._total: int | None = None
        self._finish_reason = ""

    @property
    def num_pieces(self) -> int:
        return len(self._pieces)

    def hear(self, chunk: Any, time_s: float) -> None:
        """Takes one `data:` document.

        Raises:
            TrialFailed: `protocol` when it is none, `crashed` when the server reports an error in it.
        """
        if not isinstance(chunk, Mapping):
            raise self._fault("not a mapping")
        if chunk.get("error") is not None:
            raise TrialFailed(
                Outcome(kind="crashed", detail=f"the server ended the stream: {ascii(chunk['error'])[:300]}")
            )
        total = self._hear_usage(chunk.get("usage"))
        choices = chunk.get("choices")
        if not isinstance(choices, list) or len(choices) > 1:
            raise self._fault("choices must be a list of at most one")
        for choice in choices:
            self._hear_choice(choice, total, time_s)

    def events(self) -> list[TokenEvent]:
        """The whole answer, once the stream has ended.

        Raises:
            TrialFailed: `crashed` when it ended without a reason, `protocol` when it holds no token.
        """
        if not self._finish_reason:
            raise TrialFailed(Outcome(kind="crashed", detail="the stream ended before the completion did"))
        tokens = [
            (token_id, piece.time_s)
            for piece, ids in zip(self._pieces, self._token_ids(), strict=True)
            for token_id in ids
        ]
        if not tokens:
            raise self._fault("the completion holds no token")
        last = len(tokens) - 1
        return [
            TokenEvent(
                self._request.request_id,
                token_id,
                time_s,
                self._finish_reason if index == last else "",
                self._sent_s,
            )
            for index, (token_id, time_s) in enumerate(tokens)
        ]

    def _hear_usage(self, usage: Any) -> int | None:
        if usage is None:
            return None
        prompt, total = (
            usage.get(key) if isinstance(usage, Mapping) else None for key in ("prompt_tokens", "completion_tokens")
        )
        if type(prompt) is not int or type(total) is not int:
            raise self._fault("usage must count prompt_tokens and completion_tokens")
        if prompt != len(self._request.prompt_token_ids):
            raise self._fault(f"the server counts {prompt} prompt tokens of {len(self._request.prompt_token_ids)}")
        before, most = self._total or 0, self._request.sampling.max_tokens
        if not before <= total <= most:
            raise self._fault(f"{total} completion tokens after {before}, at most {most}")
        self._total = total
        return total

    def _hear_choice(self, choice: Any, total: int | None, time_s: float) -> None:
        if not isinstance(choice, Mapping) or not isinstance(choice.get("text"), str):
            raise self._fault("a choice without a text")
        if self._finish_reason:
            raise self._fault("a choice after the end")
        ids = choice.get("token_ids")
        if ids is not None and not (isinstance(ids, list) and all(type(item) is int and item >= 0 for item in ids)):
            raise self._fault("token_ids must be a list of token ids")
        self._pieces.append(_Piece(time_s, bool(choice["text"]), None if ids is None else tuple(ids), total))
        if len(self._pieces) > 2 * self._request.sampling.max_tokens + 16:
            raise self._fault("more pieces than so many tokens can come in")
        reason = choice.get("finish_reason")
        if reason is not None and reason not in _FINISH_REASONS:
            raise TrialFailed(Outcome(kind="crashed", detail=f"the server ended a completion by {ascii(reason)[:80]}"))
        self._finish_reason = reason or ""

    def _token_ids(self) -> list[tuple[int, ...]]:
        """Of each piece; -1 for an id that the server does not say."""
        if any(piece.token_ids for piece in self._pieces):
            ids = [piece.token_ids or () for piece in self._pieces]
            found = sum(map(len, ids))
            if self._total not in (None, found):
                raise self._fault(f"{found} token ids, but {self._total} completion tokens")
            return ids
        counts = self._counts()
        return [(-1,) * count for count in counts]

    def _counts(self) -> list[int]:
        totals = [piece.total for piece in self._pieces]
        if len(totals) > 1 and None not in totals:
            known = [0, *(total or 0 for total in totals)]
            known[-1] = self._total or 0
            return [after - before for before, after in itertools.pairwise(known)]
        counts = [int(piece.has_text) for piece in self._pieces]
        left = 0 if self._total is None else self._total - sum(counts)
        for index, piece in enumerate(self._pieces):
            if left > 0 and not piece.has_text:
                counts[index], left = 1, left - 1
        for index in reversed(range(len(counts))):  # a last piece may flush text that belongs to earlier tokens
            if left < 0 and counts[index]:
                counts[index], left = 0, left + 1
        counts[-1] += max(0, left)
        return counts

    def _fault(self, detail: str) -> TrialFailed:
        return TrialFailed(Outcome(kind="protocol", detail=f"request {self._request.request_id!r}: {detail}"))

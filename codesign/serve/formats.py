"""How the two kinds of answers look on the wire: whole, and as chunks of a stream. Shapes are OpenAI's."""

from collections.abc import Sequence
from typing import Any, Protocol

from codesign.serve.choice import Piece, TokenScore

_LEAST = -9999.0  # what OpenAI says for a token without any probability; JSON has no -inf


class Format(Protocol):
    """Attributes:
    prefix: of the answer's id.
    whole, chunk: `object` of an answer and of a chunk.
    """

    prefix: str
    whole: str
    chunk: str

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of the chunk that begins a stream, if there is one."""

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """The choice of a chunk."""

    def choice(self, index: int, text: str, finish_reason: str, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """A choice of a whole answer."""


class CompletionFormat:
    """/v1/completions: plain text."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def opening(self, index: int) -> None:
        return None

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        scores = [piece.score] if piece.score else []
        return self._choice(index, piece.text, piece.finish_reason or None, scores)

    def choice(self, index: int, text: str, finish_reason: str, scores: Sequence[TokenScore]) -> dict[str, Any]:
        return self._choice(index, text, finish_reason, scores)

    def _choice(self, index: int, text: str, reason: str | None, scores: Sequence[TokenScore]) -> dict[str, Any]:
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": _by_column(scores)}


class ChatFormat:
    """/v1/chat/completions: a message, streamed as what is added to it."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": piece.text} if piece.text else {},
            "finish_reason": piece.finish_reason or None,
            "logprobs": _by_token([piece.score] if piece.score else []),
        }

    def choice(self, index: int, text: str, finish_reason: str, scores: Sequence[TokenScore]) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": finish_reason,
            "logprobs": _by_token(scores),
        }


def _by_column(scores: Sequence[TokenScore]) -> dict[str, Any] | None:
    if not scores:
        return None
    return {
        "tokens": [score.text for score in scores],
        "token_logprobs": [_finite(score.logprob) for score in scores],
        "top_logprobs": [_by_text(score.likeliest) for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def _by_text(likeliest: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Different tokens can read the same, such as parts of a character: the likeliest of them counts."""
    found: dict[str, float] = {}
    for text, value in likeliest:
        found.setdefault(text, _finite(value))
    return found


def _by_token(scores: Sequence[TokenScore]) -> dict[str, Any] | None:
    if not scores:
        return None
    return {
        "content": [
            {**_token(score.text, score.logprob), "top_logprobs": [_token(*pair) for pair in score.likeliest]}
            for score in scores
        ],
        "refusal": None,
    }


def _token(text: str, logprob: float) -> dict[str, Any]:
    is_whole = "\ufffd" not in text
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if is_whole else None}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)

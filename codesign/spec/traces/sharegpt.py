"""ShareGPT conversations: a JSON list of real dialogues, of which the first question and its answer are used.

    [{"id": "a", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]}, ...]

As in vLLM's serving benchmark. There are no times in it. The file is read piece by piece, since the published ones
are larger than what one wants in memory.
"""

import codecs
import itertools
from collections.abc import Iterator
from typing import Any, BinaryIO

from codesign.errors import InputError, shown
from codesign.spec.traces.request import DECODER, TraceRequest

_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")
_PIECE_BYTES = 2**20
_MAX_CHARACTERS = 4 * 2**20  # of one conversation
_BLANK = " \t\r\n"


def requests(stream: BinaryIO, file: str) -> Iterator[TraceRequest]:
    """Conversations with a question and an answer right after it; others, and empty texts, are left out.

    Raises:
        InputError: not such a list; names the conversation, counted from 0.
    """
    for index, item in enumerate(_elements(stream, file)):
        key = f"[{index}].conversations"
        turns = item.get("conversations")
        if not isinstance(turns, list):
            raise InputError(f"must be a list of turns, got {shown(turns)}", file=file, key=key)
        said = [_turn(turn, file, f"{key}[{place}]") for place, turn in enumerate(turns)]
        for (asker, question), (answerer, answer) in itertools.pairwise(said):
            if asker in _ASKS and answerer in _ANSWERS and question.strip() and answer.strip():
                yield TraceRequest(prompt_text=question, output_text=answer)
                break


def _turn(turn: Any, file: str, key: str) -> tuple[str, str]:
    speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if not isinstance(speaker, str) or not isinstance(text, str):
        raise InputError(f"must be a mapping with the texts from and value, got {shown(turn)}", file=file, key=key)
    return speaker, text.encode("utf-8", "replace").decode()  # a tokenizer takes no lone surrogates


def _elements(stream: BinaryIO, file: str) -> Iterator[dict[str, Any]]:
    """The mappings of a JSON list, one at a time."""
    pieces, index = _Pieces(stream), 0
    try:
        if pieces.take() != "[":
            raise InputError("must be a JSON list of conversations", file=file)
        while True:
            if pieces.peek() != "{":
                raise ValueError(f"must be a mapping, got {shown(pieces.peek())}")
            yield pieces.value()
            after = pieces.take()
            if after == "]":
                return
            if after != ",":
                raise ValueError(f"must be followed by a comma or the end of the list, got {shown(after)}")
            index += 1
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text", file=file, key=f"[{index}]") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON that can be read: {error}", file=file, key=f"[{index}]") from None


class _Pieces:
    """A JSON text that is read as far as it is needed. ValueError where it is none."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at, self._is_ended = "", 0, False

    def peek(self) -> str:
        """The next character that is not blank, "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _BLANK:
                    return self._text[self._at]
                self._at += 1
            if self._is_ended:
                return ""
            self._read()

    def take(self) -> str:
        """As `peek`, and goes on behind it."""
        found = self.peek()
        self._at += len(found)
        return found

    def value(self) -> Any:
        """The mapping that begins here."""
        while True:
            try:
                value, self._at = DECODER.raw_decode(self._text, self._at)
                return value
            except ValueError:  # it may just not be there yet
                if self._is_ended or len(self._text) - self._at > _MAX_CHARACTERS:
                    raise
            self._read()

    def _read(self) -> None:
        piece = self._stream.read(_PIECE_BYTES)
        self._is_ended = not piece
        self._text, self._at = self._text[self._at :] + self._decode(piece, final=self._is_ended), 0

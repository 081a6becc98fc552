"""Text from tokens as they come. One character may need several tokens, and how a token reads may depend on those
before it, so a window of the last tokens is decoded again at each step and only what is settled is given out.
"""

from collections.abc import Callable, Sequence

_OPEN = "\ufffd"  # how a decoder shows bytes that are no character (yet)
_MAX_OPEN = 3  # characters of UTF-8 have up to 4 bytes; some decoders show each byte that lacks its others
_NUM_CONTEXT = 6


class Detokenizer:
    """add(token) -> settled text;  at the end of the output: finish() -> the rest.

    All pieces together are the text of all tokens after the context, as one decoding of everything gives it. (But for
    decoders that take back a whole run of byte tokens when a later one of them is no UTF-8: sent is sent.)

    Args:
        decode: token ids to text.
        context: tokens before the first; their end decides whether a word begins with a space.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context[-_NUM_CONTEXT:])
        text = decode(self._window) if self._window else ""
        if text.endswith(_OPEN):  # cut within a character: no context is better than a broken one
            self._window, text = [], ""
        self._num_sent = len(text)
        self._num_closed = len(self._window)  # tokens of the window up to its last end of a character

    def add(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        num_open = len(text) - len(text.rstrip(_OPEN))
        settled = text[: len(text) - min(num_open, _MAX_OPEN)]
        piece = settled[self._num_sent :]
        self._num_sent = max(self._num_sent, len(settled))
        if not num_open:
            self._slide()
        return piece

    def finish(self) -> str:
        """What is still open, as the decoder shows it."""
        piece = self._decode(self._window)[self._num_sent :] if self._window else ""
        self._num_sent += len(piece)
        return piece

    def _slide(self) -> None:
        """Lets go of tokens before the last end of a character but one: later tokens read the same without them."""
        del self._window[: self._num_closed]
        self._num_closed = len(self._window)
        self._num_sent = len(self._decode(self._window))

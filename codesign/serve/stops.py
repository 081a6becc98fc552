"""Stop strings in a text that arrives in pieces.

The text ends before the match that is complete first; of several that are complete at the same character, before the
longest. What could still become a match is held back, so that nothing is sent that must be taken back, and how the
text was cut into pieces never shows.
"""

from collections.abc import Sequence


class StopMatcher:
    """add(piece) -> text that may be sent;  at the end of the output: finish() -> the rest."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def add(self, piece: str) -> str:
        """The text that is settled now. Once `is_stopped`, it was the last."""
        if not self._stops:
            return piece
        text = self._held + piece
        # Nothing before the held text can be part of a match, so the first match is in here.
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            self.is_stopped, self._held = True, ""
            return text[: min(matches)[1]]
        length = self._num_open(text)
        self._held = text[len(text) - length :]
        return text[: len(text) - length]

    def finish(self) -> str:
        """What was held back and is no match after all."""
        held, self._held = self._held, ""
        return held

    def _num_open(self, text: str) -> int:
        """Characters of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

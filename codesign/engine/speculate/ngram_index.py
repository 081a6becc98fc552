"""NgramIndex: where in a text its last n tokens occurred before, at a constant price per token.

    h_n(t) = sum over j < n of token[t - j] · B^j  mod 2^61 - 1      of the n tokens that end at t, from h_n(t - 1)
    last[n][h] = where the text went on after them, most recently

A hash names tokens, it does not prove them: what is found is compared with the text.
"""

from collections.abc import Sequence

_PRIME = (1 << 61) - 1
_BASE = 1_000_003


class NgramIndex:
    """Follows a text that only grows.

    Args:
        min_ngram, max_ngram: lengths of the suffixes that are looked up.
    """

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._drop = {n: pow(_BASE, n, _PRIME) for n in self._sizes}
        self._hash = dict.fromkeys(self._sizes, 0)
        self._last: dict[int, dict[int, int]] = {n: {} for n in self._sizes}
        self._num_tokens = 0

    def propose(self, text: Sequence[int], num_tokens: int) -> tuple[int, ...]:
        """What followed the longest suffix that occurred before, where it occurred last; empty when none did.

        A match that runs into the end of the text goes on with what it proposes, as in LZ77: after `a b a b` come
        `a b a b ...`.
        """
        self._extend(text)
        for n in self._sizes:
            start = self._last[n].get(self._hash[n], 0) if n < len(text) else 0
            if start and text[start - n : start] == text[len(text) - n :]:
                found = list(text[start : start + num_tokens])
                while len(found) < num_tokens:
                    found.append(found[start - len(text)])
                return tuple(found)
        return ()

    def _extend(self, text: Sequence[int]) -> None:
        """Hashes of the suffixes of the whole text; what ends before its last token is entered."""
        for index in range(self._num_tokens, len(text)):
            for n in self._sizes:
                if index >= n:
                    self._last[n][self._hash[n]] = index
                value = self._hash[n] * _BASE + text[index] + 1
                if index >= n:
                    value -= (text[index - n] + 1) * self._drop[n]
                self._hash[n] = value % _PRIME
        self._num_tokens = len(text)

"""Where the tokens of prompts come from: text that is cut where it is needed, or random ids without a tokenizer."""

import random
from collections.abc import Sequence
from typing import Protocol


class TokenSource(Protocol):
    """Where prompt tokens come from."""

    def take(self, rng: random.Random, count: int) -> tuple[int, ...]:
        """`count` token ids."""


class TextTokens:
    """Slices of tokenised text from random places, each behind three random tokens of the text: even two slices from
    the same place share no prefix that a cache could use."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._ids = [token for ids in texts for token in ids]
        if not self._ids:
            raise ValueError("no text to take prompts from")

    def take(self, rng: random.Random, count: int) -> tuple[int, ...]:
        start = rng.randrange(len(self._ids))
        taken = [*rng.choices(self._ids, k=3), *self._ids[start : start + count]][:count]
        while len(taken) < count:
            taken += self._ids[: count - len(taken)]
        return tuple(taken)


class RandomTokens:
    """Uniform token ids, for a model with random weights, which has no tokenizer."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def take(self, rng: random.Random, count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(self._vocab_size) for _ in range(count))

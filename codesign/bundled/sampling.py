"""Training sequences: windows of the training text, some of them with retrieval pairs; each token's loss has a weight.

    window:     code code code code code ...
    retrieval:  code  # key abc = 12345  code ...  # recall abc = 12345        (several pairs, at random places)
    repeat:     a run of code or of random tokens, again and again             (early on: teaches looking back)

Random digits that nobody could predict weigh nothing; recalled digits weigh more, because copying appears late and
suddenly.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from codesign.bundled.retrieval import NUM_DIGITS, Pair, random_pairs

RECALLED_WEIGHT = 3.0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`token_ids`, `labels` [B, T] int64; `weights` [B, T] of each label's loss."""

    token_ids: Tensor
    labels: Tensor
    weights: Tensor


class Sampler:
    """Endless random batches from `text_ids`, one long uint16 array."""

    def __init__(self, text_ids: np.ndarray, tokenizer: Tokenizer) -> None:
        self.text_ids = text_ids
        self.tokenizer = tokenizer
        self.rng = random.Random()

    def batch(self, num_sequences: int, num_tokens: int, *, retrieval: float, repeat: float) -> Batch:
        """`retrieval` and `repeat` are the shares of sequences of these kinds."""
        rows = []
        for _ in range(num_sequences):
            draw = self.rng.random()
            if draw < retrieval:
                rows.append(self._retrieval(num_tokens + 1))
            elif draw < retrieval + repeat:
                rows.append(self._repeat(num_tokens + 1))
            else:
                rows.append((self._window(num_tokens + 1), [1.0] * (num_tokens + 1)))
        ids = torch.tensor([ids for ids, _ in rows])
        weights = torch.tensor([weights for _, weights in rows])
        return Batch(
            token_ids=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous(), weights=weights[:, 1:].contiguous()
        )

    def _window(self, num_tokens: int) -> list[int]:
        start = self.rng.randrange(len(self.text_ids) - num_tokens)
        window: list[int] = self.text_ids[start : start + num_tokens].tolist()
        return window

    def _repeat(self, num_tokens: int) -> tuple[list[int], list[float]]:
        """A run said again and again: of text, or of random tokens, which nothing but looking back can predict."""
        is_random = self.rng.random() < 0.6
        period = self.rng.randint(8, num_tokens // 3)
        run = (
            self.rng.choices(range(1, self.tokenizer.get_vocab_size()), k=period) if is_random else self._window(period)
        )
        weights = [0.0 if is_random else 1.0] * period + [1.0] * (num_tokens - period)
        return (run * (num_tokens // period + 1))[:num_tokens], weights

    def _retrieval(self, num_tokens: int) -> tuple[list[int], list[float]]:
        most = max(1, min(12, num_tokens // 50))
        pairs = random_pairs(self.rng, min(self.rng.randint(1, most), self.rng.randint(1, most)))
        told = [self._told(pair) for pair in pairs]
        recalled = [self._recalled(pair) for pair in pairs]
        num_filler = num_tokens - sum(len(ids) for ids, _ in told + recalled)
        filler = self._window(num_filler)
        # (place in the filler, tie-break, tokens): told lines before their recalled line, half of these at the very end
        inserts: list[tuple[float, tuple[list[int], list[float]]]] = []
        for told_line, recalled_line in zip(told, recalled, strict=True):
            place = self.rng.random() * self.rng.random()
            at_end = self.rng.random() < 0.5
            inserts.append((place * num_filler, told_line))
            inserts.append((num_filler if at_end else self.rng.uniform(place, 1) * num_filler, recalled_line))
        ids: list[int] = []
        weights: list[float] = []
        done = 0
        for place, (line_ids, line_weights) in sorted(inserts, key=lambda insert: insert[0]):
            ids += filler[done : int(place)] + line_ids
            weights += [1.0] * (int(place) - done) + line_weights
            done = int(place)
        return ids + filler[done:], weights + [1.0] * (num_filler - done)

    def _told(self, pair: Pair) -> tuple[list[int], list[float]]:
        ids = self.tokenizer.encode("\n" + pair.told).ids
        return ids, [0.0] * len(ids)

    def _recalled(self, pair: Pair) -> tuple[list[int], list[float]]:
        ids = self.tokenizer.encode(pair.recalled).ids
        return ids, [0.0] * (len(ids) - NUM_DIGITS - 1) + [RECALLED_WEIGHT] * NUM_DIGITS + [1.0]

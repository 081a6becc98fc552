"""Unigram and bigram models, the yardsticks that say what a perplexity means.

unigram  p(b)     = (n(b) + 1) / (N + V)
bigram   p(b | a) = (n(a, b) + t(a) p(b)) / (n(a) + t(a))      t(a): how many different tokens followed a (Witten,
Bell 1991)
"""

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int64]


def unigram(train_ids: TokenIds, vocab_size: int) -> NDArray[np.float64]:
    """[V] probabilities, one added to every count."""
    counts = np.bincount(train_ids, minlength=vocab_size) + 1.0
    probabilities: NDArray[np.float64] = counts / counts.sum()
    return probabilities


def unigram_nats(train_ids: TokenIds, text_ids: TokenIds, vocab_size: int) -> NDArray[np.float64]:
    """[T - 1]: the surprise at each of `text_ids` but the first, which has no predecessor for the bigram either."""
    nats: NDArray[np.float64] = -np.log(unigram(train_ids, vocab_size)[text_ids[1:]])
    return nats


def bigram_nats(train_ids: TokenIds, text_ids: TokenIds, vocab_size: int) -> NDArray[np.float64]:
    """[T - 1]: the surprise at each of `text_ids` after the one before it."""
    pairs, pair_counts = np.unique(train_ids[:-1] * vocab_size + train_ids[1:], return_counts=True)
    num_followers = np.bincount(pairs // vocab_size, minlength=vocab_size)
    num_before = np.bincount(train_ids[:-1], minlength=vocab_size)
    before, after = text_ids[:-1], text_ids[1:]
    wanted = before * vocab_size + after
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    counts = np.where(pairs[place] == wanted, pair_counts[place], 0)
    backed_off = unigram(train_ids, vocab_size)[after]
    followers, seen = num_followers[before], num_before[before]
    known = seen > 0
    mixed = (counts + followers * backed_off) / np.where(known, seen + followers, 1)
    nats: NDArray[np.float64] = -np.log(np.where(known, mixed, backed_off))
    return nats

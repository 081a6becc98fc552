import numpy as np

from codesign.bundled.ngram import bigram_nats, unigram_nats


def test_bigram_probabilities_after_any_token_sum_to_one() -> None:
    train = np.random.default_rng(0).integers(0, 7, 400)
    for before in range(8):  # 7 is never seen
        nats = [bigram_nats(train, np.array([before, after]), 8)[0] for after in range(8)]

        np.testing.assert_allclose(np.exp(-np.array(nats)).sum(), 1.0)


def test_bigram_beats_unigram_on_ordered_text() -> None:
    train = np.arange(1000) % 10

    assert bigram_nats(train, train[:50], 10).mean() < unigram_nats(train, train[:50], 10).mean()

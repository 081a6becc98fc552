import time

from hypothesis import given
from hypothesis import strategies as st

from codesign.engine.speculate import ngram_index
from codesign.engine.speculate.ngram_index import NgramIndex


def slow(text: list[int], min_ngram: int, max_ngram: int, count: int) -> tuple[int, ...]:
    """The longest suffix that stood before, at its most recent place, by looking at every place."""
    for n in range(min(max_ngram, len(text) - 1), min_ngram - 1, -1):
        for start in range(len(text) - 1, n - 1, -1):
            if text[start - n : start] == text[-n:]:
                found = list(text)
                for step in range(count):
                    found.append(found[start + step])
                return tuple(found[len(text) :])
    return ()


@given(
    text=st.lists(st.integers(0, 2), min_size=1, max_size=40),
    sizes=st.tuples(st.integers(1, 4), st.integers(0, 3)),
    count=st.integers(1, 6),
    steps=st.lists(st.integers(0, 40), max_size=4),
)
def test_proposals_are_those_of_a_search_through_the_whole_text(
    text: list[int], sizes: tuple[int, int], count: int, steps: list[int]
) -> None:
    min_ngram, max_ngram = sizes[0], sum(sizes)
    index = NgramIndex(min_ngram, max_ngram)
    for length in sorted({*(min(len(text), max(1, step)) for step in steps), len(text)}):
        part = text[:length]
        assert index.propose(part, count) == slow(part, min_ngram, max_ngram, count)


@given(text=st.lists(st.integers(0, 3), min_size=2, max_size=40))
def test_tokens_that_merely_share_a_hash_are_not_taken(text: list[int]) -> None:
    """With a modulus of 5 nearly everything collides; what is proposed did follow the same tokens all the same."""
    before, ngram_index._PRIME = ngram_index._PRIME, 5
    try:
        found = NgramIndex(2, 3).propose(text, 2)
    finally:
        ngram_index._PRIME = before
    places = [i for i in range(2, len(text)) if text[i - 2 : i] == text[-2:]]

    assert not found or any(found[0] == text[place] for place in places)


def test_a_match_that_reaches_the_end_goes_on_with_itself() -> None:
    assert NgramIndex(1, 2).propose([7, 1, 2, 1, 2], 5) == (1, 2, 1, 2, 1)


def test_nothing_is_proposed_where_nothing_repeats() -> None:
    assert NgramIndex(1, 4).propose(list(range(50)), 5) == ()
    assert NgramIndex(1, 4).propose([3], 5) == ()


def test_a_step_costs_no_more_in_a_long_text() -> None:
    """A hundred times the text; the time of a step may not even triple (it would grow a hundredfold by searching)."""

    def per_step(num_tokens: int) -> float:
        text = [(7 * i * i) % 1009 for i in range(num_tokens)]
        index = NgramIndex(2, 4)
        index.propose(text, 4)
        walls = []
        for step in range(200):
            text.append(step % 50)
            started = time.perf_counter()
            index.propose(text, 4)
            walls.append(time.perf_counter() - started)
        return sorted(walls)[len(walls) // 2]

    assert per_step(100_000) < 3 * per_step(1_000)

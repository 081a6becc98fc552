"""Stop strings: whatever the pieces, the text ends before the first match, and nothing sent is taken back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codesign.serve.stops import StopMatcher

LETTERS = st.text("ab\u00e9", max_size=24)
STOPS = st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=4)


def slow_oracle(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: at the first end of a match, the longest match is cut off."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return text[: end - max(map(len, matches))], True
    return text, False


def in_pieces(matcher: StopMatcher, pieces: list[str]) -> str:
    sent = ""
    for piece in pieces:
        sent += matcher.add(piece)
        if matcher.is_stopped:
            return sent
    return sent + matcher.finish()


@given(pieces=st.lists(LETTERS, max_size=8), stops=STOPS)
def test_any_cut_into_pieces_gives_what_the_oracle_says(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)

    assert (in_pieces(matcher, pieces), matcher.is_stopped) == slow_oracle("".join(pieces), stops)


@given(pieces=st.lists(LETTERS, max_size=8), stops=STOPS)
def test_only_what_may_become_a_match_is_held_back(pieces: list[str], stops: list[str]) -> None:
    matcher, sent, seen = StopMatcher(stops), "", ""
    for piece in pieces:
        seen += piece
        sent += matcher.add(piece)
        if matcher.is_stopped:
            break
        held = seen[len(sent) :]
        assert seen == sent + held
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["one two", " three"], ["two"], "one "),
        (["on", "e t", "w", "o"], ["two"], "one "),
        (["caf", "\u00e9", "!"], ["\u00e9!"], "caf"),
        (["abc"], ["c", "bc"], "a"),
        (["aab"], ["ab", "aa"], ""),
        (["\n", "\n", "x"], ["\n\n"], ""),
    ],
)
def test_examples(pieces: list[str], stops: list[str], expected: str) -> None:
    assert in_pieces(StopMatcher(stops), pieces) == expected

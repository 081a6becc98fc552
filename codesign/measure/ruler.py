"""RULER-like samples: synthetic questions whose answer lies somewhere in a long prompt, told in the lines that the
bundled model has learned, so that a small model can be measured at all.

    ... code ...  # key dwq = 48213  ... code ...  # key kfe = 90817  ... code ...  # recall dwq =        48213
    |<----------- context, lines at random depths ----------->|<- output_tokens ->||<- question ->||<- answer ->|

    single_needle      one line; its number is asked for
    multi_key          as many lines as RULER tells, with different names: one is asked for, the others distract
    multi_value        one name told with several numbers; the question says all but one of them, which is the answer
    variable_tracking  chains `# key b = a` of names, told among each other; asked is the number at the start of one
    common_words       one name told with many numbers, as many as fit: one of them ten times, the others once

RULER (Hsieh et al., 2024), https://arxiv.org/abs/2404.06654. Departs from the paper so that each sample has exactly
one answer, a fixed list of tokens that can be forced: it asks for the value that is left instead of all values in any
order, for the number of a name instead of all names of a number, for one common word instead of ten. Words are numbers,
chains are told in pairs (with one, its number would be the only one there is), the haystack is held-out code, and there
is no worked example before the question.
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from codesign.bundled.retrieval import NUM_DIGITS, random_pairs

Encode = Callable[[str], Sequence[int]]

NUM_KEYS, NUM_VALUES = 4, 4  # these, the hops and ten to one are RULER's own
NUM_CHAINS, NUM_HOPS = 2, 4
NUM_COMMON, MAX_WORDS = 10, 10_000
OUTPUT_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class RulerSample:
    """Attributes:
    prompt_ids: end right before the answer; with `answer_ids` exactly as many as was asked for.
    num_context_tokens: how many of them come before the filler and the question that may be forced as output.
    """

    task: str
    prompt_ids: list[int]
    answer_ids: list[int]
    num_context_tokens: int


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """`lines` in the order in which they are told, a `question` and its one `answer`."""

    lines: list[str]
    question: str
    answer: str


Fits = Callable[[Puzzle], bool]


def single_needle(rng: random.Random, fits: Fits) -> Puzzle:
    (pair,) = random_pairs(rng, 1)
    return Puzzle(lines=[pair.told], question=pair.question, answer=pair.value)


def multi_key(rng: random.Random, fits: Fits) -> Puzzle:
    names, values = _names(rng, NUM_KEYS), _values(rng, NUM_KEYS)
    asked = rng.randrange(NUM_KEYS)
    return Puzzle(lines=_told(names, values), question=_asked(names[asked]), answer=values[asked])


def multi_value(rng: random.Random, fits: Fits) -> Puzzle:
    (name,), values = _names(rng, 1), _values(rng, NUM_VALUES)
    *said, left = rng.sample(values, NUM_VALUES)
    recalled = "".join(f"{_asked(name)}{value}\n" for value in said)
    return Puzzle(lines=_told([name] * NUM_VALUES, values), question=recalled + _asked(name), answer=left)


def variable_tracking(rng: random.Random, fits: Fits) -> Puzzle:
    values, names = _values(rng, NUM_CHAINS), _names(rng, NUM_CHAINS * (NUM_HOPS + 1))
    chains = [names[chain::NUM_CHAINS] for chain in range(NUM_CHAINS)]
    told = [iter(_told(chain, [value, *chain[:-1]])) for chain, value in zip(chains, values, strict=True)]
    order = rng.sample([*range(NUM_CHAINS)] * (NUM_HOPS + 1), NUM_CHAINS * (NUM_HOPS + 1))
    asked = rng.randrange(NUM_CHAINS)
    lines = [next(told[chain]) for chain in order]
    return Puzzle(lines=lines, question=_asked(chains[asked][-1]), answer=values[asked])


def common_words(rng: random.Random, fits: Fits) -> Puzzle:
    (name,), (common, other, *more) = _names(rng, 1), _values(rng, MAX_WORDS)

    def puzzle(values: list[str]) -> Puzzle:
        return Puzzle(lines=_told([name] * len(values), values), question=_asked(name), answer=common)

    values = [common] * NUM_COMMON + [other]
    for value in more:
        if not fits(puzzle([*values, value])):
            break
        values.append(value)
    return puzzle(rng.sample(values, len(values)))


TASKS: dict[str, Callable[[random.Random, Fits], Puzzle]] = {
    task.__name__: task for task in (single_needle, multi_key, multi_value, variable_tracking, common_words)
}


def ruler_sample(
    task: str,
    encode: Encode,
    filler_ids: Sequence[int],
    *,
    length_tokens: int,
    seed: int,
    output_tokens: int = OUTPUT_TOKENS,
) -> RulerSample:
    """One sample of `length_tokens`, prompt and answer together; two calls with the same arguments give the same one.

    Args:
        task: a name in TASKS.
        encode: text -> token ids, nothing added at either end.
        filler_ids: the haystack; a window without the answer is chosen by the seed.
        output_tokens: filler between the last place where something can be told and the question.
    Raises:
        ValueError: the lines do not fit, or the filler is too short.
    """
    rng = random.Random(f"{task} {seed}")

    @functools.cache
    def told(line: str) -> tuple[int, ...]:
        return tuple(encode("\n" + line))

    def filler_left(puzzle: Puzzle) -> int:
        used = sum(len(told(line)) for line in puzzle.lines)
        return length_tokens - used - len(encode("\n")) - len(encode(puzzle.question)) - len(encode(puzzle.answer))

    puzzle = TASKS[task](rng, lambda larger: filler_left(larger) >= output_tokens)
    num_filler = filler_left(puzzle)
    if num_filler < output_tokens:
        raise ValueError(
            f"{task}: {length_tokens} tokens cannot hold {len(puzzle.lines)} lines and {output_tokens} tokens of filler"
        )
    answer = list(encode(puzzle.answer))
    filler = _window(filler_ids, num_filler, without=answer, rng=rng)
    free = num_filler - output_tokens
    places = sorted(rng.choices(range(free + 1), k=len(puzzle.lines)))
    context: list[int] = []
    for start, place, line in zip([0, *places], places, puzzle.lines, strict=False):
        context += [*filler[start:place], *told(line)]
    context += filler[places[-1] : free]
    prompt = [*context, *filler[free:], *encode("\n"), *encode(puzzle.question)]
    return RulerSample(task=task, prompt_ids=prompt, answer_ids=answer, num_context_tokens=len(context))


def _told(names: Sequence[str], values: Sequence[str]) -> list[str]:
    return [f"# key {name} = {value}\n" for name, value in zip(names, values, strict=True)]


def _asked(name: str) -> str:
    return f"# recall {name} = "


def _names(rng: random.Random, count: int) -> list[str]:
    return [pair.name for pair in random_pairs(rng, count)]


def _values(rng: random.Random, count: int) -> list[str]:
    """Different numbers of five digits."""
    return [f"{value:0{NUM_DIGITS}}" for value in rng.sample(range(10**NUM_DIGITS), count)]


def _window(ids: Sequence[int], count: int, *, without: Sequence[int], rng: random.Random) -> list[int]:
    """`count` neighbouring tokens in which the answer does not occur."""
    if len(ids) < count:
        raise ValueError(f"{len(ids)} filler tokens; this sample needs {count}")
    starts = range(len(ids) - count + 1)
    for start in rng.sample(starts, min(len(starts), 100)):
        window = list(ids[start : start + count])
        if not any(window[at : at + len(without)] == without for at in range(count)):
            return window
    raise ValueError("the filler holds the answer wherever it is cut")

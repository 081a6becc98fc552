"""Synthetic retrieval: numbers told once, asked for later, the test that KV eviction and coarse caches fail first.

    # key dwq = 48213        told early
    ... code ...             `distance` tokens of filler
    # recall dwq =           asked at the end; the answer is the five digits

Training sequences hold several such pairs; a test prompt holds one asked key among a few others. Standard library
only: the quality suite of the engine makes the same prompts.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

NUM_DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A name and its number."""

    name: str
    value: str

    @property
    def told(self) -> str:
        return f"# key {self.name} = {self.value}\n"

    @property
    def question(self) -> str:
        return f"# recall {self.name} = "

    @property
    def recalled(self) -> str:
        return f"{self.question}{self.value}\n"


def random_pairs(rng: random.Random, count: int) -> list[Pair]:
    """`count` pairs with different names of three to five letters and numbers of five digits."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(ascii_lowercase, k=rng.randint(3, 5)))] = None
    return [Pair(name=name, value="".join(rng.choices("0123456789", k=NUM_DIGITS))) for name in names]


def synthetic_lines(*, seed: int, count: int) -> Iterator[str]:
    """Told and recalled lines, so that a tokenizer has seen their form."""
    for pair in random_pairs(random.Random(seed), count):
        yield pair.told
        yield pair.recalled


@dataclass(frozen=True, kw_only=True)
class RetrievalPrompt:
    """`token_ids` end right before the answer; `distance_tokens` lie between the told line and the question."""

    token_ids: list[int]
    answer: str
    answer_ids: list[int]
    distance_tokens: int


def retrieval_prompt(
    encode: Callable[[str], Sequence[int]],
    filler_ids: Sequence[int],
    *,
    distance_tokens: int,
    seed: int,
    num_distractors: int = 3,
    lead_tokens: int = 64,
) -> RetrievalPrompt:
    """One asked key, told `distance_tokens` before the question, with `num_distractors` other keys told around it.

    Args:
        encode: text -> token ids, nothing added at either end.
        filler_ids: real text, at least `distance_tokens + lead_tokens` ids; a window of it is chosen by the seed.
        lead_tokens: filler before the first told line.
    Raises:
        ValueError: the filler is too short, or the distance cannot hold the distractors.
    """
    rng = random.Random(seed)
    asked, *others = random_pairs(rng, 1 + num_distractors)
    other_ids = [list(encode(pair.told)) for pair in others]
    num_before = rng.randint(0, num_distractors)
    after = [token for ids in other_ids[num_before:] for token in ids]
    num_filler = distance_tokens - len(after)
    if num_filler < 0:
        raise ValueError(f"a distance of {distance_tokens} tokens cannot hold {num_distractors} distractor lines")
    if len(filler_ids) < num_filler + lead_tokens:
        raise ValueError(
            f"{len(filler_ids)} filler tokens; a distance of {distance_tokens} needs {num_filler + lead_tokens}"
        )
    start = rng.randint(0, len(filler_ids) - num_filler - lead_tokens)
    lead = list(filler_ids[start : start + lead_tokens])
    filler = list(filler_ids[start + lead_tokens : start + lead_tokens + num_filler])
    before = [token for ids in other_ids[:num_before] for token in ids]
    line_break = list(encode("\n"))
    told, question = list(encode(asked.told)), list(encode(asked.question))
    filler[max(0, num_filler - 1) :] = line_break[:1] if num_filler else []
    return RetrievalPrompt(
        token_ids=[*lead, *line_break, *before, *told, *after, *filler, *question],
        answer=asked.value,
        answer_ids=list(encode(asked.value)),
        distance_tokens=distance_tokens,
    )

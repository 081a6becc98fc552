"""Requests of a workload: real text cut to the drawn lengths, every prompt different, fixed by the seed.

Unique prompts matter: an engine that reuses the last prompt's work looks several times faster than it is. Block b of
a trial draws its own lengths, prompts and arrivals, the same for every configuration of a study, so that
configurations are compared on the same work.
"""

import random
from collections.abc import Sequence
from typing import Protocol

from codesign.measure.load import Load
from codesign.spec.request import Request, SamplingParams
from codesign.spec.workload import Workload


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


def make_load(
    workload: Workload,
    tokens: TokenSource,
    *,
    block: int,
    lengths_of: int | None = None,
    num_requests: int | None = None,
) -> Load:
    """The load of one block: `num_requests` (the workload's by default) of the workload's scenario.

    Args:
        block: which block of the trial; warm-up blocks are negative.
        lengths_of: take the lengths of this block instead, so that two blocks are the same work on different text.
    """
    count = num_requests or workload.num_requests
    lengths = random.Random(f"{workload.seed}/lengths/{block if lengths_of is None else lengths_of}")
    rng = random.Random(f"{workload.seed}/{block}")
    prompt_tokens = workload.prompt_tokens.sample(lengths, count)
    output_tokens = workload.output_tokens.sample(lengths, count)
    requests = tuple(
        Request(
            request_id=f"{block}-{index}",
            prompt_token_ids=tokens.take(rng, prompt_tokens[index]),
            sampling=SamplingParams(
                max_tokens=output_tokens[index],
                temperature=workload.sampling.temperature,
                top_k=workload.sampling.top_k,
                top_p=workload.sampling.top_p,
                seed=rng.randrange(2**31),
                ignore_eos=workload.ignore_eos,
            ),
        )
        for index in range(count)
    )
    if workload.arrival is not None:
        arrivals_s = [0.0]
        for gap in workload.arrival.gaps_s(rng, count - 1):
            arrivals_s.append(arrivals_s[-1] + gap)
        return Load(requests=requests, concurrency=count, arrivals_s=tuple(arrivals_s))
    concurrency = {"single_stream": 1, "interactive": workload.concurrency or 1, "offline": count}[workload.scenario]
    return Load(requests=requests, concurrency=concurrency)

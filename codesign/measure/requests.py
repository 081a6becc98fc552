"""Requests of a workload: real text cut to the drawn lengths, every prompt different, fixed by the seed.

Unique prompts matter: an engine that reuses the last prompt's work looks several times faster than it is. What prompts
share is what the workload says: the prefix of a group, the same for a whole trial as a system prompt is, or the blocks
of a trace. Block b of a trial draws its own lengths, prompts and arrivals, the same for every configuration of a study,
so that configurations are compared on the same work.
"""

import itertools
import random
from collections.abc import Iterator

from codesign.measure.load import Load
from codesign.measure.replay import Replay
from codesign.measure.tokens import TokenSource
from codesign.spec.request import Request, SamplingParams
from codesign.spec.workload import Workload


def make_load(
    workload: Workload,
    tokens: TokenSource,
    *,
    block: int,
    lengths_of: int | None = None,
    num_requests: int | None = None,
    replay: Replay | None = None,
) -> Load:
    """The load of one block: `num_requests` (the workload's by default) of the workload's scenario.

    Args:
        block: which block of the trial; warm-up blocks are negative.
        lengths_of: take the lengths of this block instead, so that two blocks are the same work on different text.
        replay: of the workload's trace, where it has one.
    """
    count = num_requests or workload.num_requests
    start = count * (block if lengths_of is None else lengths_of)
    rng = random.Random(f"{workload.seed}/{block}")
    if replay is None:
        drawn = _drawn(workload, tokens, rng, block=block, lengths_of=lengths_of, count=count)
    else:
        drawn = ((replay.prompt(start + i, tokens, rng, block), replay.output_tokens(start + i)) for i in range(count))
    requests = tuple(
        Request(
            request_id=f"{block}-{index}",
            prompt_token_ids=prompt,
            sampling=SamplingParams(
                max_tokens=output_tokens,
                temperature=workload.sampling.temperature,
                top_k=workload.sampling.top_k,
                top_p=workload.sampling.top_p,
                seed=rng.randrange(2**31),
                ignore_eos=workload.ignore_eos,
            ),
        )
        for index, (prompt, output_tokens) in enumerate(drawn)
    )
    if workload.replays_arrivals:
        assert replay is not None
        return Load(requests=requests, concurrency=count, arrivals_s=replay.arrivals_s(start, count))
    if workload.arrival is not None:
        gaps_s = workload.arrival.gaps_s(rng, count - 1)
        return Load(requests=requests, concurrency=count, arrivals_s=(0.0, *itertools.accumulate(gaps_s)))
    concurrency = {"single_stream": 1, "interactive": workload.concurrency or 1, "offline": count}[workload.scenario]
    talk = workload.conversation
    if talk is None:
        return Load(requests=requests, concurrency=concurrency)
    think_s = tuple(talk.think_time_s * rng.expovariate(1.0) for _ in range(count)) if talk.think_time_s else ()
    return Load(requests=requests, concurrency=concurrency, turns=talk.turns, think_s=think_s)


def _drawn(
    workload: Workload, tokens: TokenSource, rng: random.Random, *, block: int, lengths_of: int | None, count: int
) -> Iterator[tuple[tuple[int, ...], int]]:
    """(prompt, output tokens) of each request; a further turn of a conversation is only what is new in it."""
    assert workload.prompt_tokens is not None and workload.output_tokens is not None
    lengths_block = block if lengths_of is None else lengths_of
    lengths = random.Random(f"{workload.seed}/lengths/{lengths_block}")
    prompt_tokens = workload.prompt_tokens.sample(lengths, count, start=lengths_block * count)
    output_tokens = workload.output_tokens.sample(lengths, count, start=lengths_block * count)
    turns, user_tokens = 1, prompt_tokens
    if workload.conversation is not None:
        turns = workload.conversation.turns
        user_tokens = workload.conversation.user_tokens.sample(lengths, count, start=lengths_block * count)
    prefixes = _Prefixes(workload, tokens, random.Random(f"{workload.seed}/groups/{block}"))
    for index in range(count):
        if index % turns:
            yield tokens.take(rng, user_tokens[index]), output_tokens[index]
        else:
            prefix = prefixes.draw(prompt_tokens[index])
            yield (*prefix, *tokens.take(rng, prompt_tokens[index] - len(prefix))), output_tokens[index]


class _Prefixes:
    """The shared beginnings of a workload's groups; without groups there are none."""

    def __init__(self, workload: Workload, tokens: TokenSource, rng: random.Random) -> None:
        self._workload, self._tokens, self._rng = workload, tokens, rng
        self._groups: dict[int, tuple[int, ...]] = {}

    def draw(self, prompt_tokens: int) -> tuple[int, ...]:
        """The beginning of a prompt of this length, of a group drawn at random."""
        shared = self._workload.shared_prefix
        if shared is None:
            return ()
        group = self._rng.randrange(shared.num_groups)
        if group not in self._groups:
            assert self._workload.prompt_tokens is not None
            longest = shared.of(self._workload.prompt_tokens.max)
            group_rng = random.Random(f"{self._workload.seed}/prefix/{group}")
            self._groups[group] = self._tokens.take(group_rng, longest)
        return self._groups[group][: shared.of(prompt_tokens)]

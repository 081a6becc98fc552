"""Replay: the requests of a trace, as long as they were and, where the trace knows, sharing what they shared.

Contents are ours, since traces hold none: a block hash stands for 512 tokens drawn from the token source by the hash,
so that equal beginnings stay equal. Texts are taken as they are. Where the trace ends it begins again, with new
contents, so that no second pass finds the first one's prompts in a cache.
"""

import random
from collections.abc import Callable, Mapping, Sequence

from codesign.measure.tokens import TokenSource
from codesign.spec.trace import Trace, read_trace
from codesign.spec.traces.mooncake import BLOCK_TOKENS
from codesign.spec.traces.request import TraceRequest

_BYTES_PER_TOKEN = 4  # what a text counts as where there is no tokenizer
_NEW_TOKENS = 3  # in front of a text that comes a second time


class Replay:
    """Args:
    trace: resolved, with both caps.
    encode: text -> token ids; None without a tokenizer: then texts give only lengths, four bytes a token.
    seed: of the contents.
    """

    def __init__(self, trace: Trace, *, encode: Callable[[str], Sequence[int]] | None, seed: int) -> None:
        assert trace.max_prompt_tokens is not None and trace.max_output_tokens is not None
        self._requests = read_trace(trace)
        self._max_prompt, self._max_output = trace.max_prompt_tokens, trace.max_output_tokens
        self._speed = trace.speed or 1.0
        self._encode, self._seed = encode, seed
        self._lengths: dict[int, tuple[int, int]] = {}  # of texts, once counted

    def prompt(self, index: int, tokens: TokenSource, rng: random.Random, block: int) -> tuple[int, ...]:
        """The prompt of request `index`, counted on beyond the trace's end; below 0 is a warm-up.

        Args:
            rng: for what is the request's own.
            block: tells warm-ups apart, which share their lengths.
        """
        number, place = divmod(index, len(self._requests))
        turn = f"warm-up {block}" if block < 0 else str(number)
        request = self._requests[place]
        length = min(self._max_prompt, self._length(place)[0])
        known: list[int] = []
        if request.prompt_text and self._encode is not None:
            known = [*tokens.take(rng, 0 if turn == "0" else _NEW_TOKENS), *self._encode(request.prompt_text)]
        for hash_id in request.hash_ids:
            if len(known) >= length:
                break
            known += tokens.take(random.Random(f"{self._seed}/{turn}/hash/{hash_id}"), BLOCK_TOKENS)
        known = known[:length]
        return (*known, *tokens.take(rng, length - len(known)))

    def output_tokens(self, index: int) -> int:
        """At least 1: a request without output cannot be timed."""
        return max(1, min(self._max_output, self._length(index % len(self._requests))[1]))

    def arrivals_s(self, start: int, count: int) -> tuple[float, ...]:
        """Of `count` requests from `start` on, the first at 0, at the trace's speed."""
        times = [self._time_s(index) for index in range(start, start + count)]
        return tuple((time_s - times[0]) / self._speed for time_s in times)

    def facts(self, count: int) -> Mapping[str, int]:
        """What a record says of the first `count` requests: how many the trace has, and what was cut or raised."""
        lengths = [self._length(place) for place in range(min(count, len(self._requests)))]
        return {
            "num_requests": len(self._requests),
            "num_used": len(lengths),
            "prompts_cut": sum(prompt > self._max_prompt for prompt, _ in lengths),
            "outputs_cut": sum(output > self._max_output for _, output in lengths),
            "outputs_raised_to_1": sum(output < 1 for _, output in lengths),
        }

    def _time_s(self, index: int) -> float:
        """Arrival on the trace's clock; between two passes there is a mean gap."""
        number, place = divmod(index, len(self._requests))
        first, last = _arrival_s(self._requests[0]), _arrival_s(self._requests[-1])
        period = (last - first) * (1 + 1 / max(1, len(self._requests) - 1))
        return number * period + _arrival_s(self._requests[place]) - first

    def _length(self, place: int) -> tuple[int, int]:
        """Tokens of prompt and output as observed, before any cut."""
        request = self._requests[place]
        if request.prompt_tokens is not None and request.output_tokens is not None:
            return request.prompt_tokens, request.output_tokens
        if place not in self._lengths:
            self._lengths[place] = self._count(request.prompt_text), self._count(request.output_text)
        return self._lengths[place]

    def _count(self, text: str) -> int:
        if self._encode is None:
            return -(-len(text.encode()) // _BYTES_PER_TOKEN)
        return max(1, len(self._encode(text)))


def _arrival_s(request: TraceRequest) -> float:
    assert request.arrival_s is not None
    return request.arrival_s

"""Mending: a draw that rules exclude becomes one that they allow, and keeps of itself what it can.

    drawn     prefix_cache true   layout dense   tensor_parallel_size 8   num_micro_batches 4      on two cores
    mended    prefix_cache true   layout paged   tensor_parallel_size 1   num_micro_batches 1

Knobs are drawn one by one, and rules look at whole configurations: where many knobs depend on each other, as degrees of
parallelism do, hardly a draw is allowed (8 % of search_spaces/throughput.yaml on two cores). Rules say no more than yes
or no, so what goes together is found by trying, from an allowed point towards the draw: knob by knob in order, a drawn
value is taken over if some allowed point has it beside those taken over before; else the knob stays as it is.
"""

import random
from collections.abc import Iterator, Mapping
from typing import Any

from codesign.search.suggest import Point, Points

NUM_DRAWS = 200  # to find an allowed point where the unmodified configuration is none
_NUM_ROUNDS = 4  # in which each other knob is drawn anew


def mended(points: Points, drawn: Point, rng: random.Random) -> Point:
    """`drawn` itself where it is allowed, or where no allowed point was found."""
    if drawn.refusal is None:
        return drawn
    found = _any_allowed(points, rng)  # as far from the draw as may be; it comes nearer knob by knob
    if found is None:
        return drawn
    kept: dict[str, Any] = {}
    while (name := next((name for name in found.params if name not in kept), None)) is not None:
        wanted = drawn.params.get(name, found.params[name])
        if wanted != found.params[name]:
            tries = (points.completed(params, rng) for params in _around({**kept, name: wanted}, drawn, found, rng))
            found = next((point for point in tries if point.refusal is None), found)
        kept[name] = found.params[name]
    return found


def _any_allowed(points: Points, rng: random.Random) -> Point | None:
    """The unmodified configuration as far as the space offers it, else any."""
    neutral = points.baseline().params
    tries = (points.completed(neutral if number == 0 else {}, rng) for number in range(1 + NUM_DRAWS))
    return next((point for point in tries if point.refusal is None), None)


def _around(kept: dict[str, Any], drawn: Point, found: Point, rng: random.Random) -> Iterator[Mapping[str, Any]]:
    """Picks beside those that are kept, the likeliest first: all as drawn, all as found, all but one as found."""
    yield {**drawn.params, **kept}
    yield {**found.params, **kept}
    others = [name for name in found.params if name not in kept]
    for _ in range(_NUM_ROUNDS):
        for other in rng.sample(others, len(others)):
            yield {name: value for name, value in {**found.params, **kept}.items() if name != other}

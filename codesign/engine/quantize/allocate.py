"""Which layer gets how many bytes: the least summed loss within a budget of bytes, or the fewest bytes within a loss.

Starts with the smallest choice everywhere and again and again takes the step that saves most loss per byte, over steps
on each layer's lower convex hull: the optimum of the relaxed problem, and close to that of the whole one, since layers
are many and steps are small.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True)
class Option:
    """One way to hold one weight."""

    name: str
    num_bytes: int
    loss: float


Layer = TypeVar("Layer", str, tuple[int, str])


def allocate(
    options: Mapping[Layer, list[Option]], *, max_bytes: int | None = None, max_loss: float | None = None
) -> dict[Layer, Option]:
    """Layer -> its option. Exactly one of the two limits.

    Raises:
        ValueError: even the smallest options take more bytes, or even the largest lose more.
    """
    if (max_bytes is None) == (max_loss is None):
        raise ValueError("exactly one of max_bytes and max_loss is needed")
    hulls = {layer: _hull(own) for layer, own in options.items()}
    chosen = {layer: hull[0] for layer, hull in hulls.items()}
    num_bytes, loss = sum(o.num_bytes for o in chosen.values()), sum(o.loss for o in chosen.values())
    if max_bytes is not None and num_bytes > max_bytes:
        raise ValueError(f"the smallest choice takes {num_bytes} bytes, the budget is {max_bytes}")
    steps = [(_slope(hull[0], hull[1]), layer, 1) for layer, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps and (max_loss is None or loss > max_loss):
        _, layer, place = heapq.heappop(steps)
        before, after = chosen[layer], hulls[layer][place]
        if max_bytes is not None and num_bytes - before.num_bytes + after.num_bytes > max_bytes:
            continue  # this layer stays; a cheaper step of another may still fit
        chosen[layer] = after
        num_bytes += after.num_bytes - before.num_bytes
        loss += after.loss - before.loss
        if place + 1 < len(hulls[layer]):
            heapq.heappush(steps, (_slope(after, hulls[layer][place + 1]), layer, place + 1))
    if max_loss is not None and loss > max_loss:
        raise ValueError(f"the largest choice loses {loss:.4g}, the limit is {max_loss:.4g}")
    return chosen


def _hull(options: list[Option]) -> list[Option]:
    """The options that no mix of two others beats, by bytes: each step saves less per byte than the one before."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda own: (own.num_bytes, own.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(before: Option, after: Option) -> float:
    """Loss per byte of a step; negative, and the lower the better."""
    return (after.loss - before.loss) / (after.num_bytes - before.num_bytes)

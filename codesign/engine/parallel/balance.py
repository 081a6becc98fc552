"""Which layers each pipeline stage takes: as even as the costs of a layer and of the head allow.

The head of a small model costs as much as several layers, and a format that makes layers cheaper makes it more. So both
are timed on this machine, once per model, format and step size, and kept: the same configuration is always cut alike.
Attention over the cache is left out: every layer has its own, so it makes stages more even, not less.
"""

import contextlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from codesign.engine.batch import Batch
from codesign.engine.caches import cache_folder
from codesign.engine.parallel.stage import Stage
from codesign.engine.step import StepPlan

_REPEATS = 7


def split_layers(num_layers: int, num_stages: int, *, layer_cost: float, head_cost: float) -> tuple[range, ...]:
    """Runs of layers, one per stage, with the least possible cost of the costliest; the last one has the head too.

    Of equal splits the one with the more even stages (least sum of squares).
    """
    if num_stages == 1:
        return (range(num_layers),)
    best: tuple[float, float, list[int]] | None = None
    for last in range(1, num_layers - num_stages + 2):
        # the stages before the last one are alike: their sizes differ by one at the most
        each, num_larger = divmod(num_layers - last, num_stages - 1)
        sizes = [each] * (num_stages - 1 - num_larger) + [each + 1] * num_larger + [last]
        costs = [size * layer_cost for size in sizes[:-1]] + [last * layer_cost + head_cost]
        found = (max(costs), sum(cost * cost for cost in costs), sizes)
        best = found if best is None else min(best, found)
    assert best is not None, "there are at least as many layers as stages"
    borders = [0, *itertools.accumulate(best[2])]
    return tuple(itertools.starmap(range, itertools.pairwise(borders)))


def stage_costs(key: str, build: Callable[[], Stage], *, num_rows: int) -> tuple[int, int]:
    """Nanoseconds that one layer and the head take for steps of `num_rows` tokens; from an earlier build if it is kept.

    Args:
        key: names everything that they depend on.
        build: a stage with one layer and the head.
    """
    file = cache_folder("stage_costs") / f"{key}.json"
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError):  # ValueError: not JSON
        found = json.loads(file.read_text())
        return int(found["layer_ns"]), int(found["head_ns"])
    stage = build()
    layer_ns, head_ns = measure(stage, num_rows)
    with contextlib.suppress(OSError):  # the cache is a convenience
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"layer_ns": layer_ns, "head_ns": head_ns}))
        part.replace(file)
    return layer_ns, head_ns


@torch.inference_mode()
def measure(stage: Stage, num_rows: int) -> tuple[int, int]:
    """Median nanoseconds of the stage's first layer without attention, and of its head."""
    norm = stage.layer_list[0].input_norm.weight
    x = torch.randn(num_rows, norm.shape[0], device=norm.device).to(norm.dtype)
    nothing = torch.zeros(0, dtype=torch.int64, device=norm.device)
    batch, rows = Batch(StepPlan(), nothing, nothing), tuple(range(num_rows))
    return (
        _median_ns(lambda: stage.run(batch, _no_attention, x), norm.device),
        _median_ns(lambda: stage.logits(x, rows), norm.device),
    )


def _no_attention(layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    return q


def _median_ns(work: Callable[[], object], device: torch.device) -> int:
    taken: Sequence[int] = [_ns(work, device) for _ in range(_REPEATS + 2)]
    return int(statistics.median(taken[2:]))


def _ns(work: Callable[[], object], device: torch.device) -> int:
    started = time.perf_counter_ns()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter_ns() - started

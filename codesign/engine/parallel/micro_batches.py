"""Micro-batches: the sequences of one step in several plans, so that pipeline stages work on them at the same time.

    m plans of equal work through p stages: a stage idles (p - 1) / (m + p - 1) of the time

GPipe (Huang et al., 2019), https://arxiv.org/abs/1811.06965. A sequence is never cut: one alone is one micro-batch.
"""

import dataclasses
import itertools

from codesign.engine.step import StepPlan


def micro_batches(plan: StepPlan, num_micro_batches: int) -> tuple[StepPlan, ...]:
    """At most `num_micro_batches` plans with runs of the sequences, of about equal numbers of tokens, in their order.

    Run one after the other they are the plan: the first one carries what happens before anything is written.
    """
    borders = _borders(plan, min(num_micro_batches, len(plan.slots)))
    if len(borders) <= 2:
        return (plan,)
    starts, found = plan.query_starts, []
    for first, stop in itertools.pairwise(borders):
        own, tokens = slice(first, stop), slice(starts[first], starts[stop])
        found.append(
            dataclasses.replace(
                plan,
                slots=plan.slots[own],
                query_lens=plan.query_lens[own],
                is_prompt=plan.is_prompt[own],
                is_prompt_end=plan.is_prompt_end[own],
                blocks=plan.blocks[own],
                num_cached=plan.num_cached[own],
                token_ids=plan.token_ids[tokens],
                positions=plan.positions[tokens],
                logits_rows=tuple(row - tokens.start for row in plan.logits_rows if tokens.start <= row < tokens.stop),
                **({} if first == 0 else {"commits": (), "truncates": (), "frees": ()}),
            )
        )
    return tuple(found)


def _borders(plan: StepPlan, count: int) -> list[int]:
    """First sequence of each micro-batch, and the number of sequences; each border where the tokens so far are nearest
    to its share."""
    starts, borders = plan.query_starts, [0]
    for index in range(1, count):
        least, most = borders[-1] + 1, len(plan.slots) - (count - index)
        share = starts[-1] * index / count
        borders.append(min(range(least, most + 1), key=lambda sequence: abs(starts[sequence] - share)))
    return [*borders, len(plan.slots)]

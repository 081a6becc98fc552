"""What holds whatever the cache is like: backends run where they are, and plans go on where a slot's tokens end."""

from collections.abc import Sequence

import torch

from codesign.engine.attention.backend import AttentionBackend
from codesign.engine.step import StepPlan
from codesign.errors import Unsupported


def check_runs(backend: AttentionBackend, device: torch.device) -> None:
    """Raises Unsupported where the backend does not run on the device."""
    missing = backend.missing(device)
    if missing is not None:
        name = type(backend).__module__.rpartition(".")[2]
        raise Unsupported(f"attention {name!r} on {device}: {missing.reason}; use attention 'sdpa'")


def check_plan(
    plan: StepPlan, *, num_tokens: Sequence[int], num_pending: Sequence[int], max_model_len: int, max_query_len: int
) -> None:
    """Raises ValueError naming the slot.

    Args:
        num_tokens, num_pending: [S] of each slot, once the plan's commits and frees are done.
        max_query_len: most output tokens of one sequence.
    """
    starts = plan.query_starts
    for index, slot in enumerate(plan.slots):
        length, num_past = plan.query_lens[index], num_tokens[slot]
        if num_pending[slot]:
            raise ValueError(f"slot {slot} has pending rows; commit or free them first")
        first, last = plan.positions[starts[index]], plan.positions[starts[index + 1] - 1]
        if (first, last) != (num_past, num_past + length - 1):
            raise ValueError(f"slot {slot}: positions {first} to {last}, {length} of them, after {num_past} tokens")
        if num_past + length > max_model_len:
            raise ValueError(f"slot {slot}: more than max_model_len = {max_model_len} tokens")
        if not plan.is_prompt[index] and length > max_query_len:
            raise ValueError(f"slot {slot}: {length} output tokens, max_query_len is {max_query_len}")

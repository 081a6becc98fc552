"""score: logits of given texts through the very steps that are timed.

A prompt is prefilled, the KV policy acts at its end, and every later token is forced, one decode step at a time. So the
quality that is reported is that of the cache as it is while generating: one plain forward pass cannot see eviction.
What a prefix cache keeps is left aside, so that no score depends on what was run before it.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from codesign.engine.engine import Engine, check_tokens
from codesign.engine.sequence import Sequence as Running
from codesign.errors import InputError
from codesign.spec.request import Request, SamplingParams

OnLogits = Callable[[int, int, Tensor], None]


def score(
    engine: Engine, sequences: Sequence[Sequence[int]], *, num_prefill: int | Sequence[int], on_logits: OnLogits
) -> None:
    """Runs every sequence through the engine's own scheduler and runner, with its tokens instead of drawn ones.

    Args:
        sequences: token ids; each longer than its prefill, at most `max_model_len`.
        num_prefill: how many tokens are the prompt, for all or for each.
        on_logits: called as (sequence index, position p, logits [1, V] fp32): those that predict token p + 1. Each
            sequence gives positions num_prefill - 1 .. len - 2, in order; sequences interleave.
    Raises:
        InputError: a sequence that is too short, too long or outside the vocabulary.
        ValueError: the engine has requests, whose steps would mix with these.
    """
    if engine.has_work:
        raise ValueError("the engine still has requests")
    prompts = [num_prefill] * len(sequences) if isinstance(num_prefill, int) else list(num_prefill)
    if len(prompts) != len(sequences):
        raise ValueError(f"{len(prompts)} prefill lengths for {len(sequences)} sequences")
    parts, limit = engine.parts, engine.parts.config.max_model_len
    for index, (tokens, num_prompt) in enumerate(zip(sequences, prompts, strict=True)):
        if not 1 <= num_prompt < len(tokens) <= limit:
            raise InputError(
                f"sequence {index}: needs 1 <= num_prefill < tokens <= max_model_len {limit}, "
                f"has num_prefill {num_prompt} and {len(tokens)} tokens"
            )
        check_tokens(list(tokens), engine.vocab_size, f"sequence {index}")
    for index, (tokens, num_prompt) in enumerate(zip(sequences, prompts, strict=True)):
        sampling = SamplingParams(max_tokens=len(tokens) - num_prompt, ignore_eos=True)
        prompt = tuple(int(token) for token in tokens[:num_prompt])
        request = Request(request_id=str(index), prompt_token_ids=prompt, sampling=sampling)
        parts.scheduler.add(Running(request, shares_prefix=False))

    while parts.scheduler.has_work:
        plan, forced = parts.scheduler.plan()
        logits = parts.runner.run(plan)
        next_tokens = []
        for row, running in enumerate(forced):
            index, length = int(running.request_id), len(running.token_ids)
            on_logits(index, length - 1, logits[row : row + 1])
            next_tokens.append([int(sequences[index][length])])
        parts.scheduler.commit(forced, next_tokens)

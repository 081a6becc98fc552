"""How much of a draft's greedy speculation its target would accept, played on the target's own continuations."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from codesign.bundled import heldout_texts
from codesign.bundled.model import Llama, greedy_continuations
from codesign.bundled.rate import Rate

NUM_DRAFT_TOKENS, NUM_PROMPTS, PROMPT_TOKENS, CONTINUATION_TOKENS = 4, 48, 256, 64
_BATCH, _RESAMPLES = 12, 2000


@dataclass(frozen=True, kw_only=True)
class Chains:
    """What speculation came to on one continuation."""

    num_accepted: int
    num_proposed: int
    num_target_steps: int


def chains(agrees: Sequence[bool], num_draft_tokens: int) -> Chains:
    """Plays speculation over a continuation of the target's.

    `agrees[i]`: given the target's tokens before it, the draft's first choice for token i is the target's. That is
    all there is to know: a proposal counts only while everything before it was accepted, that is, equal to the
    target's own text.
    """
    accepted = proposed = steps = place = 0
    while place < len(agrees):
        chain = agrees[place : place + num_draft_tokens]
        num_accepted = next((index for index, agreed in enumerate(chain) if not agreed), len(chain))
        accepted += num_accepted
        proposed += min(num_accepted + 1, len(chain))
        steps += 1
        place += num_accepted + 1
    return Chains(num_accepted=accepted, num_proposed=proposed, num_target_steps=steps)


def acceptance(target: Llama, draft: Llama, prompts: Tensor) -> tuple[Rate, float]:
    """Accepted / proposed with a bootstrap interval over prompts [B, T], and output tokens per step of the target."""
    played = []
    for batch in torch.split(prompts, _BATCH):
        ids = greedy_continuations(target, batch, CONTINUATION_TOKENS)
        agrees = (draft(ids[:, :-1]).argmax(-1) == ids[:, 1:])[:, -CONTINUATION_TOKENS:]
        played += [chains(row, NUM_DRAFT_TOKENS) for row in agrees.tolist()]
    rng = random.Random(0)
    resampled = sorted(_accepted_share(rng.choices(played, k=len(played))) for _ in range(_RESAMPLES))
    rate = Rate(
        rate=_accepted_share(played),
        low=resampled[round(0.025 * _RESAMPLES)],
        high=resampled[round(0.975 * _RESAMPLES) - 1],
        num_samples=sum(one.num_proposed for one in played),
    )
    return rate, CONTINUATION_TOKENS * len(played) / sum(one.num_target_steps for one in played)


def _accepted_share(played: Sequence[Chains]) -> float:
    return sum(one.num_accepted for one in played) / sum(one.num_proposed for one in played)


def heldout_prompts(tokenizer: Tokenizer) -> Tensor:
    """[NUM_PROMPTS, PROMPT_TOKENS]: starts of held-out files that are long enough, then their later parts."""
    windows = []
    for document in heldout_texts():
        ids = tokenizer.encode(document.text).ids
        starts = range(0, len(ids) - PROMPT_TOKENS, 4 * PROMPT_TOKENS)
        windows += [(start, ids[start : start + PROMPT_TOKENS]) for start in starts]
    windows.sort(key=lambda window: window[0])
    return torch.tensor([ids for _, ids in windows[:NUM_PROMPTS]])

"""The rule that makes speculation exact: whatever is drafted, output tokens follow the target's own law.

    x ~ q        accept x with probability min(1, p(x) / q(x));  at the first rejection draw from max(0, p - q),
                 normalised, and stop;  when all K drafts are accepted, one more token from the target comes free

Leviathan et al., ICML 2023, https://arxiv.org/abs/2211.17192; Chen et al., 2023, https://arxiv.org/abs/2302.01318.
p and q are laws after temperature, top-k and top-p, the same on both sides; q is what x was really drawn from. A draft
that was not drawn (the likeliest token, a copied text) has a one-hot q: accepted with p(x), and the residual is p
without x. A greedy target accepts its own first choice and nothing else.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from codesign.engine.sampling import draw, laws, likeliest, sample
from codesign.engine.sequence import Sequence

PROPOSAL, ACCEPTANCE, RESIDUAL = "proposal", "acceptance", "residual"  # streams of random numbers of a request


@dataclasses.dataclass(frozen=True)
class Draft:
    """What is proposed to follow a sequence's newest token.

    Attributes:
        token_ids: K of them.
        laws: [K, V] float64, what each was drawn from; None when they were not drawn.
    """

    token_ids: tuple[int, ...]
    laws: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one step gave a sequence.

    Attributes:
        token_ids: the drafts that it keeps, then one more.
        num_tested: drafts that were looked at: the kept ones and, unless all were kept, the rejected one.
    """

    token_ids: list[int]
    num_tested: int

    @property
    def num_accepted(self) -> int:
        return len(self.token_ids) - 1


def accept_prob(p: Tensor, q: Tensor) -> Tensor:
    """min(1, p / q), elementwise; 1 where q is 0, which is never drawn."""
    return torch.where(q > p, p / q, torch.ones_like(p))


def residual(p: Tensor, q: Tensor) -> Tensor:
    """[..., V]: max(0, p - q), normalised: what a token is drawn from when the draft's is rejected.

    Where p equals q nothing is left of it but rounding, if that; then it is p.
    """
    rest = (p - q).clamp_min(0)
    total = rest.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, rest / total, p)


def verify(
    logits: Tensor, counts: Items[int], sequences: Items[Sequence], drafts: Mapping[str, Draft]
) -> list[Verdict]:
    """The next tokens of each sequence, from the target's logits behind its newest token and its drafts.

    Args:
        logits: [R, V] fp32, sequence after sequence.
        counts: rows of each sequence; all but one of them follow drafts, the first ones of the sequence's.
        drafts: by request id. A sequence without any gets the token that `sample` gives it.
    Raises:
        NumericalError: logits that are NaN or infinite.
    """
    starts = [0, *itertools.accumulate(counts)]
    found: dict[int, Verdict] = {}
    plain = [index for index, count in enumerate(counts) if count == 1]
    if plain:
        own = [sequences[index] for index in plain]
        rows = logits if len(plain) == len(logits) else logits[[starts[index] for index in plain]]
        tokens = sample(rows, [s.sampling for s in own], [s.stream for s in own])
        found |= {index: Verdict([token], 0) for index, token in zip(plain, tokens, strict=True)}
    checked = [index for index, count in enumerate(counts) if count > 1]
    for is_greedy in (True, False):
        group = [index for index in checked if (sequences[index].sampling.temperature == 0) == is_greedy]
        if not group:
            continue
        rows = torch.cat([logits[starts[index] : starts[index] + counts[index]] for index in group])
        own, lengths = [sequences[index] for index in group], [counts[index] for index in group]
        proposed = [drafts[s.request_id].token_ids[: count - 1] for s, count in zip(own, lengths, strict=True)]
        if is_greedy:
            verdicts = _verify_greedy(rows, proposed)
        else:
            likeliest(rows)  # raises where they are not numbers
            verdicts = _verify_drawn(rows, proposed, own, [drafts[s.request_id].laws for s in own])
        found |= dict(zip(group, verdicts, strict=True))
    return [found[index] for index in range(len(counts))]


def _verify_greedy(logits: Tensor, proposed: Items[tuple[int, ...]]) -> list[Verdict]:
    best, verdicts = likeliest(logits), []
    for token_ids in proposed:
        own, best = best[: len(token_ids) + 1], best[len(token_ids) + 1 :]
        verdicts.append(_verdict([x == y for x, y in zip(token_ids, own, strict=False)], own))
    return verdicts


def _verify_drawn(
    logits: Tensor, proposed: Items[tuple[int, ...]], sequences: Items[Sequence], all_laws: Items[Tensor | None]
) -> list[Verdict]:
    p = laws(logits, [s.sampling for s, x in zip(sequences, proposed, strict=True) for _ in range(len(x) + 1)])
    # [R, V]: the row behind the last draft has nothing to be compared with, and q = 0 leaves p of it
    q = torch.zeros_like(p)
    chosen: list[tuple[int, int]] = []  # (row, draft)
    row = 0
    for token_ids, law in zip(proposed, all_laws, strict=True):
        rows = range(row, row + len(token_ids))
        chosen += zip(rows, token_ids, strict=True)
        if law is None:
            q[list(rows), list(token_ids)] = 1.0
        else:
            q[rows.start : rows.stop] = law[: len(token_ids)]
        row = rows.stop + 1
    places = torch.tensor(chosen, device=p.device).unbind(1)
    chances: list[float] = accept_prob(p[places], q[places]).tolist()
    ends, is_accepted, first = [], [], 0
    for token_ids, sequence in zip(proposed, sequences, strict=True):
        own, chances = chances[: len(token_ids)], chances[len(token_ids) :]
        stream, kept = sequence.stream_for(ACCEPTANCE), []
        for chance in own:
            kept.append(stream.random() < chance)
            if not kept[-1]:
                break
        is_accepted.append(kept)
        ends.append(first + sum(kept))
        first += len(token_ids) + 1
    last = draw(residual(p[ends], q[ends]), [s.stream_for(RESIDUAL) for s in sequences])
    return [
        _verdict(kept, [*token_ids[: sum(kept)], token])
        for kept, token_ids, token in zip(is_accepted, proposed, last, strict=True)
    ]


def _verdict(is_accepted: Items[bool], token_ids: Items[int]) -> Verdict:
    """Of tokens that hold at least the kept drafts and the one after them."""
    count = next((index for index, kept in enumerate(is_accepted) if not kept), len(is_accepted))
    return Verdict(list(token_ids[: count + 1]), min(count + 1, len(is_accepted)))

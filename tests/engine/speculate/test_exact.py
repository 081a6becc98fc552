"""The law of what comes out, computed and not sampled: sum over drafts of q(x) · (what the rule makes of x)."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from codesign.engine.speculate.exact import accept_prob, residual

Rule = Callable[[Tensor, Tensor], Tensor]


def output_law(p: Tensor, q: Tensor, accept: Rule = accept_prob, rest: Rule = residual) -> Tensor:
    """[V] of the one token that a draft from q turns into."""
    accepted = q * accept(p, q)
    return accepted + (1 - accepted.sum()) * rest(p, q)


def one_hot(index: int, size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)[index]


def law(*weights: float) -> Tensor:
    values = torch.tensor(weights, dtype=torch.float64)
    return values / values.sum()


ADVERSARIAL = {
    "equal": (law(1, 2, 3), law(1, 2, 3)),
    "disjoint": (law(1, 2, 0, 0), law(0, 0, 3, 1)),
    "zeros in p": (law(0, 1, 2, 0), law(1, 1, 1, 1)),
    "zeros in q": (law(1, 1, 1, 1), law(0, 1, 2, 0)),
    "one-hot q": (law(1, 2, 3), one_hot(1, 3)),
    "one-hot p": (one_hot(1, 3), law(1, 2, 3)),
    "the same one-hot": (one_hot(2, 3), one_hot(2, 3)),
    "other one-hots": (one_hot(2, 3), one_hot(0, 3)),
    "tiny": (law(1, 1e-300, 1e-12), law(1e-300, 1, 1e-200)),
    "off by rounding": (law(0.1, 0.2, 0.7), law(0.1 + 1e-17, 0.2, 0.7)),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_output_law_is_the_targets(name: str) -> None:
    p, q = ADVERSARIAL[name]

    assert (output_law(p, q) - p).abs().max() < 1e-12
    assert residual(p, q).sum() == pytest.approx(1, abs=1e-12)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=64).filter(
        lambda pairs: sum(p for p, _ in pairs) > 1e-6 and sum(q for _, q in pairs) > 1e-6
    )
)
def test_the_output_law_is_the_targets_whatever_the_two_are(pairs: list[tuple[float, float]]) -> None:
    p, q = law(*(p for p, _ in pairs)), law(*(q for _, q in pairs))

    assert (output_law(p, q) - p).abs().max() < 1e-12


def pairs(count: int = 400, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Laws that overlap about as those of a target and its draft."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, size, generator=generator, dtype=torch.float64) * 2
    drafted = logits + torch.randn(count, size, generator=generator, dtype=torch.float64)
    return list(zip(logits.softmax(-1), drafted.softmax(-1), strict=True))


def test_rows_of_laws_are_as_good_as_one() -> None:
    p, q = (torch.stack(rows) for rows in zip(*pairs(8), strict=True))

    assert torch.equal(residual(p, q), torch.stack([residual(*own) for own in zip(p, q, strict=True)]))


def distance(rule: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean total variation to the target."""
    return sum(float((rule(p, q) - p).abs().sum()) / 2 for p, q in pairs()) / len(pairs())


def inverted(p: Tensor, q: Tensor) -> Tensor:
    return (q / p).clamp_max(1)


BUGS: dict[str, Rule] = {
    "resample from p instead of the residual": lambda p, q: output_law(p, q, rest=lambda p, q: p),
    "stop on reject, no replacement": lambda p, q: (q * accept_prob(p, q)) / (q * accept_prob(p, q)).sum(),
    "argmax on reject": lambda p, q: output_law(p, q, rest=lambda p, q: one_hot(int(p.argmax()), len(p))),
    "inverted ratio and residual": lambda p, q: output_law(p, q, accept=inverted),
    "softmax q for an argmax draft": lambda p, q: _argmax_draft(p, q),
    "inverted ratio, no resample": lambda p, q: (q * inverted(p, q)) / (q * inverted(p, q)).sum(),
}


def _argmax_draft(p: Tensor, q: Tensor) -> Tensor:
    x = int(q.argmax())
    accepted = float(accept_prob(p, q)[x])
    return accepted * one_hot(x, len(p)) + (1 - accepted) * residual(p, q)


@pytest.mark.parametrize("bug", BUGS)
def test_each_known_bug_is_far_from_the_target(bug: str) -> None:
    """What this test measures tells each of them from the rule by ten orders of magnitude."""
    assert distance(output_law) < 1e-12
    assert distance(BUGS[bug]) > 0.05


def test_the_inverted_ratio_is_as_wrong_as_the_draft() -> None:
    for p, q in pairs(20):
        wrong = (output_law(p, q, accept=inverted) - p).abs().sum() / 2
        assert wrong == pytest.approx(float((q - p).abs().sum() / 2), abs=1e-9)


def test_a_draft_as_likely_as_the_target_says_is_always_kept() -> None:
    p = law(1, 2, 3)

    assert torch.equal(accept_prob(p, p), torch.ones(3, dtype=torch.float64))
    assert torch.equal(residual(p, p), p)

"""Output of the whole engine against the exact law of the target, counted: what positions, caches and rolling back add.

Vocabulary 4, four tokens: 256 cells, all of their probabilities from the target's own logits.
"""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch

from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.sampling import laws
from codesign.engine.score import score
from codesign.engine.speculate import exact
from codesign.spec.engine_config import EngineConfig
from codesign.spec.request import Request, SamplingParams
from tests.engine.driving import finish

VOCAB, LENGTH, DRAWS, PROMPT = 4, 4, 2000, (3, 1, 2, 0, 1, 2)
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16}
SPEC = dataclasses.replace(tiny_spec(seed=3, **SMALL), draft=tiny_spec(seed=4, **{**SMALL, "num_hidden_layers": 1}))
DRAFT = {"name": "draft_model", "num_draft_tokens": 3, "adaptive": False}
NGRAM = {"name": "ngram", "num_draft_tokens": 3, "min_ngram": 1, "max_ngram": 2, "adaptive": False}


def engine(speculate: Any) -> Engine:
    config = {"dtype": "fp32", "max_batch_size": 64, "max_model_len": 32, "speculate": speculate}
    return build_engine(SPEC, EngineConfig.from_dict(config))


@functools.cache
def target_logits() -> dict[tuple[int, ...], torch.Tensor]:
    """Continuation of up to LENGTH - 1 tokens -> logits of what comes next."""
    beginnings = list(itertools.product(range(VOCAB), repeat=LENGTH - 1))
    found: dict[tuple[int, ...], torch.Tensor] = {}

    def keep(index: int, position: int, logits: torch.Tensor) -> None:
        found[beginnings[index][: position + 1 - len(PROMPT)]] = logits.clone()

    score(engine("none"), [[*PROMPT, *own, 0] for own in beginnings], num_prefill=len(PROMPT), on_logits=keep)
    return found


def exact_law(**sampling: Any) -> dict[tuple[int, ...], float]:
    """Every continuation's probability."""
    params = [SamplingParams(max_tokens=1, **sampling)]
    law = {own: laws(logits, params)[0].tolist() for own, logits in target_logits().items()}
    endings = itertools.product(range(VOCAB), repeat=LENGTH)
    return {own: math.prod(law[own[:i]][own[i]] for i in range(LENGTH)) for own in endings}


def draws(speculate: Any, **sampling: Any) -> tuple[Counter[tuple[int, ...]], dict[str, Any]]:
    built = engine(speculate)
    for seed in range(DRAWS):
        params = SamplingParams(max_tokens=LENGTH, seed=seed, **sampling)
        built.submit(Request(request_id=str(seed), prompt_token_ids=PROMPT, sampling=params))
    return Counter(tuple(own) for own in finish(built).values()), built.speculation_stats()


def chi_square_excess(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """Chi-square over cells of at least five expected draws (rare ones together), in standard deviations above what
    chance gives (Wilson and Hilferty, 1931); 4 is one in 30 000."""
    total = sum(counts.values())
    assert all(law[cell] > 0 for cell in counts), "a token that the law excludes"
    rare = {cell for cell, p in law.items() if p * total < 5}
    cells = [(counts[cell], p * total) for cell, p in law.items() if cell not in rare]
    cells.append((sum(counts[cell] for cell in rare), sum(law[cell] for cell in rare) * total))
    cells = [(seen, expected) for seen, expected in cells if expected > 0]
    degrees = len(cells) - 1
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    spread = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


SAMPLINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 1.3, "top_k": 2},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "both": {"temperature": 1.5, "top_k": 3, "top_p": 0.9},
}


@pytest.mark.parametrize(
    ("speculate", "sampling"),
    [*((DRAFT, own) for own in SAMPLINGS), (NGRAM, "temperature"), (NGRAM, "both")],
    ids=lambda own: own if isinstance(own, str) else own["name"],
)
def test_output_follows_the_targets_law(speculate: Any, sampling: str) -> None:
    counts, stats = draws(speculate, **SAMPLINGS[sampling])

    assert stats["num_tested"] > DRAWS / 2 and 0.1 < stats["num_accepted"] / stats["num_tested"] < 0.95
    assert chi_square_excess(counts, exact_law(**SAMPLINGS[sampling])) < 4


def test_plain_decoding_follows_it_too() -> None:
    counts, _ = draws("none", temperature=0.8)

    assert chi_square_excess(counts, exact_law(temperature=0.8)) < 4


def test_these_draws_are_enough_to_tell_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    law = exact_law(temperature=0.8)

    monkeypatch.setattr(exact, "residual", lambda p, q: p)
    assert chi_square_excess(draws(DRAFT, temperature=0.8)[0], law) > 8
    monkeypatch.undo()
    monkeypatch.setattr(exact, "accept_prob", lambda p, q: (q / p).clamp_max(1))
    assert chi_square_excess(draws(DRAFT, temperature=0.8)[0], law) > 8

"""What an engine computes for given texts, and how far two of them are apart."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from codesign.engine.build import build_engine
from codesign.engine.parallel.runner import RankRunner
from codesign.engine.score import score
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from codesign.spec.request import Request, SamplingParams

# Name -> how the engine is spread; "single" is what the others must equal.
PLANS: dict[str, dict[str, int]] = {
    "single": {},
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2, "num_micro_batches": 2},
    "tp2xpp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "num_micro_batches": 2},
}
# The very products of one rank, so that nothing may differ, in 16 bits either.
ONE_MICRO_BATCH = "pp2, one micro-batch"
EXACT: dict[str, dict[str, int]] = {ONE_MICRO_BATCH: {"pipeline_parallel_size": 2, "num_micro_batches": 1}}


@dataclasses.dataclass(frozen=True)
class Ran:
    """Attributes:
    logits: [texts * forced tokens, V].
    tokens: of each text's prompt, the greedy output.
    gaps: of each of those tokens, how far its logit is above the next best.
    logs: of each rank, after everything; none for a single one.
    """

    logits: Tensor
    tokens: list[list[int]]
    gaps: list[list[float]]
    facts: dict[str, Any]
    logs: list[dict[str, Any]]


def run(
    model: ModelSpec,
    config: dict[str, Any],
    plan: str,
    texts: Sequence[Sequence[int]],
    *,
    num_prefill: int,
    num_greedy: int = 0,
) -> Ran:
    parallel = {**PLANS, **EXACT}[plan]
    # as many threads as a rank has: another number of them adds up in another order
    num_threads = 2 if parallel else 1
    engine = build_engine(model, EngineConfig.from_dict({**config, "parallel": parallel}), num_threads=num_threads)
    try:
        rows: dict[tuple[int, int], Tensor] = {}
        score(engine, texts, num_prefill=num_prefill, on_logits=lambda i, p, row: rows.update({(i, p): row[0].clone()}))
        tokens: list[list[int]] = [[] for _ in texts]
        gaps: list[list[float]] = [[] for _ in texts]
        for index, text in enumerate(texts if num_greedy else []):
            sampling = SamplingParams(max_tokens=num_greedy, ignore_eos=True, logprobs=2)
            engine.submit(Request(request_id=str(index), prompt_token_ids=tuple(text[:num_prefill]), sampling=sampling))
        while engine.has_work:
            for output in engine.step():
                tokens[int(output.request_id)].append(output.token_id)
                assert output.logprobs is not None
                (_, _), (_, best), (_, second) = output.logprobs
                gaps[int(output.request_id)].append(best - second)
        runner = engine.parts.runner
        logs = runner.logs() if isinstance(runner, RankRunner) else []
        return Ran(torch.stack([rows[key] for key in sorted(rows)]), tokens, gaps, engine.facts(), logs)
    finally:
        engine.close()


def kl(one: Tensor, other: Tensor) -> float:
    """Mean KL(one || other) over rows of logits, in nats."""
    log_one, log_other = one.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((log_one.exp() * (log_one - log_other)).sum(-1).mean())


def top1_agreement(one: Tensor, other: Tensor) -> float:
    return float((one.argmax(-1) == other.argmax(-1)).double().mean())


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Where two outputs part; what comes after it cannot be compared."""
    return next((index for index, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)

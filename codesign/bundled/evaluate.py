"""What the bundled pair can do, measured here and now, beside the bars that it was trained for.

    python -m codesign.bundled.evaluate            a table; progress on stderr
    python -m codesign.bundled.evaluate --json     one JSON document

Perplexity    held-out text in non-overlapping windows of 1024 tokens, beside unigram and bigram models
Retrieval     all five digits of a number told 256 to 1536 tokens earlier among three others, greedily; Wilson interval
Acceptance    greedy draft tokens equal to the target's, in chains of 4 on its greedy continuations of held-out text:
              accepted / proposed, where a chain's tokens after its first rejection count as not proposed
Step time     on the engine, one sequence, 256 tokens and more in the cache: 4 draft steps, then one of the target
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from codesign.bundled import calibration_texts, draft_path, heldout_texts, target_path
from codesign.bundled.acceptance import NUM_DRAFT_TOKENS, acceptance, heldout_prompts
from codesign.bundled.corpus import train_texts
from codesign.bundled.model import Llama, load_pretrained
from codesign.bundled.ngram import TokenIds, bigram_nats, unigram_nats
from codesign.bundled.rate import Rate, wilson
from codesign.bundled.retrieval import retrieval_prompt
from codesign.bundled.train import token_array
from codesign.engine.build import build_engine
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from codesign.spec.request import Request, SamplingParams

WINDOW_TOKENS = 1024
RETRIEVAL_DISTANCES, NUM_RETRIEVALS = (256, 512, 1024, 1536), 60
NUM_TIMED_RUNS, NUM_STEPS_PER_RUN = 6, 50
MIN_RETRIEVAL, MIN_ACCEPTANCE, MAX_STEP_TIME_RATIO, MAX_BYTES, MAX_DRAFT_SHARE = 0.95, 0.65, 0.25, 20 * 2**20, 1 / 8


@dataclass(frozen=True, kw_only=True)
class Perplexities:
    """Per token of the held-out text; `bits_per_byte` is the target's, `baseline_text` what the n-grams saw."""

    target: float
    draft: float
    unigram: float
    bigram: float
    bits_per_byte: float
    num_tokens: int
    baseline_text: str


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Medians in milliseconds; the ratio's quartiles are over pairs of neighbouring steps."""

    target_ms: float
    draft_ms: float
    ratio: float
    ratio_p25: float
    ratio_p75: float
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Parameters of each, a tied matrix counted once; bytes of both folders together."""

    target_parameters: int
    draft_parameters: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that the command prints."""

    sizes: Sizes
    perplexity: Perplexities
    retrieval: dict[int, Rate]
    acceptance: Rate
    tokens_per_target_step: float
    step_time: StepTimes
    machine: str


def perplexities(target: Llama, draft: Llama, tokenizer: Tokenizer) -> Perplexities:
    """Held-out perplexities; n-grams come from the training text if this Python has it, else from calibration."""
    heldout = [document.text for document in heldout_texts()]
    ids = token_array(heldout, tokenizer).astype(np.int64)
    ids = ids[: (len(ids) - 1) // WINDOW_TOKENS * WINDOW_TOKENS + 1]
    try:
        texts, baseline_text = train_texts(), "training text"
    except LookupError as error:
        log(str(error))
        texts, baseline_text = [document.text for document in calibration_texts()], "calibration text"
    log(f"counting n-grams of the {baseline_text}")
    train_ids: TokenIds = token_array(texts, tokenizer).astype(np.int64)
    vocab_size = tokenizer.get_vocab_size()
    log(f"perplexity over {len(ids) - 1} tokens")
    target_nats = mean_nats(target, torch.from_numpy(ids))
    num_bytes = len(tokenizer.decode(ids[1:].tolist(), skip_special_tokens=True).encode())
    return Perplexities(
        target=math.exp(target_nats),
        draft=math.exp(mean_nats(draft, torch.from_numpy(ids))),
        unigram=math.exp(unigram_nats(train_ids, ids, vocab_size).mean()),
        bigram=math.exp(bigram_nats(train_ids, ids, vocab_size).mean()),
        bits_per_byte=target_nats / math.log(2) * (len(ids) - 1) / num_bytes,
        num_tokens=len(ids) - 1,
        baseline_text=baseline_text,
    )


def mean_nats(model: Llama, token_ids: Tensor) -> float:
    """Mean surprise at `token_ids` but the first; each window of the text is seen alone."""
    starts = range(0, len(token_ids) - 1, WINDOW_TOKENS)
    total = 0.0
    for start in starts:
        window = token_ids[start : start + WINDOW_TOKENS + 1]
        total += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    return total / (len(token_ids) - 1)


def retrieval(target: Llama, tokenizer: Tokenizer, distance_tokens: int, num_samples: int) -> Rate:
    """How often all digits are the target's first choices.

    The digits are forced; decoding would answer the same, because the first error ends both.
    """
    filler = token_array([document.text for document in heldout_texts()], tokenizer).tolist()
    num_right = 0
    for seed in range(num_samples):
        prompt = retrieval_prompt(
            lambda text: tokenizer.encode(text).ids, filler, distance_tokens=distance_tokens, seed=seed
        )
        answer = torch.tensor(prompt.answer_ids)
        logits = target(torch.tensor([prompt.token_ids + prompt.answer_ids]))[0, -len(answer) - 1 : -1]
        num_right += bool((logits.argmax(-1) == answer).all())
    return wilson(num_right, num_samples)


def step_times(prompt: Tensor) -> StepTimes:
    """Decode steps on the engine as it is by default, in the rhythm of speculation: draft, draft, ..., target.

    Both follow the same `prompt` [T]; a sample is one target step and the mean of the draft steps before it.
    """
    target, draft = (
        build_engine(ModelSpec(name=folder.name, path=str(folder)), EngineConfig(max_batch_size=1))
        for folder in (target_path(), draft_path())
    )
    target_ms: list[float] = []
    draft_ms: list[float] = []
    for number in range(NUM_TIMED_RUNS + 1):
        for engine, steps in ((target, NUM_STEPS_PER_RUN), (draft, NUM_DRAFT_TOKENS * NUM_STEPS_PER_RUN)):
            sampling = SamplingParams(max_tokens=steps + 1, ignore_eos=True)
            engine.submit(Request(request_id=str(number), prompt_token_ids=tuple(prompt.tolist()), sampling=sampling))
            engine.step()  # the prompt
        for _ in range(NUM_STEPS_PER_RUN):
            start = time.perf_counter()
            for _ in range(NUM_DRAFT_TOKENS):
                draft.step()
            middle = time.perf_counter()
            target.step()
            if number:  # the first run warms up
                draft_ms.append((middle - start) * 1e3 / NUM_DRAFT_TOKENS)
                target_ms.append((time.perf_counter() - middle) * 1e3)
    low, _, high = statistics.quantiles((d / t for t, d in zip(target_ms, draft_ms, strict=True)), n=4)
    return StepTimes(
        target_ms=statistics.median(target_ms),
        draft_ms=statistics.median(draft_ms),
        ratio=statistics.median(draft_ms) / statistics.median(target_ms),
        ratio_p25=low,
        ratio_p75=high,
        num_samples=len(target_ms),
    )


@torch.inference_mode()
def evaluate() -> Evaluation:
    """Measures everything; about two minutes on two CPU cores."""
    tokenizer = Tokenizer.from_file(str(target_path() / "tokenizer.json"))
    target, draft = load_pretrained(target_path()), load_pretrained(draft_path())
    prompts = heldout_prompts(tokenizer)
    log("timing steps")
    times = step_times(prompts[0])
    log(f"acceptance on {len(prompts)} continuations")
    accepted, tokens_per_step = acceptance(target, draft, prompts)
    retrievals = {}
    for distance in RETRIEVAL_DISTANCES:
        log(f"retrieval at {distance} tokens")
        retrievals[distance] = retrieval(target, tokenizer, distance, NUM_RETRIEVALS)
    files = [file for folder in (target_path(), draft_path()) for file in folder.iterdir()]
    return Evaluation(
        sizes=Sizes(
            target_parameters=target.num_parameters(),
            draft_parameters=draft.num_parameters(),
            total_bytes=sum(file.stat().st_size for file in files),
        ),
        perplexity=perplexities(target, draft, tokenizer),
        retrieval=retrievals,
        acceptance=accepted,
        tokens_per_target_step=tokens_per_step,
        step_time=times,
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    )


def table(result: Evaluation) -> str:
    """The evaluation for people: a value, its uncertainty, its bar and whether it is met."""
    sizes, words, times = result.sizes, result.perplexity, result.step_time
    share = sizes.draft_parameters / sizes.target_parameters
    rows = [
        ("target parameters", f"{sizes.target_parameters:,}", "", None),
        (
            "draft parameters",
            f"{sizes.draft_parameters:,} ({share:.4f} of the target)",
            "<= 1/8",
            share <= MAX_DRAFT_SHARE,
        ),
        ("size on disk", f"{sizes.total_bytes / 2**20:.1f} MiB", "<= 20 MiB", sizes.total_bytes <= MAX_BYTES),
        (
            f"held-out perplexity at {WINDOW_TOKENS}",
            f"{words.target:.2f} ({words.bits_per_byte:.3f} bits per byte; draft {words.draft:.1f};"
            f" bigram {words.bigram:.1f}, unigram {words.unigram:.1f} of the {words.baseline_text});"
            f" {words.num_tokens} tokens",
            "< bigram",
            words.target < words.bigram,
        ),
    ]
    for distance, rate in result.retrieval.items():
        is_bar = distance == 1024
        bar = f">= {MIN_RETRIEVAL}" if is_bar else ""
        rows.append((f"retrieval at {distance}", str(rate), bar, rate.rate >= MIN_RETRIEVAL if is_bar else None))
    accepted = result.acceptance
    rows += [
        ("draft acceptance", str(accepted), f">= {MIN_ACCEPTANCE}", accepted.rate >= MIN_ACCEPTANCE),
        (
            "tokens per target step",
            f"{result.tokens_per_target_step:.2f} with {NUM_DRAFT_TOKENS} draft tokens",
            "",
            None,
        ),
        (
            "step-time ratio",
            f"{times.ratio:.3f} [quartiles {times.ratio_p25:.3f}, {times.ratio_p75:.3f}], n = {times.num_samples}"
            f" ({times.draft_ms:.2f} ms of {times.target_ms:.2f} ms)",
            f"<= {MAX_STEP_TIME_RATIO}",
            times.ratio <= MAX_STEP_TIME_RATIO,
        ),
    ]
    verdicts = {None: "", True: "met", False: "MISSED"}
    lines = [f"{name:28} {bar:10} {verdicts[is_met]:7} {value}" for name, value, bar, is_met in rows]
    return "\n".join([*lines, f"{'machine':28} {'':10} {'':7} {result.machine}"])


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    arguments = parser.parse_args()
    result = evaluate()
    print(json.dumps(asdict(result)) if arguments.json else table(result))


if __name__ == "__main__":
    main()

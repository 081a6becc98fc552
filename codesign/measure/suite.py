"""Quality suites: the token ids that a built engine is judged on, made once per study by the parent.

    text        held-out text; a part is prefilled, the policy acts at its end, every later token is forced
    retrieval   `# key abc = 12345` planted in held-out text and asked for at the end, at distances spread over the
                prompt; right when every token of the answer is the engine's best guess
    ruler       the tasks of `measure.ruler` at several lengths, each asked in the prompt, so that the policy sees the
                question when it first acts, or after some output, so that it does not and has evicted meanwhile

A suite is plain JSON, because it crosses to the child. Calibration text is never in it.
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from codesign.bundled import heldout_texts
from codesign.bundled.retrieval import retrieval_prompt
from codesign.measure.ruler import TASKS, ruler_sample

Encode = Callable[[str], list[int]]
SHORTEST_DISTANCE = 64
OVERHEAD_TOKENS = 96  # the told lines, the question and the lead of a retrieval prompt, with room to spare
MAX_ANSWER_TOKENS = 16
RULER_LENGTHS = (512, 1024, 2048)
ASKED = ("in_prompt", "after_output")
LEAST_RETRIEVAL_TOKENS = SHORTEST_DISTANCE + OVERHEAD_TOKENS + MAX_ANSWER_TOKENS


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteSize:
    """How much is judged; the sample counts stand beside every quality number.

    Args:
        num_sequences: held-out sequences of `sequence_tokens`, half of it prefilled.
        num_prompts: retrieval prompts of `prompt_tokens`.
        num_ruler: samples of each task of `measure.ruler`, at each length that fits, asked each way.
    """

    num_sequences: int = 4
    sequence_tokens: int = 128
    num_prompts: int = 5
    prompt_tokens: int = 512
    num_ruler: int = 0


SCREEN = SuiteSize()
CONFIRM = SuiteSize(num_sequences=16, sequence_tokens=768, num_prompts=48, prompt_tokens=768, num_ruler=4)


def make_suite(encode: Encode, size: SuiteSize, *, max_model_len: int, seed: int) -> dict[str, Any]:
    """The suite for one model: {"text": {"sequences", "num_prefill"}, "retrieval": [{"prompt", "answer", "distance"}],
    "ruler": as `ruler_items` gives them}.

    Lengths are cut to `max_model_len`; below LEAST_RETRIEVAL_TOKENS there are no retrieval prompts. Two calls with the
    same arguments give the same suite.
    """
    rng = random.Random(seed)
    ids = [encode(document.text) for document in heldout_texts()]
    length = min(size.sequence_tokens, max_model_len)
    longest = min(size.prompt_tokens, max_model_len - MAX_ANSWER_TOKENS) - OVERHEAD_TOKENS
    filler = [token for document in ids for token in document]
    retrieval = []
    for index in range(size.num_prompts if max_model_len >= LEAST_RETRIEVAL_TOKENS else 0):
        share = index / max(1, size.num_prompts - 1)
        distance = round(SHORTEST_DISTANCE + share * (longest - SHORTEST_DISTANCE))
        prompt = retrieval_prompt(encode, filler, distance_tokens=distance, seed=rng.randrange(2**31), lead_tokens=16)
        retrieval.append({"prompt": prompt.token_ids, "answer": prompt.answer_ids, "distance": prompt.distance_tokens})
    return {
        "is_text": True,
        "text": {"sequences": _slices(ids, size.num_sequences, length, rng), "num_prefill": length // 2},
        "retrieval": retrieval,
        "ruler": ruler_items(
            encode,
            filler,
            lengths=[length for length in RULER_LENGTHS if length <= max_model_len],
            count=size.num_ruler,
            seed=rng.randrange(2**31),
        ),
    }


def ruler_items(
    encode: Encode, filler_ids: Sequence[int], *, lengths: Sequence[int], count: int, seed: int
) -> list[dict[str, Any]]:
    """{"task", "length_tokens", "asked", "prompt", "num_prefill", "answer"} for every task, length and way of asking.

    The same `count` samples are asked both ways. What comes after `num_prefill` is forced as output.
    """
    items = []
    for length in lengths:
        for task in TASKS:
            for number in range(count):
                sample = ruler_sample(task, encode, filler_ids, length_tokens=length, seed=seed + number)
                prompt = sample.prompt_ids
                for asked, num_prefill in zip(ASKED, (len(prompt), sample.num_context_tokens), strict=True):
                    own = {"task": task, "length_tokens": length, "asked": asked}
                    items.append({**own, "prompt": prompt, "num_prefill": num_prefill, "answer": sample.answer_ids})
    return items


def random_suite(vocab_size: int, size: SuiteSize, *, max_model_len: int, seed: int) -> dict[str, Any]:
    """A suite of random tokens, for a model without a tokenizer: it shows KL and agreement, but nothing about text."""
    rng = random.Random(seed)
    length = min(size.sequence_tokens, max_model_len)
    sequences = [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(size.num_sequences)]
    return {
        "is_text": False,
        "text": {"sequences": sequences, "num_prefill": length // 2},
        "retrieval": [],
        "ruler": [],
    }


def digest(suite: dict[str, Any]) -> str:
    """Sixteen hex digits that name the suite."""
    return hashlib.sha256(json.dumps(suite, sort_keys=True).encode()).hexdigest()[:16]


def _slices(texts: Sequence[list[int]], count: int, length: int, rng: random.Random) -> list[list[int]]:
    """`count` slices of `length` tokens, from different texts while there are enough."""
    long_enough = [ids for ids in texts if len(ids) >= length] or [[token for ids in texts for token in ids]]
    order = rng.sample(range(len(long_enough)), len(long_enough))
    slices = []
    for index in range(count):
        ids = long_enough[order[index % len(order)]]
        start = rng.randrange(len(ids) - length + 1)
        slices.append(ids[start : start + length])
    return slices

"""Lossless: chunked prefill, neighbours, shared blocks, preemption and aborts give the tokens of the request alone.

Randomised schedules through whole engines in fp32, greedy. Another order of sums may move a logit by rounding, so a
token may differ where the two likeliest of the request alone are less than 1e-4 apart, and only there.
"""

import dataclasses
import functools
import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.score import score
from codesign.spec.engine_config import EngineConfig
from codesign.spec.request import Request, SamplingParams
from tests.engine.driving import DEFAULTS, finish, generate, request

GAP = 1e-4
NUM_KINDS = 40
# Blocks of the tiny model: 2 layers, 2 KV heads of 16, key and value, 32 rows of 4 bytes each.
BLOCK_BYTES = 2 * 2 * 16 * 2 * 32 * 4
DRAFT_SLOT_BYTES = 98304  # its cache is dense
PAGED = {"layout": "paged"}


def kv_memory(num_blocks: int, num_slots: int) -> int:
    return num_blocks * BLOCK_BYTES + num_slots * 6 * 4  # the table: a row of 192 / 32 entries per slot


def small_engine(**config: Any) -> Engine:
    """The tiny model, which a draft of another architecture belongs to."""
    model = dataclasses.replace(tiny_spec(), draft=tiny_spec("Qwen3ForCausalLM", seed=2))
    return build_engine(model, EngineConfig.from_dict({**DEFAULTS, "max_model_len": 192, **config}))


@functools.cache
def kind(number: int) -> Request:
    """One of the requests that schedules are made of: short ones, long ones, with three common beginnings or none.

    Every fifth is the next turn of the one before it: its prompt, its output, and something more.
    """
    rng = random.Random(f"kind {number}")
    if number % 4 == 0:
        prompt, max_tokens = rng.choices(range(128), k=10), 90  # grows into blocks that others want
    elif number % 5 == 4:
        last = kind(number - 1)
        prompt = [*last.prompt_token_ids, *alone(number - 1), *rng.choices(range(128), k=rng.randint(1, 20))]
        max_tokens = rng.randint(1, 20)
    else:
        prefix = random.Random(f"prefix {number % 4}").choices(range(128), k=(0, 31, 64, 90)[number % 4])
        prompt = [*prefix, *rng.choices(range(128), k=rng.randint(1, 30))]
        max_tokens = 20 if number % 5 == 3 else rng.choice([1, 5, 40])
    return Request(request_id="", prompt_token_ids=tuple(prompt), sampling=SamplingParams(max_tokens=max_tokens))


@functools.cache
def plain_engine() -> Engine:
    return small_engine(max_batch_size=1)


@functools.cache
def alone(number: int) -> tuple[int, ...]:
    return tuple(generate(plain_engine(), kind(number))[""])


def top_2_gap(number: int, index: int) -> float:
    """Between the two likeliest at output token `index` of a request alone."""
    text, gaps = [*kind(number).prompt_token_ids, *alone(number)], {}

    def look(_: int, position: int, logits: Any) -> None:
        best = logits[0].topk(2).values
        gaps[position + 1] = float(best[0] - best[1])

    num_prompt = len(kind(number).prompt_token_ids)
    score(plain_engine(), [text], num_prefill=num_prompt, on_logits=look)
    return gaps[num_prompt + index]


def check(number: int, tokens: list[int]) -> None:
    expected = alone(number)
    assert len(tokens) == len(expected)
    differs = next((i for i, (own, other) in enumerate(zip(tokens, expected, strict=True)) if own != other), None)
    assert differs is None or top_2_gap(number, differs) < GAP, f"kind {number} differs from output token {differs} on"


def schedule(engine: Engine, rng: random.Random, num_requests: int) -> None:
    """Requests in bursts, some of them aborted on their way; every other one is checked."""
    numbers: dict[str, int] = {}
    tokens: dict[str, list[int]] = {}

    def step() -> None:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).append(output.token_id)

    for index in range(num_requests):
        name, number = f"r{index}", rng.randrange(NUM_KINDS)
        own = kind(number)
        engine.submit(Request(request_id=name, prompt_token_ids=own.prompt_token_ids, sampling=own.sampling))
        numbers[name] = number
        for _ in range(rng.choice([0, 0, 1, 12])):
            step()
        if rng.random() < 0.15:
            dropped = rng.choice(list(numbers))
            if engine.abort(dropped):
                del numbers[dropped]
                tokens.pop(dropped, None)
    while engine.has_work:
        step()
    assert tokens.keys() == numbers.keys()
    for name, number in numbers.items():
        check(number, tokens[name])


LITTLE_MEMORY = {"kv": PAGED, "prefix_cache": True, "max_batch_size": 6, "kv_memory_bytes": kv_memory(8, 6)}
NGRAM = {"name": "ngram", "num_draft_tokens": 5, "min_ngram": 1, "max_ngram": 3, "adaptive": False}
DRAFT_MODEL = {"name": "draft_model", "num_draft_tokens": 3, "adaptive": False}
ENGINES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, static": {"scheduler": "static"},
    "dense, chunks": {"scheduler": {"name": "continuous", "prefill_chunk_tokens": 7}},
    "paged": {"kv": PAGED, "max_step_tokens": 50},
    "paged, static, prefixes": {"kv": PAGED, "scheduler": "static", "prefix_cache": True},
    "paged, little memory": {"kv": PAGED, "max_batch_size": 6, "kv_memory_bytes": kv_memory(9, 6)},
    "paged, prefixes": {"kv": PAGED, "prefix_cache": True, "max_step_tokens": 64},
    "paged, prefixes, little memory, chunks": {
        "kv": PAGED,
        "prefix_cache": True,
        "max_batch_size": 6,
        "kv_memory_bytes": kv_memory(7, 6),
        "scheduler": {"name": "continuous", "prefill_chunk_tokens": 33},
    },
    "paged, prefixes, little memory, n-gram drafts": {**LITTLE_MEMORY, "speculate": NGRAM},
    "paged, prefixes, little memory, drafts of a model": {
        **LITTLE_MEMORY,
        "speculate": DRAFT_MODEL,
        "kv_memory_bytes": kv_memory(8, 6) + 6 * DRAFT_SLOT_BYTES,
    },
}


@functools.cache
def engine_of(name: str) -> Engine:
    """Kept over all schedules, so that a prefix cache is full of others' blocks when the next one begins."""
    return small_engine(**ENGINES[name])


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), num_requests=st.integers(1, 9))
def test_any_schedule_gives_the_tokens_of_each_request_alone(name: str, seed: int, num_requests: int) -> None:
    engine = engine_of(name)

    schedule(engine, random.Random(seed), num_requests)

    assert not engine.has_work and engine.stats().get("blocks_used", 0) == 0


def test_those_schedules_preempt_share_and_evict() -> None:
    """Else the test above would show little."""
    engine = small_engine(**ENGINES["paged, prefixes, little memory, chunks"])
    for seed in range(6):
        schedule(engine, random.Random(seed), 9)

    stats = engine.stats()
    assert stats["preemptions"] > 4 and stats["prefix_hit_tokens"] > 500 and stats["prefix_evictions"] > 50


LOAD = tuple(
    request(f"r{index}", 20 + 9 * index, 100, temperature=0.8 * (index % 2), top_k=20, seed=index) for index in range(6)
)


def most_blocks(engine: Engine) -> int:
    """Runs `LOAD`; the most blocks in use after any step."""
    for item in LOAD:
        engine.submit(item)
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.stats()["blocks_used"])
    return most


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_sixty_percent_of_the_memory_that_a_load_wants_gives_the_same_tokens(prefix_cache: bool) -> None:
    """Drawn tokens too: a preempted request goes on in its own stream of random numbers."""
    wanted = most_blocks(small_engine(kv=PAGED, max_batch_size=6))
    limit = kv_memory(int(0.6 * wanted), 6)
    engine = small_engine(kv=PAGED, max_batch_size=6, kv_memory_bytes=limit, prefix_cache=prefix_cache)
    dense = small_engine(max_batch_size=1)

    tokens = generate(engine, *LOAD)

    stats = engine.stats()
    assert stats["blocks"] == int(0.6 * wanted) and stats["preemptions"] > 0
    assert engine.facts()["bytes"]["kv"] <= limit
    assert tokens == generate(dense, *LOAD)


def scored(engine: Engine, texts: list[list[int]], num_prefill: int) -> Mapping[tuple[int, int], Any]:
    found = {}
    score(engine, texts, num_prefill=num_prefill, on_logits=lambda i, p, row: found.update({(i, p): row[0].clone()}))
    return found


def test_scores_are_the_same_in_blocks_with_little_memory_and_a_warm_prefix_cache() -> None:
    texts = [random.Random(index // 2).choices(range(128), k=150) for index in range(8)]  # each twice
    dense = scored(small_engine(), texts, 70)
    engine = small_engine(kv=PAGED, prefix_cache=True, max_batch_size=6, kv_memory_bytes=kv_memory(13, 6))
    engine.warm_prefix(texts[0])
    before = engine.stats()

    paged = scored(engine, texts, 70)

    after = engine.stats()
    assert after["preemptions"] > 0 and after["prefix_lookups"] == before["prefix_lookups"]
    assert paged.keys() == dense.keys()
    assert max(float((paged[where] - dense[where]).abs().max()) for where in dense) < 2e-5


def test_requests_that_come_after_scoring_find_what_was_there_before_it() -> None:
    engine = small_engine(kv=PAGED, prefix_cache=True)
    generate(engine, request("a", 100, 4))
    scored(engine, [random.Random(0).choices(range(128), k=50)], 20)
    generate(engine, request("a", 100, 4))

    assert engine.stats()["prefix_hit_tokens"] == 96
    assert finish(engine) == {}

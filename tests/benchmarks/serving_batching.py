"""Batching parts of serving.py: continuous against static, chunked prefill, prefix cache, its lookup."""

import itertools
import random
import statistics
import time
from collections.abc import Mapping
from typing import Any

from codesign.engine.attention.paged import PagedAttention
from codesign.engine.block_pool import BlockPool
from codesign.engine.engine import Engine
from codesign.engine.prefix_cache import PrefixCache
from codesign.engine.sequence import Sequence
from codesign.engine.step import BLOCK_TOKENS
from codesign.results.measurement import percentile
from codesign.spec.request import Request
from tests.benchmarks.serving_runs import (
    Run,
    Setting,
    bar,
    engine_of,
    model,
    ratio,
    request,
    requests_of,
    run,
    turn_about,
)

BATCH = 16
PROMPT_TOKENS = 16


def batching(setting: Setting) -> dict[str, Any]:
    """Continuous against static batching: outputs of lognormal length, the longest at least four times the mean."""
    lengths = lognormal_lengths(6 * BATCH)  # so many that the end, when the last ones run alone, does not decide
    requests = requests_of([(PROMPT_TOKENS, own) for own in lengths], setting.vocab_size, seed="batching")
    engines = {
        name: engine_of(
            model(setting.model_dir),
            setting.threads,
            max_batch_size=BATCH,
            max_model_len=PROMPT_TOKENS + max(lengths),
            max_step_tokens=512,
            scheduler=name,
        )
        for name in ("static", "continuous")
    }
    warm(engines, setting)
    tokens: dict[str, dict[str, list[int]]] = {}

    def wall_s(name: str, index: int) -> float:
        found = run(engines[name], requests)
        tokens[name] = dict(found.tokens)
        setting.say(f"batching round {index}: {name}: {found.num_output / found.wall_s:.1f} tokens/s")
        return found.wall_s

    walls = turn_about(list(engines), setting.rounds, wall_s)
    gain = ratio(walls["static"], walls["continuous"])
    return {
        "what": f"{len(lengths)} requests, {PROMPT_TOKENS} prompt tokens, outputs lognormal: mean "
        f"{statistics.mean(lengths):.1f}, longest {max(lengths)}; batch {BATCH}",
        "output_tokens": sum(lengths),
        "wall_s": walls,
        "same_tokens": same_share(tokens["static"], tokens["continuous"]),
        "bars": [bar("continuous over static, throughput", gain, 2.0)],
    }


def lognormal_lengths(count: int) -> list[int]:
    """A median of 12 tokens and a standard deviation of 1.25 in the logarithm: the first seed whose longest is at least
    four times the mean."""
    for seed in itertools.count():
        rng = random.Random(f"lengths {seed}")
        lengths = [max(1, min(240, round(rng.lognormvariate(2.5, 1.25)))) for _ in range(count)]
        if max(lengths) >= 4 * statistics.mean(lengths):
            return lengths
    raise AssertionError("endless")


def chunked(setting: Setting) -> dict[str, Any]:
    """Gaps between tokens of running outputs while long prompts come in: whole prompts against chunks of 64 tokens."""
    long_tokens, num_long, num_short = 768, 6, 8
    settings: dict[str, dict[str, Any]] = {
        "whole prompts": {"scheduler": "continuous", "max_step_tokens": 2048},
        "chunks of 64": {
            "scheduler": {"name": "continuous", "prefill_chunk_tokens": 64},
            "max_step_tokens": 2048,
        },
    }
    engines = {
        name: engine_of(
            model(setting.model_dir), setting.threads, max_batch_size=BATCH, max_model_len=long_tokens + 320, **own
        )
        for name, own in settings.items()
    }
    warm(engines, setting)
    short = requests_of([(16, 200)] * num_short, setting.vocab_size, seed="short", name="short")
    long = requests_of([(long_tokens, 4)] * num_long, setting.vocab_size, seed="long", name="long")
    arrivals_s = [0.0] * num_short + [1.0 + 2.0 * index for index in range(num_long)]
    found: dict[str, list[Run]] = {name: [] for name in engines}

    def p99_ms(name: str, index: int) -> float:
        one = run(engines[name], [*short, *long], arrivals_s)
        found[name].append(one)
        gap = percentile(gaps_ms(one, "short"), 99)
        setting.say(f"chunked round {index}: {name}: ITL p99 {gap:.0f} ms")
        return gap

    p99 = turn_about(list(engines), setting.rounds, p99_ms)
    gain = ratio(p99["whole prompts"], p99["chunks of 64"])
    return {
        "what": f"{num_short} running outputs of 200 tokens while {num_long} prompts of {long_tokens} tokens arrive, "
        "one every 2 s",
        "itl_p99_ms": p99,
        "itl_p50_ms": {name: [percentile(gaps_ms(own, "short"), 50) for own in runs] for name, runs in found.items()},
        "ttft_of_long_ms": {
            name: [long_ttft_ms(own, arrivals_s[num_short:]) for own in runs] for name, runs in found.items()
        },
        "wall_s": {name: [own.wall_s for own in runs] for name, runs in found.items()},
        "bars": [bar("p99 of the gaps, whole prompts over chunks", gain, 2.0)],
    }


def gaps_ms(one: Run, prefix: str) -> list[float]:
    return [
        (late - early) * 1e3
        for name, stamps in one.stamps.items()
        if name.startswith(prefix)
        for early, late in itertools.pairwise(stamps)
    ]


def long_ttft_ms(one: Run, arrivals_s: list[float]) -> float:
    return statistics.median((one.stamps[f"long{i}"][0] - at) * 1e3 for i, at in enumerate(arrivals_s))


def prefix(setting: Setting) -> dict[str, Any]:
    """Input throughput with and without prefix cache where 0, half and nine tenths of each prompt are shared."""
    prompt_tokens, count, parts = 640, 12, {}
    common: dict[str, Any] = {
        "max_batch_size": 4,
        "max_model_len": prompt_tokens + 8,
        "max_step_tokens": prompt_tokens,
        "kv": {"layout": "paged"},
    }
    bars = []
    engines = {
        "off": engine_of(model(setting.model_dir), setting.threads, **common),
        "on": engine_of(model(setting.model_dir), setting.threads, **common, prefix_cache=True),
    }
    warm(engines, setting)
    for share, wanted in ((0.0, 0.99), (0.5, 1.7), (0.9, 4.0)):
        walls: dict[str, list[float]] = {name: [] for name in engines}
        for index in range(setting.rounds + 4 * (share == 0)):  # a difference of one percent wants more rounds
            asked = shared_prompts(count, prompt_tokens, share, setting.vocab_size, f"{share} {index}")
            for name, wall_s in prompt_by_prompt(engines, asked).items():
                walls[name].append(wall_s)
        gain = ratio(walls["off"], walls["on"])
        setting.say(f"prefix {share:.0%} shared: {gain['median']:.2f} x")
        parts[f"{share:.0%}"] = {"wall_s": walls, "gain": gain}
        bars.append(bar(f"prefix cache on over off, {share:.0%} of the tokens shared", gain, wanted))
    return {
        "what": f"{count} prompts of {prompt_tokens} tokens, one output token each, the shared beginning in the cache "
        "from the first of them on; each prompt with and without the cache before the next one",
        "shares": parts,
        "memory_at_90%": memory_use(
            engines["on"], shared_prompts(count, prompt_tokens, 0.9, setting.vocab_size, "memory", output_tokens=8)
        ),
        "bars": bars,
    }


def prompt_by_prompt(engines: Mapping[str, Engine], requests: list[Request]) -> dict[str, float]:
    """Seconds of each engine for all requests. A machine that slows down meanwhile slows all engines."""
    walls = dict.fromkeys(engines, 0.0)
    for index, own in enumerate(requests):
        for name in engines if index % 2 == 0 else reversed(list(engines)):
            walls[name] += run(engines[name], [own]).wall_s
    return walls


def memory_use(engine: Engine, requests: list[Request]) -> dict[str, float | int]:
    """What the blocks hold while requests run, after each step: most bytes shared, and the share of rows unused."""
    attention = engine.parts.attention
    assert isinstance(attention, PagedAttention)
    for own in requests:
        engine.submit(own)
    seen = []
    while engine.has_work:
        engine.step()
        seen.append(attention.kv_use)
    busy = [use for use in seen if use.rows_allocated]
    return {
        "shared_bytes_most": max(use.shared_bytes for use in busy),
        "allocated_bytes_most": max(use.blocks_used for use in busy) * attention.block_bytes,
        "fragmentation_median": statistics.median(use.fragmentation for use in busy),
        "steps": len(busy),
    }


def shared_prompts(
    count: int, num_tokens: int, share: float, vocab_size: int, seed: str, *, output_tokens: int = 1
) -> list[Request]:
    """The first request comes with the beginning that all share; its own cost counts."""
    rng = random.Random(f"prefix {seed}")
    head = rng.choices(range(vocab_size), k=round(num_tokens * share))
    prompts = [head + rng.choices(range(vocab_size), k=num_tokens - len(head)) for _ in range(count)]
    return [request(f"{seed} {index}", prompt, output_tokens) for index, prompt in enumerate(prompts)]


def lookup(setting: Setting) -> dict[str, Any]:
    """Microseconds to look a prompt up among few and among a hundred times as many cached ones."""
    prompt_tokens, counts, asked = 1024, (100, 10_000), 400
    caches = {count: filled(count, prompt_tokens) for count in counts}
    rng = random.Random("lookup")
    found: dict[str, list[float]] = {str(count): [] for count in counts}
    for index in range(5 * setting.rounds):
        for count in counts if index % 2 == 0 else reversed(counts):
            # Half of each prompt is known, from a place that is new to the processor's caches.
            known = [rng.randrange(count) for _ in range(asked)]
            sequences = [new_sequence(number, prompt_tokens, known_tokens=prompt_tokens // 2) for number in known]
            started = time.perf_counter()
            hits = [len(caches[count].match(own)) for own in sequences]
            found[str(count)].append((time.perf_counter() - started) / asked * 1e6)
            assert hits == [prompt_tokens // 2 // BLOCK_TOKENS] * asked
    few, many = (found[str(count)] for count in counts)
    return {
        "what": f"prompts of {prompt_tokens} tokens, half of each known, among {counts[0]} and {counts[1]} cached "
        "prompts",
        "lookup_us": found,
        "bars": [bar("lookup among 100 cached prompts over among 10 000, time", ratio(few, many), 0.5)],
    }


def filled(count: int, prompt_tokens: int) -> PrefixCache:
    pool = BlockPool(count * prompt_tokens // BLOCK_TOKENS)
    cache = PrefixCache(pool, seed=b"lookup")
    for number in range(count):
        sequence = new_sequence(number, prompt_tokens)
        sequence.blocks = pool.take(prompt_tokens // BLOCK_TOKENS)
        sequence.num_computed = prompt_tokens
        cache.learn(sequence)
        pool.release(sequence.blocks[::-1])
    return cache


def new_sequence(number: int, num_tokens: int, known_tokens: int | None = None) -> Sequence:
    """The numbered prompt, or one that goes another way after `known_tokens`."""
    tokens = random.Random(number).choices(range(32000), k=num_tokens)
    if known_tokens is not None:
        tokens[known_tokens:] = [32000] * (num_tokens - known_tokens)
    return Sequence(request(str(number), tokens, 1))


def warm(engines: dict[str, Engine], setting: Setting) -> None:
    for name, engine in engines.items():
        run(engine, requests_of([(24, 4)] * 4, setting.vocab_size, seed="warm", name=f"warm {name}"))


def same_share(one: dict[str, list[int]], other: dict[str, list[int]]) -> float:
    """Share of requests with the same tokens; bf16 rounds with the shape of the batch, so it need not be 1."""
    return sum(one[name] == other[name] for name in one) / len(one)

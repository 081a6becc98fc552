"""What the parts of serving.py share: models, prompts, a loop that stamps tokens, ratios within rounds."""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from codesign.bundled import heldout_texts, target_path
from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.models.tokenizer import Tokenizer
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from codesign.spec.request import Request, SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Attributes:
    model_dir: random-weights Qwen2 of 0.39 B parameters, or fewer layers of it.
    rounds: interleaved repetitions; a ratio is taken within each.
    """

    model_dir: Path
    vocab_size: int
    threads: int
    rounds: int
    say: Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Attributes:
    wall_s: first submission to last token.
    stamps: request id -> time of each of its tokens, from the start.
    tokens: request id -> token ids.
    """

    wall_s: float
    stamps: Mapping[str, list[float]]
    tokens: Mapping[str, list[int]]

    @property
    def num_output(self) -> int:
        return sum(len(own) for own in self.tokens.values())


def model(folder: Path) -> ModelSpec:
    return ModelSpec(name=folder.name, path=str(folder))


def bundled() -> ModelSpec:
    return ModelSpec(name="bundled", path=str(target_path()))


def engine_of(spec: ModelSpec, threads: int, **config: Any) -> Engine:
    plain = {"dtype": "bf16", **config}
    return build_engine(spec, EngineConfig.from_dict(plain), num_threads=threads)


def requests_of(lengths: Sequence[tuple[int, int]], vocab_size: int, *, seed: object, name: str = "") -> list[Request]:
    """One request of random tokens for each (prompt, output) length."""
    rng = random.Random(f"{seed}")
    return [
        request(f"{name}{index}", rng.choices(range(vocab_size), k=num_prompt), num_output)
        for index, (num_prompt, num_output) in enumerate(lengths)
    ]


def request(name: str, prompt: Sequence[int], num_output: int, **sampling: Any) -> Request:
    params = SamplingParams(max_tokens=num_output, **{"ignore_eos": True, **sampling})
    return Request(request_id=name, prompt_token_ids=tuple(prompt), sampling=params)


def run(engine: Engine, requests: Sequence[Request], arrivals_s: Sequence[float] | None = None) -> Run:
    """Steps until all is done; a request enters before the first step after its arrival, all at once without any."""
    waiting = sorted(zip(arrivals_s or [0.0] * len(requests), range(len(requests)), strict=True))
    stamps: dict[str, list[float]] = {}
    tokens: dict[str, list[int]] = {}
    started = time.perf_counter()
    while waiting or engine.has_work:
        now = time.perf_counter() - started
        while waiting and waiting[0][0] <= now:
            engine.submit(requests[waiting.pop(0)[1]])
        if not engine.has_work:
            time.sleep(max(0.0, waiting[0][0] - now))
            continue
        outputs = engine.step()
        now = time.perf_counter() - started
        for output in outputs:
            stamps.setdefault(output.request_id, []).append(now)
            tokens.setdefault(output.request_id, []).append(output.token_id)
    return Run(wall_s=max(own[-1] for own in stamps.values()), stamps=stamps, tokens=tokens)


def turn_about(names: Sequence[str], rounds: int, measure: Callable[[str, int], float]) -> dict[str, list[float]]:
    """`measure(name, round)` of every contender in every round, forwards and backwards by turns."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for name in names if index % 2 == 0 else list(reversed(names)):
            found[name].append(measure(name, index))
    return found


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float | int]:
    """Median over rounds of slow / fast, with the smallest and the largest."""
    values = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def bar(name: str, found: Mapping[str, float | int], wanted: float) -> dict[str, Any]:
    return {"bar": name, "wanted": wanted, "found": found, "met": found["median"] >= wanted}


def text_prompts(count: int, num_tokens: int, *, seed: int) -> list[tuple[int, ...]]:
    """Stretches of held-out text, from random places."""
    tokenizer, rng = Tokenizer(target_path()), random.Random(seed)
    ids = [token for text in heldout_texts() for token in tokenizer.encode(text.text)]
    starts = [rng.randrange(len(ids) - num_tokens) for _ in range(count)]
    return [tuple(ids[start : start + num_tokens]) for start in starts]

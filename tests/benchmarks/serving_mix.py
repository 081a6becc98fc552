"""The mix of serving.py: many requests of different lengths, ours beside transformers' generation and vLLM on the CPU.

Every contender gets the same requests at once, in the same order, and its time is until the last token. transformers
generates in batches as large as ours, as they come; and once more sorted by output length, so that it pads as little as
it can, though nobody knows these lengths beforehand.
"""

import json
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from codesign.engine.engine import Engine
from tests.benchmarks.serving_runs import (
    Setting,
    bar,
    engine_of,
    model,
    ratio,
    request,
    run,
    turn_about,
)

NUM_REQUESTS, BATCH = 256, 32
LENGTHS = (100, 1024)  # of prompts and outputs, before they are scaled to the machine
VLLM = Path(__file__).parent / "serving_vllm.py"


def mix(setting: Setting, *, scale: float, vllm_python: Path | None) -> dict[str, Any]:
    """Args:
    scale: of all lengths.
    vllm_python: of an environment that has vLLM; None leaves it out.
    """
    rng = random.Random("mix")
    low, high = (max(1, round(length * scale)) for length in LENGTHS)
    prompts = [rng.choices(range(setting.vocab_size), k=rng.randint(low, high)) for _ in range(NUM_REQUESTS)]
    counts = [rng.randint(low, high) for _ in range(NUM_REQUESTS)]
    peers: dict[str, Callable[[list[list[int]], list[int]], float]] = {}
    ours = engine_of(
        model(setting.model_dir),
        setting.threads,
        max_batch_size=BATCH,
        max_model_len=2 * high,
        max_step_tokens=512,
        kernels={"fused": True},
    )
    peers["codesign bf16"] = lambda own, wanted: our_wall_s(ours, own, wanted)
    peers["transformers bf16"] = transformers_wall_s(setting.model_dir, is_sorted=False)
    peers["transformers bf16, sorted"] = transformers_wall_s(setting.model_dir, is_sorted=True)
    versions: dict[str, str] = {}
    vllm = None
    if vllm_python is not None:
        vllm = Vllm(vllm_python, setting, 2 * high)
        peers["vLLM bf16"], versions["vllm"] = vllm.wall_s, vllm.version
    for peer in peers.values():
        peer(prompts[:BATCH], [4] * BATCH)

    def wall_s(name: str, index: int) -> float:
        found = peers[name](prompts, counts)
        setting.say(f"mix round {index}: {name}: {found:.1f} s, {sum(counts) / found:.0f} output tokens/s")
        return found

    walls = turn_about(list(peers), setting.rounds, wall_s)
    if vllm is not None:
        vllm.close()
    bars = [bar("mix, ours over transformers", ratio(walls["transformers bf16"], walls["codesign bf16"]), 3.0)]
    if vllm is not None:
        bars.append(
            bar("mix, ours over vLLM (the mark to reach)", ratio(walls["vLLM bf16"], walls["codesign bf16"]), 1.0)
        )
    ahead = ratio(walls["transformers bf16, sorted"], walls["codesign bf16"])
    return {
        "what": f"{NUM_REQUESTS} requests, prompts and outputs of {low} to {high} tokens (100 to 1024, times "
        f"{scale:g}), at most {BATCH} at once, all there from the start. transformers takes them as they come; if they "
        f"are sorted by output length, which nobody knows beforehand, ours is {ahead['median']:.2f} "
        f"[{ahead['min']:.2f}, {ahead['max']:.2f}] times as fast",
        "prompt_tokens": sum(map(len, prompts)),
        "output_tokens": sum(counts),
        "wall_s": walls,
        "versions": versions,
        "profile": profile(ours, prompts, counts),
        "bars": bars,
    }


def our_wall_s(engine: Engine, prompts: list[list[int]], counts: list[int]) -> float:
    asked = [request(str(i), *own) for i, own in enumerate(zip(prompts, counts, strict=True))]
    found = run(engine, asked)
    assert found.num_output == sum(counts)
    return found.wall_s


def transformers_wall_s(folder: Path, *, is_sorted: bool) -> Callable[[list[list[int]], list[int]], float]:
    from transformers import Qwen2ForCausalLM

    loaded = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def wall_s(prompts: list[list[int]], counts: list[int]) -> float:
        order = list(range(len(prompts)))
        if is_sorted:
            order.sort(key=lambda i: (counts[i], len(prompts[i])))
        started = time.perf_counter()
        for first in range(0, len(order), BATCH):
            own = order[first : first + BATCH]
            longest = max(len(prompts[i]) for i in own)
            ids = torch.tensor([[0] * (longest - len(prompts[i])) + prompts[i] for i in own])
            seen = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in own])
            most = max(counts[i] for i in own)
            with torch.inference_mode():
                out = loaded.generate(
                    ids, attention_mask=seen, min_new_tokens=most, max_new_tokens=most, do_sample=False
                )
            assert out.shape[1] == longest + most
        return time.perf_counter() - started

    return wall_s


class Vllm:
    """vLLM in a process of its own, spoken to by lines of JSON."""

    def __init__(self, python: Path, setting: Setting, max_model_len: int) -> None:
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{setting.threads - 1}",
            "HF_HUB_OFFLINE": "1",
        }
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [str(python), str(VLLM), str(setting.model_dir), str(max_model_len), str(BATCH)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.version = str(self._read()["version"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM ended with {self._process.wait()}; run it by hand to see why")
        found: dict[str, Any] = json.loads(line)
        return found

    def wall_s(self, prompts: list[list[int]], counts: list[int]) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "output_tokens": counts}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        assert answer["output_tokens"] == counts, "vLLM gave other numbers of tokens"
        return float(answer["wall_s"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def profile(engine: Engine, prompts: list[list[int]], counts: list[int]) -> dict[str, Any]:
    """Where our time goes: steps by what they held, and the model's share of them."""
    runner, seconds, steps = engine.parts.runner, Counter[str](), Counter[str]()
    tokens: Counter[str] = Counter()
    inner = runner.run

    def timed(plan: Any) -> Any:
        kind = "prompts only" if all(plan.is_prompt) else "mixed" if any(plan.is_prompt) else "outputs only"
        started = time.perf_counter()
        found = inner(plan)
        seconds[kind] += time.perf_counter() - started
        steps[kind] += 1
        tokens[kind] += len(plan.token_ids)
        return found

    runner.run = timed  # type: ignore[method-assign]
    started = time.perf_counter()
    for i, own in enumerate(zip(prompts, counts, strict=True)):
        engine.submit(request(f"profile {i}", *own))
    while engine.has_work:
        engine.step()
    whole = time.perf_counter() - started
    runner.run = inner  # type: ignore[method-assign]
    return {
        "wall_s": whole,
        "beside_the_model_s": whole - sum(seconds.values()),
        "steps": {
            kind: {"steps": steps[kind], "tokens": tokens[kind], "seconds": own} for kind, own in seconds.items()
        },
    }

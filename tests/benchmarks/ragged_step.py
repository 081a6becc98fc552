"""Does a whole decode step of a ragged batch cost the sum of its lengths? One 2048-token sequence alone, with seven of
64 tokens beside it, and eight of 2048 tokens; engines of one random-weights model, stepped in turns.

    python tests/benchmarks/ragged_step.py [--rounds 60] [--threads 2] [--layers 6]

Prints one JSON document: medians in milliseconds per step with quartiles, and their ratios to the long sequence alone.
"""

import argparse
import json
import platform
import statistics
import time

import torch

from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.models.tiny import tiny_config
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from codesign.spec.request import Request, SamplingParams

CASES = {"long_alone": [2048], "long_and_seven_short": [2048] + [64] * 7, "eight_long": [2048] * 8}
WARM_UP_ROUNDS = 10


def decoding(lengths: list[int], args: argparse.Namespace) -> Engine:
    """An engine whose prompts are done."""
    shape = tiny_config(
        "Qwen2ForCausalLM",
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=args.layers,
        num_attention_heads=14,
        head_dim=64,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
    engine = build_engine(
        ModelSpec(name="ragged", architecture=shape),
        EngineConfig(max_batch_size=8, max_model_len=2560, max_step_tokens=2048),
        num_threads=args.threads,
    )
    sampling = SamplingParams(max_tokens=args.rounds + WARM_UP_ROUNDS + 100, ignore_eos=True)
    for number, length in enumerate(lengths):
        tokens = tuple((7 * place + number) % 32000 for place in range(length))
        engine.submit(Request(request_id=str(number), prompt_token_ids=tokens, sampling=sampling))
    started: set[str] = set()
    while len(started) < len(lengths):
        started |= {output.request_id for output in engine.step()}
    return engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 60), ("threads", 2), ("layers", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    engines = {name: decoding(lengths, args) for name, lengths in CASES.items()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(-WARM_UP_ROUNDS, args.rounds):
        for name, engine in engines.items():
            started = time.perf_counter()
            engine.step()
            if number >= 0:
                times[name].append((time.perf_counter() - started) * 1e3)
    alone = statistics.median(times["long_alone"])
    print(
        json.dumps(
            {
                "args": vars(args),
                "machine": f"{platform.machine()}, torch {torch.__version__}",
                "step_ms": {n: [round(q, 2) for q in statistics.quantiles(own, n=4)] for n, own in times.items()},
                "ratio_to_long_alone": {n: round(statistics.median(own) / alone, 3) for n, own in times.items()},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()

"""How long pipeline stages idle while prompts are prefilled, against (p - 1) / (m + p - 1).

    python tests/benchmarks/pipeline_idle.py [--rounds 5] [--repeats 5]

Two stages on two cores of this machine, eight equal prompts in one step, m = 1, 2, 4, 8 micro-batches; from the ranks'
event logs: idle = 1 - (time in layers) / (stages · time from the first begin to the last end). Median over rounds, in
which the m take turns, of repeats. Writes reports/benchmarks/pipeline_idle.json and .md; exits 1 when a share is off
by more than 0.05. Both cores must be free: where others compete for them, two busy stages are slower than one.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.parallel.runner import RankRunner
from codesign.measure.provenance import provenance
from codesign.spec.engine_config import EngineConfig
from codesign.spec.request import Request, SamplingParams

REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"
STAGES, PROMPTS, TOLERANCE = 2, 8, 0.05
# A small vocabulary, so that the stages are equal: the head would weigh on the last one.
MODEL = tiny_spec(
    vocab_size=256,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
)


def engine(num_micro_batches: int, prompt_tokens: int) -> Engine:
    config = {
        "dtype": "fp32",
        "max_batch_size": PROMPTS,
        "max_model_len": prompt_tokens + 1,
        "max_step_tokens": PROMPTS * prompt_tokens,
        "parallel": {"pipeline_parallel_size": STAGES, "num_micro_batches": num_micro_batches},
    }
    return build_engine(MODEL, EngineConfig.from_dict(config), num_threads=STAGES)


def prefill(built: Engine, prompt_tokens: int) -> tuple[float, float]:
    """(idle share, seconds) of one step with all prompts."""
    for index in range(PROMPTS):
        tokens = tuple(random.Random(index).choices(range(256), k=prompt_tokens))
        built.submit(Request(request_id=str(index), prompt_token_ids=tokens, sampling=SamplingParams(max_tokens=1)))
    built.step()
    assert not built.has_work, "all prompts fit into one step"
    runner = built.parts.runner
    assert isinstance(runner, RankRunner)
    runs = [(begin, end) for rank in runner.logs() for what, _, begin, end in rank["events"] if what == "run"]
    span = max(end for _, end in runs) - min(begin for begin, _ in runs)
    return 1 - sum(end - begin for begin, end in runs) / (STAGES * span), span / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts = (1, 2, 4, 8)
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    layers: list[list[int]] = []
    for repeat, count in itertools.product(range(arguments.rounds), counts):
        # one at a time: each engine pins its ranks to cores
        built = engine(count, arguments.prompt_tokens)
        prefill(built, arguments.prompt_tokens)  # warms up
        found[count] += [prefill(built, arguments.prompt_tokens) for _ in range(arguments.repeats)]
        layers = layers if repeat else [rank["layers"] for rank in built.facts()["resolved"]["ranks"]]
        built.close()
    rows: list[dict[str, Any]] = []
    for count in counts:
        shares = [share for share, _ in found[count]]
        expected = (STAGES - 1) / (count + STAGES - 1)
        rows.append(
            {
                "micro_batches": count,
                "expected": expected,
                "idle": statistics.median(shares),
                "quartiles": statistics.quantiles(shares, n=4),
                "step_s": statistics.median(seconds for _, seconds in found[count]),
                "holds": abs(statistics.median(shares) - expected) <= TOLERANCE,
            }
        )
    facts = {
        "command": " ".join(["python tests/benchmarks/pipeline_idle.py", *sys.argv[1:]]),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "layers": layers,
        "provenance": provenance(MODEL, "cpu"),
        "rows": rows,
    }
    (REPORTS / "pipeline_idle.json").write_text(json.dumps(facts, indent=1) + "\n")
    text = [
        "# Idle share of pipeline stages",
        "",
        f"`{facts['command']}`: 2 stages of layers {layers}, 8 prompts of {arguments.prompt_tokens} tokens in one "
        f"step, {arguments.rounds} x {arguments.repeats} repeats.",
        "",
        "| micro-batches | (p - 1) / (m + p - 1) | idle, median | quartiles | step (s) |",
        "|---|---|---|---|---|",
        *(
            f"| {row['micro_batches']} | {row['expected']:.3f} | {row['idle']:.3f} | "
            f"{row['quartiles'][0]:.3f} to {row['quartiles'][2]:.3f} | {row['step_s']:.3f} |"
            for row in rows
        ),
        "",
    ]
    (REPORTS / "pipeline_idle.md").write_text("\n".join(text))
    print("\n".join(text))
    return not all(row["holds"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())

"""What each weight format and method costs in quality: KL, top-1, perplexity and bytes, on held-out text.

    python tests/benchmarks/quality_weights.py [--model DIR] [--sequences 48] [--tokens 256]

Every configuration is built as a trial builds it, and its logits come out of the engine's own prefill step. A sequence
is one sample; intervals are 95 % bootstrap intervals over sequences, and differences between two configurations are
taken sequence by sequence. Writes reports/benchmarks/quality_weights.json and .md; exits 1 when an order that the
papers promise (REQUIRED) does not hold outside its interval.

The outlier variant is the same function with 1 % of the channels 20 times as large, as large models have them.
"""

import argparse
import json
import math
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codesign import __version__
from codesign.bundled import heldout_texts, target_path
from codesign.engine.build import build_engine
from codesign.engine.models.tokenizer import Tokenizer
from codesign.engine.quantize.linear import Linear
from codesign.engine.step import StepPlan
from codesign.spec.engine_config import Choice, EngineConfig
from codesign.spec.model import ModelSpec
from tests.engine.quantize.outliers import write_outlier_variant

REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"
Config = tuple[Choice, Choice]
NATIVE: Config = (Choice("native"), Choice("none"))
RESAMPLES = 2000


def configs() -> dict[str, Config]:
    """Name -> weights and pruning."""
    found: dict[str, Config] = {"native": NATIVE}

    def add(name: str, method: str, **knobs: Any) -> None:
        told = {"bits": "{} bits", "group_size": "g{}", "emulated": "emulated"}
        shown = [text.format(knobs[knob]) for knob, text in told.items() if knob in knobs]
        found[" ".join([name, *shown, method])] = (Choice.of(name, method=method, **knobs), Choice("none"))

    for method in ("rtn", "gptq"):
        add("int8", method)
    for method in ("rtn", "smoothquant"):
        add("w8a8", method)
        add("fp8", method, emulated=True)
    for name, sizes in (("int4", (32, 128)), ("int3", (32, 128)), ("int2", (32,))):
        for size in sizes:
            for method in ("rtn", "hqq", "awq", "gptq"):
                add(name, method, group_size=size)
    for method in ("rtn", "gptq"):
        add("mixed", method, bits=3.5, group_size=128)
    for method in ("rtn", "awq", "gptq"):
        add("nf4", method)
    for pruner in ("magnitude", "wanda"):
        for pattern in ("unstructured", "two_of_four"):
            found[f"native {pruner} {pattern} 0.5"] = (Choice("native"), Choice.of(pruner, pattern=pattern))
    return found


# What the outlier variant is judged in.
ON_OUTLIERS = (
    *("native", "int8 rtn", "w8a8 rtn", "w8a8 smoothquant", "fp8 emulated rtn", "fp8 emulated smoothquant"),
    *(f"int{bits} g128 {method}" for bits in (4, 3) for method in ("rtn", "awq", "gptq")),
)
# (better, worse, share of the worse one's KL that must be gone, on the outlier variant)
REQUIRED = [
    *((f"int{bits} g{size} gptq", f"int{bits} g{size} rtn", 0.25 if bits == 4 else 0.0, False)
      for bits, size in ((4, 32), (4, 128), (3, 32), (3, 128), (2, 32))),
    *((f"int{bits} g{size} hqq", f"int{bits} g{size} rtn", 0.0, False) for bits, size in ((4, 32), (4, 128), (3, 32))),
    *((f"int{bits} g128 awq", f"int{bits} g128 rtn", 0.0, True) for bits in (4, 3)),
    ("w8a8 smoothquant", "w8a8 rtn", 0.0, True),
    *((f"mixed 3.5 bits g128 {method}", f"int3 g128 {method}", 0.0, False) for method in ("rtn", "gptq")),
]  # fmt: skip


class Judge:
    """Scores configurations of one model against the unmodified one."""

    def __init__(self, path: Path, num_sequences: int, num_tokens: int) -> None:
        self.spec = ModelSpec(name=path.name, path=str(path))
        tokenizer, rng = Tokenizer(path), random.Random(1)
        documents = [ids for text in heldout_texts() if len(ids := tokenizer.encode(text.text)) > num_tokens]
        self.sequences = []
        for number in range(num_sequences):
            ids = documents[number % len(documents)]
            start = rng.randrange(len(ids) - num_tokens)
            self.sequences.append(ids[start : start + num_tokens + 1])
        self.num_tokens = num_tokens
        self.reference, _, _ = self._logits(NATIVE)

    def _logits(self, config: Config) -> tuple[list[torch.Tensor], int, float]:
        started = time.perf_counter()
        engine = build_engine(
            self.spec,
            EngineConfig(weights=config[0], prune=config[1], max_batch_size=1, max_model_len=self.num_tokens + 1),
        )
        seconds = time.perf_counter() - started
        found = []
        for ids in self.sequences:
            count = len(ids) - 1
            plan = StepPlan(
                frees=(0,),
                slots=(0,),
                query_lens=(count,),
                token_ids=tuple(ids[:-1]),
                positions=tuple(range(count)),
                is_prompt=(True,),
                is_prompt_end=(True,),
                logits_rows=tuple(range(count)),
            )
            found.append(engine.parts.runner.run(plan).log_softmax(-1))
        linears = [part for layer in engine.parts.model.layers for part in layer.modules() if isinstance(part, Linear)]
        self.num_weights = sum(linear.in_features * linear.out_features for linear in linears)
        return found, sum(linear.num_bytes for linear in linears), seconds

    def __call__(self, config: Config) -> dict[str, Any]:
        logits, linear_bytes, seconds = self._logits(config)
        kl, top1, nll = [], [], []
        for ours, theirs, ids in zip(logits, self.reference, self.sequences, strict=True):
            kl.append(float((theirs.double().exp() * (theirs - ours)).sum(-1).mean()))
            top1.append(float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()))
            nll.append(-float(ours.gather(-1, torch.tensor(ids[1:])[:, None]).mean()))
        return {
            "kl": kl,
            "top1": top1,
            "nll": nll,
            "bits_per_weight": 8 * linear_bytes / self.num_weights,
            "build_s": seconds,
        }


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over sequences."""
    array = np.array(values)
    picks = np.random.default_rng(0).integers(0, len(array), (RESAMPLES, len(array)))
    means = array[picks].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(array.mean()), float(low), float(high)


def verdicts(results: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """For every promised order: the mean of (worse (1 - share) - better) over sequences.

    It must be above 0 with its whole interval; for hqq, which promises to be no worse, its interval must not lie below.
    """
    found = []
    for better, worse, share, on_outliers in REQUIRED:
        model = "outlier variant" if on_outliers else "model"
        own = results[model]
        gaps = [w * (1 - share) - b for b, w in zip(own[better]["kl"], own[worse]["kl"], strict=True)]
        mean, low, high = interval(gaps)
        found.append({
            "better": better, "worse": worse, "on": model, "share_removed_required": share,
            "share_removed": 1 - float(np.mean(own[better]["kl"]) / np.mean(own[worse]["kl"])),
            "gap": mean, "low": low, "high": high, "holds": (high if better.endswith("hqq") else low) > 0,
        })  # fmt: skip
    return found


def table(results: dict[str, dict[str, dict[str, Any]]], checks: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    lines = [
        "# Quality of weight formats and methods",
        "",
        f"`{facts['command']}`, {facts['date']}: {facts['num_sequences']} held-out sequences of {facts['num_tokens']} "
        f"tokens, {facts['machine']}, torch {facts['torch']}.",
        "KL is to the unmodified model in bf16, in nats per token; brackets: 95 % bootstrap intervals over sequences.",
        "Bits are what the decoder's linear layers hold, over their weights. Builds were timed without the cache; the",
        "second of the mixed rows found the sensitivities that the first had measured.",
        f"Load average: {facts['load_average']}; other work on the machine makes builds slower.",
    ]
    for model, own in results.items():
        lines += ["", f"## {model[0].upper()}{model[1:]}: {facts['models'][model]}", ""]
        lines += ["| weights | KL | top-1 | perplexity | bits a weight | build, s |", "|---|---|---|---|---|---|"]
        for name, result in own.items():
            kl, low, high = interval(result["kl"])
            top1, perplexity = float(np.mean(result["top1"])), math.exp(float(np.mean(result["nll"])))
            lines.append(
                f"| {name} | {kl:.5f} [{low:.5f}, {high:.5f}] | {top1:.4f} | {perplexity:.3f} "
                f"| {result['bits_per_weight']:.2f} | {result['build_s']:.1f} |"
            )
    lines += ["", "## Orders that the papers promise", ""]
    lines += ["| better | worse | on | KL removed | required | holds |", "|---" * 6 + "|"]
    for check in checks:
        lines.append(
            f"| {check['better']} | {check['worse']} | {check['on']} | {check['share_removed']:.0%} "
            f"| > {check['share_removed_required']:.0%} | {'yes' if check['holds'] else '**NO**'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=target_path())
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, default=REPORTS / "quality_weights.json")
    args = parser.parse_args()
    results: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch  # builds are timed without the cache
        variant = write_outlier_variant(args.model, Path(scratch) / "outliers", dtype=torch.bfloat16)
        for model, path in (("model", args.model), ("outlier variant", variant)):
            judge = Judge(path, args.sequences, args.tokens)
            results[model] = {}
            chosen = configs() if path == args.model else {name: configs()[name] for name in ON_OUTLIERS}
            for name, config in chosen.items():
                results[model][name] = judge(config)
                kl = np.mean(results[model][name]["kl"])
                print(f"{model}: {name}: KL {kl:.5f}", file=sys.stderr, flush=True)
    facts = {
        "command": " ".join(["python tests/benchmarks/quality_weights.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "codesign": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "load_average": round(os.getloadavg()[0], 1),
        "num_sequences": args.sequences,
        "num_tokens": args.tokens,
        "models": {
            "model": "the bundled target" if args.model == target_path() else args.model.name,
            "outlier variant": "the same function, norm weights x 20 on 1 % of the channels",
        },
    }
    checks = verdicts(results)
    args.out.write_text(json.dumps({"facts": facts, "checks": checks, "results": results}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(results, checks, facts))
    print(args.out.with_suffix(".md").read_text())
    return 0 if all(check["holds"] for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Decode and prefill of our engine beside transformers' generation: same weights, same threads, turn about.

    python tests/benchmarks/engine_cpu.py                        # all batches; minutes to an hour, see --seconds
    python tests/benchmarks/engine_cpu.py --batch 1 --layers 4   # a quick look

A random-weights Qwen2 of 0.39 B parameters in bf16, written once by transformers. In every round each contender
generates greedily from the same 128-token prompts; a decode figure is the median gap between tokens of one round, a
prefill figure the time to the first token of every sequence. Ratios are taken within a round, since a shared machine
drifts between rounds, and their median is reported with the smallest and largest round.
"""

import argparse
import dataclasses
import datetime
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM, StoppingCriteria, StoppingCriteriaList

from codesign.engine.build import build_engine
from codesign.spec.engine_config import Choice, EngineConfig
from codesign.spec.model import ModelSpec
from codesign.spec.request import Request, SamplingParams

PROMPT_TOKENS = 128
REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"
PEER = "transformers bf16"
Now = Callable[[], float]
# On a busy machine one thread's own time is the steadier figure; with several threads it means nothing.
CLOCKS: dict[str, Now] = {"wall": time.perf_counter, "cpu": time.process_time}
# (ratio, batch sizes, bar): what the project has promised.
BARS = [
    ("decode native / transformers", [1], 1.15),
    ("decode native / transformers", [8, 32], 1.0),
    ("prefill native / transformers", [1, 8, 32], 0.95),
    ("decode int4 / transformers", [1], 2.2),
    ("prefill int4 / native", [32], 0.77),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """One generation.

    Attributes:
        prefill_ms: start to the first token of every sequence.
        decode_ms: median gap between the tokens after it.
    """

    prefill_ms: float
    decode_ms: float


Contender = Callable[[list[list[int]], int], Round]
"""(prompts, output tokens) -> Round."""


def of_stamps(started: float, stamps: list[float]) -> Round:
    gaps = [(late - early) * 1e3 for early, late in itertools.pairwise(stamps)]
    return Round(prefill_ms=(stamps[0] - started) * 1e3, decode_ms=statistics.median(gaps))


class Clock(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """Never stops anything; notes when each token came."""

    def __init__(self, now: Now) -> None:
        self.now = now
        self.stamps: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self.stamps.append(self.now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def transformers_contender(model_dir: Path, now: Now) -> Contender:
    model = Qwen2ForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()

    def generate(prompts: list[list[int]], num_tokens: int) -> Round:
        clock, ids = Clock(now), torch.tensor(prompts)
        started = now()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        return of_stamps(started, clock.stamps)

    return generate


def our_contender(
    model_dir: Path, weights: str, *, batch_size: int, num_threads: int, now: Now
) -> tuple[Contender, dict]:
    engine = build_engine(
        ModelSpec(name="qwen2-0.4b-random", path=str(model_dir)),
        EngineConfig(
            dtype="bf16",
            max_batch_size=batch_size,
            max_model_len=256,
            max_step_tokens=batch_size * PROMPT_TOKENS,
            weights=Choice(weights),
        ),
        num_threads=num_threads,
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> Round:
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            engine.submit(Request(request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling))
        started, stamps = now(), []
        while engine.has_work:
            if len(engine.step()) == len(prompts):
                stamps.append(now())
        if len(stamps) != num_tokens:
            raise RuntimeError(f"{weights}: {len(stamps)} steps gave every sequence a token, expected {num_tokens}")
        return of_stamps(started, stamps)

    return generate, engine.facts()


def write_model(folder: Path, num_layers: int) -> Path:
    """The model directory, written by transformers itself; reused when it is there."""
    target = folder / f"qwen2-random-{num_layers}x896"
    if not (target / "config.json").exists():
        torch.manual_seed(0)
        config = Qwen2Config(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=num_layers,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=32000,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            dtype="bfloat16",
        )
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    return target


def run_batch(model_dir: Path, batch_size: int, args: argparse.Namespace) -> dict:
    """Interleaved rounds of every contender at one batch size, until `--rounds` or `--seconds` is reached."""
    now = CLOCKS[args.clock]
    contenders: dict[str, Contender] = {PEER: transformers_contender(model_dir, now)}
    facts = {}
    for name in args.weights:
        contenders[name], facts[name] = our_contender(
            model_dir, name, batch_size=batch_size, num_threads=args.threads, now=now
        )
    generator = torch.Generator().manual_seed(batch_size)
    shape = (batch_size, PROMPT_TOKENS)
    prompts = torch.randint(0, 32000, shape, generator=generator).tolist()
    if not args.no_warm_up:
        for contender in contenders.values():
            contender([prompt[:8] for prompt in prompts], 3)
    rounds: dict[str, list[Round]] = {name: [] for name in contenders}
    started = time.perf_counter()
    for index in range(args.rounds):
        order = list(contenders) if index % 2 == 0 else list(reversed(contenders))
        for name in order:
            found = contenders[name](prompts, args.tokens)
            rounds[name].append(found)
            print(f"B={batch_size} round {index}: {name}: {found}", flush=True)
        spent = time.perf_counter() - started
        if spent + spent / (index + 1) > args.seconds:
            break
    del contenders
    gc.collect()
    return {
        "batch_size": batch_size,
        "num_rounds": len(rounds[PEER]),
        "rounds": {name: [dataclasses.asdict(r) for r in found] for name, found in rounds.items()},
        "kernels": {name: found["kernels"] for name, found in facts.items()},
        "bytes": {name: found["bytes"] for name, found in facts.items()},
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(batch: dict, phase: str, name: str, base: str) -> dict[str, float]:
    """How many times faster `name` is than `base`, round by round."""
    pairs = zip(batch["rounds"][base], batch["rounds"][name], strict=True)
    return spread([slow[f"{phase}_ms"] / fast[f"{phase}_ms"] for slow, fast in pairs])


def summarise(batch: dict) -> dict:
    names = list(batch["rounds"])
    times = {
        name: {phase: spread([r[f"{phase}_ms"] for r in batch["rounds"][name]]) for phase in ("decode", "prefill")}
        for name in names
    }
    found = {
        f"{phase} {name} / transformers": ratios(batch, phase, name, PEER)
        for name in names[1:]
        for phase in ("decode", "prefill")
    }
    if {"int4", "native"} <= set(names):
        found["prefill int4 / native"] = ratios(batch, "prefill", "int4", "native")
    return {"times_ms": times, "speed_ratios": found}


def cell(value: dict[str, float], digits: int) -> str:
    return f"{value['median']:.{digits}f} [{value['min']:.{digits}f}, {value['max']:.{digits}f}]"


def table(runs: list[dict]) -> str:
    lines = [
        "# Our engine beside transformers on this CPU",
        "",
        f"Random-weights Qwen2 of 896-wide layers (24 of them are 0.39 B parameters), bf16, {PROMPT_TOKENS}-token",
        "prompts, greedy. Median over interleaved rounds [smallest, largest]; ratios are taken within a round.",
        "Clock `cpu`: the one thread's own time, for machines that are busy with other work.",
        "",
        "| batch | layers | threads, clock | rounds | contender | decode ms per step | x transformers | prefill ms "
        "| x transformers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        summary, made = run["summary"], run["provenance"]
        where = (
            f"{run['batch_size']} | {run['num_layers']} | {made['num_threads']}, {made['clock']} | {run['num_rounds']}"
        )
        for name, times in summary["times_ms"].items():
            versus = [summary["speed_ratios"].get(f"{phase} {name} / transformers") for phase in ("decode", "prefill")]
            decode, prefill = (cell(value, 2) if value else "" for value in versus)
            shown = [where, name, cell(times["decode"], 1), decode, cell(times["prefill"], 0), prefill]
            lines.append(f"| {' | '.join(shown)} |")
    lines += ["", "| bar | batch | layers | wanted | found | met |", "|---|---|---|---|---|---|"]
    for run in runs:
        for bar in run["bars"]:
            lines.append(
                f"| {bar['ratio']} | {run['batch_size']} | {run['num_layers']} | {bar['wanted']} | {bar['found']:.2f} "
                f"| {'yes' if bar['met'] else '**no**'} |"
            )
    lines += [
        "",
        "| batch | CPU | torch | transformers | commit | date | load before, after | command |",
        "|---" * 8 + "|",
    ]
    for run in runs:
        made = run["provenance"]
        loads = f"{made['load_average_before'][0]}, {made['load_average_after'][0]}"
        lines.append(
            f"| {run['batch_size']} | {made['cpu']}, {made['num_cores']} cores, ATen {made['cpu_capability']} "
            f"| {made['torch']} | {made['transformers']} | {made['commit']} | {made['date']} | {loads} "
            f"| `{made['command']}` |"
        )
    return "\n".join(lines) + "\n"


def judge(batch_size: int, summary: dict) -> list[dict]:
    """The bars that say something about this batch size, with what was found."""
    found = []
    for ratio, sizes, wanted in BARS:
        if batch_size in sizes and ratio in summary["speed_ratios"]:
            median = summary["speed_ratios"][ratio]["median"]
            found.append({"ratio": ratio, "wanted": wanted, "found": median, "met": median >= wanted})
    return found


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=REPORTS.parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def provenance(args: argparse.Namespace) -> dict:
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "command": f"python tests/benchmarks/engine_cpu.py {' '.join(args.shown)}".strip(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_cores": os.cpu_count(),
        "num_threads": args.threads,
        "clock": args.clock,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_average_before": [round(x, 2) for x in os.getloadavg()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--weights", nargs="+", default=["native", "int8", "int4"])
    parser.add_argument("--rounds", type=int, default=7, help="most rounds per batch size")
    parser.add_argument("--seconds", type=float, default=900, help="no further round is begun that would pass this")
    parser.add_argument("--tokens", type=int, default=12, help="output tokens per sequence")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: this process's time; needs --threads 1")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--no-warm-up", action="store_true")
    parser.add_argument("--model-dir", type=Path, default=Path(tempfile.gettempdir()) / "codesign-benchmarks")
    parser.add_argument("--out", type=Path, default=REPORTS / "engine_cpu.json")
    parser.add_argument("--append", action="store_true", help="keep the runs that --out already holds")
    args = parser.parse_args()
    hidden = {"--append", "--out", str(args.out), "--model-dir", str(args.model_dir)}
    args.shown = [word for word in sys.argv[1:] if word not in hidden]
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu needs --threads 1")

    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="transformers")
    model_dir = write_model(args.model_dir, args.layers)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    runs: list[dict] = json.loads(args.out.read_text())["runs"] if args.append and args.out.exists() else []
    for batch_size in args.batch:
        made = provenance(args)
        run = {
            "provenance": made,
            "num_layers": args.layers,
            "prompt_tokens": PROMPT_TOKENS,
            "output_tokens": args.tokens,
        }
        run |= run_batch(model_dir, batch_size, args)
        made["load_average_after"] = [round(x, 2) for x in os.getloadavg()]
        run["summary"] = summarise(run)
        run["bars"] = judge(batch_size, run["summary"])
        runs.append(run)
        args.out.write_text(json.dumps({"schema_version": 1, "runs": runs}, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()

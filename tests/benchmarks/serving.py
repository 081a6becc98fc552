"""What serving techniques gain on this machine, each beside its plain comparison, and a mix beside other engines.

    python tests/benchmarks/serving.py                                  # all parts; the better part of an hour
    python tests/benchmarks/serving.py --parts batching chunked         # some of them
    python tests/benchmarks/serving.py --vllm .oracles/vllm/bin/python  # with vLLM beside us (`make vllm` installs it)

Rounds of the contenders take turns, ratios are taken within a round. Writes reports/benchmarks/serving.json and .md;
with --append it replaces the parts that were run and keeps the others. Exits 1 when a bar is not met.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from codesign.measure.provenance import provenance
from tests.benchmarks.engine_cpu import write_model
from tests.benchmarks.serving_batching import batching, chunked, lookup, prefix
from tests.benchmarks.serving_mix import mix
from tests.benchmarks.serving_runs import Setting, model
from tests.benchmarks.serving_speculation import copying, on_bundled_pair, on_truncated_pair, switched_off

REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"
TITLES = {
    "batching": "Continuous against static batching",
    "chunked": "Chunked prefill",
    "prefix": "Prefix cache",
    "lookup": "Prefix lookup",
    "bundled_pair": "Speculation, bundled pair",
    "truncated_pair": "Speculation, acceptance set to 0.8",
    "copying": "Speculation by n-grams",
    "switched_off": "Speculation at a full batch",
    "mix": "A mix of 256 requests beside other engines",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--layers", type=int, default=24, help="of the random-weights model; 24 are 0.39 B parameters")
    parser.add_argument("--mix-scale", type=float, default=0.125, help="of the mix's lengths")
    parser.add_argument("--vllm", type=Path, help="python of an environment that has vLLM")
    parser.add_argument("--model-dir", type=Path, default=Path(tempfile.gettempdir()) / "codesign-benchmarks")
    parser.add_argument("--out", type=Path, default=REPORTS / "serving.json")
    parser.add_argument("--append", action="store_true", help="keep the parts that --out holds and that are not run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = Setting(
        model_dir=write_model(args.model_dir, args.layers),
        vocab_size=32000,
        threads=args.threads,
        rounds=args.rounds,
        say=lambda text: print(f"{time.perf_counter() - started:7.1f} s  {text}", flush=True),
    )
    started = time.perf_counter()
    measured: dict[str, Callable[[], dict[str, Any]]] = {
        "batching": lambda: batching(setting),
        "chunked": lambda: chunked(setting),
        "prefix": lambda: prefix(setting),
        "lookup": lambda: lookup(setting),
        "bundled_pair": lambda: on_bundled_pair(setting),
        "truncated_pair": lambda: on_truncated_pair(setting),
        "copying": lambda: copying(setting),
        "switched_off": lambda: switched_off(setting),
        "mix": lambda: mix(setting, scale=args.mix_scale, vllm_python=args.vllm),
    }
    found: dict[str, Any] = json.loads(args.out.read_text())["parts"] if args.append and args.out.exists() else {}
    for name in args.parts:
        before = os.getloadavg()[0]
        part = measured[name]()
        part["provenance"] = {
            **provenance(model(setting.model_dir), "cpu"),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "command": command(args, name),
            "threads": args.threads,
            "load_average_before_after": [round(before, 2), round(os.getloadavg()[0], 2)],
        }
        found[name] = part
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"schema_version": 1, "parts": found}, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(report(found))
    print(report(found))
    return 0 if all(bar["met"] for name in args.parts for bar in found[name]["bars"]) else 1


def command(args: argparse.Namespace, part: str) -> str:
    vllm = " --vllm .oracles/vllm/bin/python" if args.vllm and part == "mix" else ""
    scale = f" --mix-scale {args.mix_scale:g}" if part == "mix" else ""
    return f"python tests/benchmarks/serving.py --parts {part} --rounds {args.rounds}{scale}{vllm}"


def report(parts: dict[str, Any]) -> str:
    lines = [
        "# Serving techniques on this CPU",
        "",
        "Random-weights Qwen2 of 0.39 B parameters or the bundled pair, bf16. Each figure is a ratio of wall times",
        "within a round, contenders taking turns: median [smallest, largest].",
        "",
        "| bar | wanted | found | rounds | met |",
        "|---|---|---|---|---|",
    ]
    ordered = [(name, parts[name]) for name in TITLES if name in parts]
    for _, part in ordered:
        for bar in part["bars"]:
            value = bar["found"]
            lines.append(
                f"| {bar['bar']} | {bar['wanted']} | {value['median']:.2f} [{value['min']:.2f}, {value['max']:.2f}] "
                f"| {value['rounds']} | {'yes' if bar['met'] else '**no**'} |"
            )
    for name, part in ordered:
        lines += ["", f"## {TITLES[name]}", "", part["what"] + ".", ""]
        lines += [f"- {key.replace('_', ' ')}: {shown(value)}" for key, value in part.items() if key not in _NOT_LISTED]
        made = part["provenance"]
        cpu = made["machine"]["cpu"]
        lines.append(
            f"- {made['date']}, {cpu}, {made['threads']} threads, torch {made['versions']['torch']}, commit "
            f"{made['code']['commit']}, load {made['load_average_before_after']}: `{made['command']}`"
        )
    return "\n".join(lines) + "\n"


_NOT_LISTED = ("what", "bars", "provenance")


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {shown(own)}" for key, own in value.items())
    if isinstance(value, list):
        return ", ".join(shown(own) for own in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())

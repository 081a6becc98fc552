"""How fast each weight format multiplies on this CPU, beside native bf16: one linear layer, M rows, cold weights.

    python tests/benchmarks/speed_weights.py [--rounds 7] [--shapes 9728x896 ...] [--rows 1 4 16 64 256 1024]

Formats take turns within a round, each over several copies of its weight, so that the last level cache holds none of
them; a ratio is native's time over the format's in the same round. Medians over rounds with their range. Writes
reports/benchmarks/speed_weights.json and .md; exits 1 when a bar (BARS) is missed at any shape.
"""

import argparse
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from codesign.engine.quantize.format import GridFormat, WeightFormat
from codesign.engine.quantize.linear import Linear, Workspace
from codesign.measure.provenance import code_state, machine
from codesign.registry import WEIGHT_FORMATS

REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"
FORMATS = ("native", "int8", "w8a8", "int4", "nf4", "int3", "int2")
# (format, M) -> how many times as fast as native bf16 it must be.
BARS = {
    ("int8", 1): 1.8,
    ("int4", 1): 2.3,
    ("int8", 1024): 0.77,
    ("int4", 1024): 0.77,
    ("w8a8", 16): 1.3,
    ("w8a8", 256): 1.3,
}
_COLD_BYTES = 64 * 2**20  # of each format's copies together; a last level cache is 32 MiB on the machines seen so far
_LEAST_S = 0.02


def linears(shape: tuple[int, int], workspace: Workspace) -> dict[str, list[Linear]]:
    """Name -> copies of one weight."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    found: dict[str, list[Linear]] = {}
    for name in FORMATS:
        member = WEIGHT_FORMATS.create(name)
        first = member.pack(weight, None, dtype=torch.bfloat16, workspace=workspace)
        count = -(-_COLD_BYTES // first.num_bytes)
        found[name] = [first] + [copied(first, member, weight, workspace) for _ in range(count - 1)]
    return found


def copied(linear: Linear, member: WeightFormat, weight: Tensor, workspace: Workspace) -> Linear:
    """The same weight in memory of its own."""
    if not isinstance(member, GridFormat):
        return member.pack(weight, None, dtype=torch.bfloat16, workspace=workspace)
    tensors = {name: tensor.clone() for name, tensor in linear.named_buffers()}
    return member.restore(tensors, dtype=torch.bfloat16, workspace=workspace)


def milliseconds(copies: list[Linear], x: Tensor) -> float:
    """Per product: whole passes over the copies, or as many of them as take a while."""
    used = copies if x.shape[0] <= 16 else copies[:2]
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < _LEAST_S:
        for linear in used:
            linear(x)
        count += len(used)
    return elapsed / count * 1e3


def measure(shape: tuple[int, int], rows: list[int], num_rounds: int) -> dict[str, Any]:
    formats = linears(shape, Workspace())
    times: dict[str, dict[int, list[float]]] = {name: {num_rows: [] for num_rows in rows} for name in formats}
    for num_rows in rows:
        x = torch.randn(num_rows, shape[1]).bfloat16()
        for round_number in range(-1, num_rounds):  # the first warms up
            for name, copies in formats.items():
                taken = milliseconds(copies, x)
                if round_number >= 0:
                    times[name][num_rows].append(taken)
        print(f"{shape} M={num_rows}: done", file=sys.stderr, flush=True)
    kernels = {name: copies[0].kernel for name, copies in formats.items()}
    bits = {name: copies[0].num_bytes * 8 / (shape[0] * shape[1]) for name, copies in formats.items()}
    return {"shape": list(shape), "times_ms": times, "kernels": kernels, "bits_per_weight": bits}


def ratios(result: dict[str, Any], name: str, num_rows: int) -> list[float]:
    """native's time over the format's, round by round."""
    times = result["times_ms"]
    return [base / own for base, own in zip(times["native"][num_rows], times[name][num_rows], strict=True)]


def verdicts(results: list[dict[str, Any]], rows: list[int]) -> list[dict[str, Any]]:
    return [
        {"format": name, "rows": num_rows, "shape": result["shape"], "wanted": wanted, "found": found, "met": met}
        for (name, num_rows), wanted in BARS.items()
        for result in results
        if num_rows in rows
        for found in [median(ratios(result, name, num_rows))]
        for met in [found >= wanted]
    ]


def table(document: dict[str, Any]) -> str:
    facts, results = document["facts"], document["results"]
    rows = facts["rows"]
    where = facts["machine"]
    lines = [
        "# Speed of weight formats on a CPU",
        "",
        f"`{facts['command']}`, {facts['date']}: {where['cpu']}, ATen {facts['capability']}, {facts['num_threads']} "
        f"threads, torch {facts['torch']}; {facts['num_rounds']} interleaved rounds.",
        "Milliseconds of one product of M rows in bf16 with a weight that no cache holds; in brackets how many times "
        "as fast as native bf16 in the same round, median [least, most].",
    ]
    for result in results:
        num_out, num_in = result["shape"]
        lines += ["", f"## {num_out} outputs, {num_in} inputs", ""]
        lines += [f"| weights | bits | {' | '.join(f'M = {num_rows}' for num_rows in rows)} |"]
        lines += ["|---" * (len(rows) + 2) + "|"]
        for name in result["times_ms"]:
            cells = []
            for num_rows in rows:
                taken, own = median(result["times_ms"][name][num_rows]), ratios(result, name, num_rows)
                versus = "" if name == "native" else f" ({median(own):.2f} [{min(own):.2f}, {max(own):.2f}])"
                cells.append(f"{taken:.2f}{versus}")
            lines.append(f"| {name} | {result['bits_per_weight'][name]:.2f} | {' | '.join(cells)} |")
        lines += ["", *(f"- {name}: {kernel}" for name, kernel in result["kernels"].items())]
    lines += ["", "## Bars", "", "| weights | M | shape | wanted | found | met |", "|---" * 6 + "|"]
    for bar in document["bars"]:
        lines.append(
            f"| {bar['format']} | {bar['rows']} | {bar['shape'][0]} x {bar['shape'][1]} | {bar['wanted']} "
            f"| {bar['found']:.2f} | {'yes' if bar['met'] else '**no**'} |"
        )
    return "\n".join(lines) + "\n"


def shape_of(text: str) -> tuple[int, int]:
    num_out, _, num_in = text.partition("x")
    return int(num_out), int(num_in)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=[(9728, 896), (896, 4864), (4096, 4096)])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=REPORTS / "speed_weights.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load_before = os.getloadavg()[0]
    results = [measure(shape, args.rows, args.rounds) for shape in args.shapes]
    facts = {
        "command": " ".join(["python tests/benchmarks/speed_weights.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "code": code_state(),
        "torch": torch.__version__,
        "machine": dict(machine()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": args.threads,
        "num_rounds": args.rounds,
        "rows": args.rows,
        "load_average_before_and_after": [round(load_before, 2), round(os.getloadavg()[0], 2)],
    }
    bars = verdicts(results, args.rows)
    document = {"facts": facts, "bars": bars, "results": results}
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(document))
    print(args.out.with_suffix(".md").read_text())
    return 0 if all(bar["met"] for bar in bars) else 1


if __name__ == "__main__":
    with torch.inference_mode():
        status = main()
    sys.exit(status)

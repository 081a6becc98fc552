"""Does 2:4 sparsity pay in speed? Dense products beside products with weights of which two of every four are zero.

    python tests/benchmarks/sparse_24.py                            # about a minute on a GPU, two on a CPU
    python tests/benchmarks/sparse_24.py --rows 1 64 --rounds 3     # a quick look

On CUDA the sparse contender is `torch.sparse.to_sparse_semi_structured`. A CPU has no kernel for it (what torch says
about that is kept), so there the zeros are multiplied like any other weight, as the engine does; one thread's own time
is taken, which other work on the machine disturbs least. The contenders take turns, several copies of each weight keep
caches from holding them, and ratios are taken within a round. A second dense contender beside the first shows how far
equal things come out apart.

Writes reports/benchmarks/sparse_24.json and .md; a new run replaces the earlier one on the same kind of device. It
stands behind the rule `unpaid` in codesign/spec/rules.py.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from codesign.engine.prune.pruners.magnitude import Magnitude
from codesign.engine.quantize.formats.native import Native
from codesign.engine.quantize.linear import Workspace
from codesign.measure.provenance import provenance
from codesign.spec.model import ModelSpec

REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"
SHAPES = {"cuda": [(4096, 4096), (28672, 4096), (4096, 14336)], "cpu": [(9728, 896), (896, 4864)]}
COPIES = 6
MIN_TURN_S = 0.01
Product = Callable[[torch.Tensor], torch.Tensor]
Maker = Callable[[torch.Tensor], Product]


def dense_product(weight: torch.Tensor) -> Product:
    """As the engine multiplies native weights."""
    return Native().pack(weight, None, dtype=torch.bfloat16, workspace=Workspace())


def sparse_product(weight: torch.Tensor) -> Product:
    """The fastest way there is here with a weight that is 2:4 sparse."""
    if not weight.is_cuda:
        return dense_product(weight)
    packed = torch.sparse.to_sparse_semi_structured(weight)
    return lambda x: F.linear(x, packed)


def kernel_refusal() -> str:
    """What torch answers to the wish for a semi-structured product on a CPU."""
    try:
        torch.sparse.to_sparse_semi_structured(Magnitude(pattern="two_of_four").prune(torch.randn(64, 64), None))
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return ""


def check(shape: tuple[int, int], device: str) -> None:
    """The fast product computes what the plain one does. Raises RuntimeError where it does not."""
    pruned = Magnitude(pattern="two_of_four").prune(torch.randn(shape, device=device) * 0.02, None).bfloat16()
    x = torch.randn(64, shape[1], device=device).bfloat16()
    wanted = x.float() @ pruned.float().t()
    error = float((sparse_product(pruned)(x).float() - wanted).norm() / wanted.norm())
    if error > 0.01:
        raise RuntimeError(f"{shape}: the sparse product is off by {error:.3g}")


def turn(products: list[Product], x: torch.Tensor, repetitions: int) -> float:
    """Seconds for one product, over `repetitions` of all copies."""
    now = time.thread_time
    if x.is_cuda:
        now = time.perf_counter
        torch.cuda.synchronize()
    started = now()
    for _ in range(repetitions):
        for product in products:
            product(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (now() - started) / repetitions / len(products)


def measure(shape: tuple[int, int], rows: list[int], rounds: int, device: str) -> list[dict[str, Any]]:
    makers: dict[str, Maker] = {
        "dense": dense_product,
        "dense_again": lambda weight: dense_product(weight.clone()),
        "two_of_four": lambda weight: sparse_product(Magnitude(pattern="two_of_four").prune(weight, None)),
    }
    contenders: dict[str, list[Product]] = {name: [] for name in makers}
    for number in range(COPIES):
        weight = torch.randn(shape, device=device).bfloat16() * 0.02
        for name in rotated(list(makers), number):  # where memory lies moves a CPU's products by some percent
            contenders[name].append(makers[name](weight))
    found = []
    for num_rows in rows:
        x = torch.randn(num_rows, shape[1], device=device).bfloat16()
        once = max(
            [turn(products, x, 1) for products in (*contenders.values(), *contenders.values())][len(contenders) :]
        )
        repetitions = max(1, round(MIN_TURN_S / once / COPIES))
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(rounds):
            for name in rotated(list(contenders), number):
                times[name].append(turn(contenders[name], x, repetitions))
        found.append(
            {
                "shape": list(shape),
                "rows": num_rows,
                "products_per_turn": repetitions * COPIES,
                "ms": {name: statistics.median(own) * 1e3 for name, own in times.items()},
                "speed_up": ratio(times["dense"], times["two_of_four"]),
                "dense_again": ratio(times["dense"], times["dense_again"]),
            }
        )
        print(f"{shape} M={num_rows}: 2:4 is {found[-1]['speed_up']['median']:.2f} times as fast", file=sys.stderr)
    return found


def rotated(names: list[str], number: int) -> list[str]:
    """Each name stands first, in the middle and last equally often over consecutive numbers."""
    shift = number % len(names)
    return names[shift:] + names[:shift]


def ratio(before: list[float], after: list[float]) -> dict[str, float]:
    """How many times as fast, round by round."""
    ratios = [b / a for b, a in zip(before, after, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def verdict(run: dict[str, Any]) -> str:
    """One sentence for people."""
    if run["device"] == "cpu":
        sparse, again = (
            statistics.geometric_mean(result[name]["median"] for result in run["results"])
            for name in ("speed_up", "dense_again")
        )
        return (
            f'On a CPU there is no semi-structured kernel (torch: "{run["kernel_refusal"]}"), so the zeros are '
            f"multiplied like any other weight: over all rows such products are {sparse:.2f} times as fast as dense "
            f"ones, and dense ones of the same values {again:.2f} times as fast as themselves."
        )
    sentences = []
    for shape in dict.fromkeys(tuple(result["shape"]) for result in run["results"]):
        own = [result for result in run["results"] if tuple(result["shape"]) == shape]
        slow = [result["rows"] for result in own if result["speed_up"]["min"] <= 1]
        first = next((r["rows"] for r in own if r["rows"] > max(slow, default=0)), None)
        when = "at no number of rows that was tried" if first is None else f"from {first} rows on"
        sentences.append(f"{list(shape)}: faster in every round {when}.")
    return " ".join(sentences)


def table(runs: list[dict[str, Any]]) -> str:
    lines = ["# 2:4 sparse products beside dense ones", ""]
    lines += ["bf16 weights [outputs, inputs], two of every four inputs zero by magnitude; contenders took turns.", ""]
    for run in runs:
        made = run["provenance"]
        gpus = ", ".join(gpu["name"] for gpu in made.get("gpus", ()))
        where = gpus or f"{made['machine']['cpu']}, one thread"
        code = f"commit {(made['code']['commit'] or 'unknown')[:12]}{', changed' if made['code'].get('dirty') else ''}"
        lines += [f"## {where}", "", verdict(run), ""]
        lines += [
            f"`{run['command']}`, {run['date']}, torch {made['versions']['torch']}, {code}; load average "
            f"{run['load_average_before']} before and {run['load_average_after']} after; {run['rounds']} rounds.",
            "",
            "Times as fast as dense: median of rounds [least, most].",
            "",
            "| weight | rows | dense ms | 2:4 ms | 2:4 | dense again |",
            "|---|---|---|---|---|---|",
        ]
        for result in run["results"]:
            shown = [
                f"{own['median']:.2f} [{own['min']:.2f}, {own['max']:.2f}]"
                for own in (result["speed_up"], result["dense_again"])
            ]
            lines.append(
                f"| {result['shape']} | {result['rows']} | {result['ms']['dense']:.3f} "
                f"| {result['ms']['two_of_four']:.3f} | {' | '.join(shown)} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SHAPES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=[2**power for power in range(11)])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=REPORTS / "sparse_24.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    made = provenance(ModelSpec(name="random weights", architecture={}), args.device)
    made["machine"] = {name: made["machine"][name] for name in ("cpu", "isa", "cores", "memory_bytes")}
    run: dict[str, Any] = {
        "device": args.device,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python tests/benchmarks/sparse_24.py", *sys.argv[1:]]),
        "provenance": made,
        "num_threads": 1,
        "rounds": args.rounds,
        "kernel_refusal": kernel_refusal(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "results": [],
    }
    with torch.inference_mode():
        for shape in SHAPES[args.device]:
            check(shape, args.device)
            run["results"] += measure(shape, args.rows, args.rounds, args.device)
    run["load_average_after"] = round(os.getloadavg()[0], 2)
    kept = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    runs = [*(other for other in kept if other["device"] != args.device), run]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"schema_version": 1, "runs": runs}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()

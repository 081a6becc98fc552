"""reports/benchmarks/gpu.md from what the parts of gpu_campaign.py left in reports/benchmarks/gpu.

    python tests/benchmarks/gpu_report.py [FOLDER]

Each part names the card, versions and commit that it ran with. A part that is not there is left out.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"
METRICS = ("throughput_tokens_per_s", "tpot_ms", "kv_bytes", "energy_per_token_j")

Result = dict[str, Any]


def report(folder: Path) -> str:
    lines = ["# On a GPU", "", "What each part measures, and how, its docstring says: tests/benchmarks/gpu_*.py.", ""]
    for name, show in PARTS.items():
        file = folder / f"{name}.json"
        if not file.exists():
            continue
        document = json.loads(file.read_text())
        lines += [f"## {name}", "", *origin(document), "", *show(document["result"]), ""]
    return "\n".join(lines)


def origin(document: dict[str, Any]) -> list[str]:
    where = document["provenance"]
    [gpu, *_] = where["gpus"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "triton"))
    commit = where["code"]["commit"] or "unknown"
    dirty = " with changes" if where["code"].get("dirty") else ""
    status = document["result"].get("exit_status", 0)
    return [
        f"`{where['command']}`, {document['date']}, commit {commit}{dirty}: {gpu['name']}, {versions}; "
        f"{document['seconds']:.0f} s, exit {status}."
    ]


def grid(rows: list[list[str]]) -> list[str]:
    """A table; the first row is its head."""
    head, *rest = ([*map(str, row)] for row in rows)
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rest)]


def tests(result: Result) -> list[str]:
    skipped = [line for line in result["rest"] if line.startswith(("SKIPPED", "FAILED", "ERROR"))]
    return [f"tests/engine/test_cuda.py: {' '.join(result['summary'])}.", *(f"- {line}" for line in skipped)]


def ceilings(result: Result) -> list[str]:
    peaks = ", ".join(f"{name} {value:.0f}" for name, value in result["peak_tflops"].items())
    return [f"Read bandwidth {result['read_gb_per_s']:.0f} GB/s; products in Tops/s: {peaks}."]


def attention(result: Result) -> list[str]:
    bar = result["bar"]
    reached = ", ".join(f"{way} {share:.0%}" for way, share in bar["share_of_copy"].items())
    return [
        f"Bar at {bar['rows']} rows of {bar['batch']} sequences: at least {bar['least_share_of_copy']:.0%} of a copy's "
        f"bandwidth. {reached}: {'passed' if bar['passed'] else 'missed'}.",
        "",
        *grid(
            [
                ["rows", "sequences", "way", "ms [p10, p90]", "GB/s", "of a copy"],
                *(
                    [row["rows"], row["batch"], row["way"], spread(row), f"{row['gb_per_s']:.0f}", share(row)]
                    if "median_ms" in row
                    else [row["rows"], row["batch"], row.get("way", ""), reason(row), "", ""]
                    for row in result["timed"]
                ),
            ]
        ),
        "",
        "Other blocks and splits at the bar's place, fastest first:",
        "",
        *(
            f"- {row['way']}: {row['config']}: {row['median_ms']:.4f} ms ({share(row)})"
            for row in sorted(result["tried"], key=lambda row: (row["way"], row.get("median_ms", 1e9)))
            if "median_ms" in row
        ),
    ]


def spread(row: Result) -> str:
    return f"{row['median_ms']:.4f} [{row['p10_ms']:.4f}, {row['p90_ms']:.4f}]"


def share(row: Result) -> str:
    return f"{row['share_of_copy']:.0%}"


def reason(row: Result) -> str:
    return next(str(row[name]) for name in ("absent", "wrong", "failed") if name in row)


def weights(result: Result) -> list[str]:
    """One table a shape: ways down, M across; in brackets how many times as fast as native at the same M."""
    lines: list[str] = ["Median ms of a product of M rows; in brackets how many times as fast as native bf16.", ""]
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in result["timed"]))
    for shape in shapes:
        own = [row for row in result["timed"] if tuple(row["shape"]) == shape]
        counts = sorted({row["rows"] for row in own})
        ways = list(dict.fromkeys(row["way"] for row in own))
        found = {(row["way"], row["rows"]): row for row in own}
        native = ways[0]

        def cell(way: str, count: int, found: Any = found, native: str = native) -> str:
            row, plain = found[way, count], found[native, count]
            if "median_ms" not in row:
                return reason(row)
            times = f" ({plain['median_ms'] / row['median_ms']:.2f})" if way != native and "median_ms" in plain else ""
            return f"{row['median_ms']:.4f}{times}"

        lines += [f"{shape[0]} outputs, {shape[1]} inputs:", ""]
        lines += grid(
            [["way", *(f"M = {count}" for count in counts)]]
            + [[way, *(cell(way, count) for count in counts)] for way in ways]
        )
        lines.append("")
    lines += [f"- {key}: {config}" for device in result["tuned"].values() for key, config in device.items()]
    return lines


def engine(result: Result) -> list[str]:
    """Ratios are of the peer's time over one's own."""
    decode, prefill = result["decode_beside_peer"], result["prefill_beside_peer"]
    rows = [
        ["contender", "batch", "decode ms", "p90", "x transformers", "weights GB/s", "prefill ms", "x transformers"]
    ]
    for row in result["rows"]:
        if "absent" in row:
            rows.append([row["contender"], row["absent"], *[""] * 6])
            continue
        name, batch = row["contender"], str(row["batch_size"])
        rows.append(
            [
                name,
                batch,
                f"{row['decode_ms']:.2f}",
                f"{row['decode_p90_ms']:.2f}",
                f"{decode[name][batch]:.2f}",
                f"{row['weight_gb_per_s']:.0f}",
                f"{row['prefill_ms']:.1f}",
                f"{prefill[name][batch]:.2f}",
            ]
        )
    tokens = f"{result['prompt_tokens']} prompt tokens, {result['output_tokens']} output tokens a sequence."
    return [tokens, "", *grid(rows)]


def kv(result: Result) -> list[str]:
    rows = [["context", "sequences", "case", "KV GiB", "x full", "attention ms", "x full", "time / bytes", "around ms"]]
    for row in result["rows"]:
        where = [row["context"], row["sequences"], row["case"]]
        if "absent" in row:
            rows.append([*where, row["absent"], *[""] * 5])
            continue
        shares = row["x_full"]
        rows.append(
            [
                *where,
                f"{row['kv_bytes'] / 2**30:.3f}",
                f"{shares['kv_bytes']:.3f}",
                f"{row['attention_ms']:.3f}",
                f"{shares['attention_ms']:.3f}",
                f"{row['time_over_bytes']:.2f}",
                f"{row['around_ms']:.1f}",
            ]
        )
    return grid(rows)


def search(result: Result) -> list[str]:
    rows = [["trial", "outcome", "batch", "policy", *METRICS]]
    for own in result["records"]:
        config, policy = own["config"], own["config"]["kv"]["policy"]
        budget = f" {policy['kv_budget']}" if "kv_budget" in policy else ""
        values = [own["metrics"].get(name) for name in METRICS]
        shown = [f"{value['value']:.4g} {value['unit']}" if value else "" for value in values]
        rows.append(
            [own["number"], own["outcome"]["kind"], config["max_batch_size"], f"{policy['name']}{budget}", *shown]
        )
    return grid(rows)


PARTS: dict[str, Callable[[Result], list[str]]] = {
    "tests": tests,
    "ceilings": ceilings,
    "weights": weights,
    "attention": attention,
    "engine": engine,
    "kv": kv,
    "search": search,
}


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else REPORTS / "gpu"
    folder.with_suffix(".md").write_text(report(folder) + "\n")

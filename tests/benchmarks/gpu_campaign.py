"""The one script for a machine with a GPU: everything that only such a machine can show, in under ten minutes.

    python tests/benchmarks/gpu_campaign.py [--parts tests attention ...] [--out reports/benchmarks/gpu] [--minutes 9]

Parts, in order, correctness before speed. Each writes its JSON with provenance as soon as it is done, so that a cut
loses one part at most; at the end they become OUT.md (gpu_report.py).

    tests      tests/engine/test_cuda.py, in twelve processes where pytest-xdist is there
    ceilings   read bandwidth and matrix products, as `codesign probe` measures them
    weights    every way to multiply with packed weights (gpu_weights.py), and the fastest configs of the Triton kernels
    attention  decode attention over native rows and codes, paged as well, beside SDPA and a device copy
               (gpu_attention.py)
    engine     decode and prefill of whole engines of the shape of Llama-3.1-8B, beside transformers (gpu_engine.py)
    kv         attention of decode steps under each KV policy and codec beside the full cache (gpu_kv.py)
    search     `codesign search` on a random-weights model of the shape of Llama-3.2-1B

A new part is a function and a row of PARTS.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_attention import attention  # beside this script, as are the next
from gpu_engine import engine
from gpu_kv import kv
from gpu_report import report
from gpu_weights import weights

from codesign.measure.monitor import gpus
from codesign.measure.probe import probe
from codesign.measure.provenance import provenance
from codesign.results.ledger import read_records
from codesign.spec.model import ModelSpec
from codesign.spec.yaml import dump_yaml

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
LLAMA_1B = {
    **LLAMA_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
SPACE = {
    "max_batch_size": [8, 32],
    "attention": {"triton": {}},
    "kernels": {"fused": [True], "graphs": [False, True]},
    "kv": {
        "policy": {
            "full": {},
            "h2o": {"kv_budget": [0.1, 0.25]},
            "pyramidkv": {"kv_budget": [0.1, 0.25]},
        }
    },
}


def tests(seconds: float) -> dict[str, Any]:
    """Other plugins of pytest that the environment may have stay out."""
    side_by_side = ["-p", "xdist.plugin", "-n", "12"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-p", "pytest_timeout", *side_by_side, "-q", "-rA"]
    done = subprocess.run(
        [*command, "tests/engine/test_cuda.py"],
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    lines = done.stdout.splitlines()
    passed = [line for line in lines if line.startswith("PASSED ")]
    return {
        "exit_status": done.returncode,
        "summary": lines[-1:],
        "passed": sorted(passed),
        "rest": [line for line in lines if line not in passed][-200:],
    }


def engines(seconds: float) -> dict[str, Any]:
    return engine(seconds, architecture=LLAMA_8B)


def policies(seconds: float) -> dict[str, Any]:
    return kv(seconds, architecture=LLAMA_8B)


def ceilings(seconds: float) -> dict[str, Any]:
    return probe(say)


def search(seconds: float) -> dict[str, Any]:
    """A study of real trials within the time left, and the records it left behind without the raw samples."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        profile = {
            "hardware": probe(say),
            "model": {**LLAMA_1B, "weights": "random"},
            "workload": {"scenario": "offline", "prompt_tokens": 512, "output_tokens": 64, "num_requests": 32},
            "objectives": ["throughput_tokens_per_s", "tpot_ms", "kv_bytes", "energy_per_token_j"],
            "search_space": "space.yaml",
        }
        (folder / "space.yaml").write_text(dump_yaml(SPACE))
        (folder / "llama_1b.yaml").write_text(dump_yaml(profile))
        command = ["search", str(folder / "llama_1b.yaml"), "--name", "gpu", "--out", str(folder), "--trials", "12"]
        done = subprocess.run(
            [sys.executable, "-m", "codesign", *command, "--budget", f"{seconds * 0.9:.0f}s"],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        records, damaged = read_records(folder / "gpu" / "trials")
        return {
            "exit_status": done.returncode,
            "stderr": done.stderr.splitlines()[-20:],
            "damaged": len(damaged),
            "records": [{**json.loads(record.to_json()), "requests": len(record.requests)} for record in records],
        }


PARTS: dict[str, tuple[Callable[[float], dict[str, Any]], float]] = {
    "tests": (tests, 180.0),
    "ceilings": (ceilings, 60.0),
    "weights": (weights, 150.0),
    "attention": (attention, 90.0),
    "engine": (engines, 90.0),
    "kv": (policies, 90.0),
    "search": (search, 270.0),
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks/gpu"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--commit", help="of this code, where it is a copy without its history")
    parser.add_argument("--minutes", type=float, default=9.0, help="of wall time for all parts")
    arguments = parser.parse_args()
    if not gpus():
        say("no NVIDIA GPU answers here; this script measures nothing without one")
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    deadline_s = time.monotonic() + arguments.minutes * 60
    where = provenance(ModelSpec(name="llama-3.1-8b shape", architecture=LLAMA_8B), "cuda")
    if arguments.commit is not None:
        where["code"] = {"commit": arguments.commit, "dirty": False}
    where["command"] = " ".join(["python tests/benchmarks/gpu_campaign.py", *sys.argv[1:]])
    failed = False
    for name, (part, longest_s) in PARTS.items():
        if name not in arguments.parts:
            continue
        seconds = min(longest_s, deadline_s - time.monotonic())
        if seconds < 20:
            say(f"{name}: no time left")
            continue
        say(f"{name}: at most {seconds:.0f} s")
        start_s = time.monotonic()
        try:
            result: dict[str, Any] = part(seconds)
        except subprocess.TimeoutExpired as error:
            result = {"exit_status": None, "error": str(error)}
        document = {
            "part": name,
            "date": datetime.now(UTC).date().isoformat(),
            "seconds": time.monotonic() - start_s,
            "provenance": where,
            "result": result,
        }
        (arguments.out / f"{name}.json").write_text(json.dumps(document, indent=1, default=str) + "\n")
        failed = failed or result.get("exit_status", 0) not in (0, 5)
        say(f"{name}: {document['seconds']:.0f} s, exit {result.get('exit_status', 0)}")
    arguments.out.with_suffix(".md").write_text(report(arguments.out) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

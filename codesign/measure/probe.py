"""Probe: measure this machine and write the `hardware:` section of a profile.

Each figure is measured in a fresh process for a second or two: read bandwidth over buffers far larger than the last
cache, and matrix products per number format. What cannot be read (idle power, price) is left out.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from codesign.errors import WorkError
from codesign.measure.monitor import gpus
from codesign.measure.provenance import machine

_TIMEOUT_S = 120

# Runs in a process of its own, because torch must stay out of the process that starts trials.
_CEILINGS = """
import json, sys, time
import torch

device = sys.argv[1]
torch.manual_seed(0)

def wait():
    if device == "cuda":
        torch.cuda.synchronize()

def best_rate(work, amount, budget_s):
    "Amount of work per second of the fastest repetition: as many as the budget allows, at least three."
    work(); wait()
    best, count, start = float("inf"), 0, time.perf_counter()
    while count < 3 or time.perf_counter() - start < budget_s:
        begin = time.perf_counter()
        work(); wait()
        best = min(best, time.perf_counter() - begin)
        count += 1
    return amount / best, count

out = {"torch": torch.__version__, "threads": torch.get_num_threads()}
size = 2**28 if device == "cpu" else 2**31
buffer = torch.ones(size // 4, device=device)
rate, count = best_rate(lambda: buffer.sum(), size, 1.0)
out["read_gb_per_s"], out["read_samples"] = rate / 1e9, count
del buffer
n = 512 if device == "cpu" else 8192
out["peak_tflops"] = {}
for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
    a = torch.randn(n, n, device=device).to(dtype)
    rate, count = best_rate(lambda: a @ a, 2 * n**3, 0.7)
    out["peak_tflops"][name] = rate / 1e12
a = torch.randint(-8, 8, (n, n), device=device, dtype=torch.int8)
try:
    rate, count = best_rate(lambda: torch._int_mm(a, a), 2 * n**3, 0.7)
    out["peak_tflops"]["int8"] = rate / 1e12
except RuntimeError as error:
    out["int8_reason"] = str(error).splitlines()[0]
print(json.dumps(out))
"""


def probe(say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """The hardware section for this machine (a CUDA device when there is one, else the CPU), as plain data.

    Args:
        say: told what is being measured.

    Raises:
        WorkError: the measuring process failed; the text holds its last line.
    """
    found = gpus()
    device = "cuda" if found else "cpu"
    say(f"measuring read bandwidth and matrix products on {device} (about 5 s)")
    ceilings = _ceilings(device)
    peak = {name: _figure(value) for name, value in ceilings["peak_tflops"].items()}
    host = {"name": "host", "gib": _figure(machine()["memory_bytes"] / 2**30)}
    if found:
        gpu = found[0]
        return {
            "name": gpu["name"],
            "device": "cuda",
            "count": len(found),
            "compute_capability": gpu["compute_capability"],
            "memory": [
                {
                    "name": "hbm",
                    "gib": _figure(gpu["memory_bytes"] / 2**30),
                    "gb_per_s": _figure(ceilings["read_gb_per_s"]),
                },
                host,
            ],
            "peak_tflops": peak,
            "max_power_w": _figure(gpu["max_power_w"]),
        }
    return {
        "name": machine()["cpu"],
        "device": "cpu",
        "isa": list(machine()["isa"]),
        "cores": machine()["cores"],
        "memory": [{**host, "gb_per_s": _figure(ceilings["read_gb_per_s"])}],
        "peak_tflops": peak,
    }


def _ceilings(device: str) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CEILINGS, device], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        raise WorkError(f"measuring this machine failed: {lines[-1]}") from error
    except subprocess.TimeoutExpired as error:
        raise WorkError(f"measuring this machine took longer than {_TIMEOUT_S} s; is it busy?") from error
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _figure(value: float) -> float:
    """Three significant figures: more would claim what one short measurement cannot."""
    return float(f"{value:.3g}")

"""Where each way of multiplying packed weights stops paying: the figures behind engine/quantize/few_rows.py.

    python tests/benchmarks/weight_kernels.py [--rows 1 8 32 64 128]

Milliseconds of one core's own time (so that other work on the machine disturbs little), best of a few interleaved
repetitions, over several copies of each weight so that the cache does not hold them.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from codesign.engine.kernels import packed_matmul
from codesign.engine.kernels.compiled import Missing
from codesign.engine.quantize.formats.int4 import Int4
from codesign.engine.quantize.formats.int8 import Int8
from codesign.engine.quantize.formats.native import Native
from codesign.engine.quantize.linear import Linear, Workspace

SHAPES = [(9728, 896), (896, 4864)]
COPIES = 3


def ways(weight: torch.Tensor, workspace: Workspace) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Name -> product with bf16 activations."""
    dense = weight.bfloat16()
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"aten bf16": lambda x: F.linear(x, dense)}
    found["native"] = Native().pack(weight, None, dtype=torch.bfloat16, workspace=workspace)
    found["native wrapped"] = Native().wrap(dense, None, workspace=workspace)
    has_compiled = not isinstance(packed_matmul.load(), Missing)
    for name, member in (("int8", Int8()), ("int4", Int4())):
        for way in ("compiled", "aten", "unpacked"):
            if way == "compiled" and not has_compiled:
                continue
            linear: Linear = member.pack(weight, None, dtype=torch.bfloat16, workspace=workspace)
            linear.kernel_max_rows = 0 if way == "unpacked" else 2**20
            if way == "aten":
                linear.few_rows = dataclasses.replace(linear.few_rows, compiled=None)
            found[f"{name} {way}"] = linear
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128])
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, ATen {torch.backends.cpu.get_cpu_capability()}, compiled: {packed_matmul.load()}"
    )
    for num_out, num_in in SHAPES:
        workspace = Workspace()
        copies = [ways(torch.randn(num_out, num_in) * 0.02, workspace) for _ in range(COPIES)]
        for num_rows in args.rows:
            x = torch.randn(num_rows, num_in).bfloat16()
            best = {name: float("inf") for name in copies[0]}
            for _ in range(args.repetitions):
                for name in best:
                    if name == "aten bf16" and num_rows > 32:
                        continue
                    started = time.thread_time()
                    for copy in copies:
                        copy[name](x)
                    best[name] = min(best[name], (time.thread_time() - started) / COPIES * 1e3)
            figures = "  ".join(f"{name} {ms:.2f}" for name, ms in best.items() if ms < float("inf"))
            print(f"[{num_out}, {num_in}] M={num_rows}: {figures}", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()

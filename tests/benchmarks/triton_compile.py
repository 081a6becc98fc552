"""Compiles every Triton kernel at every config that may run, for sm_80 and sm_90, without a GPU.

    python tests/benchmarks/triton_compile.py [--only layers|attention] [--quick] [--out reports/benchmarks]

Writes triton_kernels.json and .md (layers: products and what lies between them) and triton_attention.json and .md:
registers a thread, bytes spilled, shared memory a block, and which instructions multiply. Registers and spills are what
ptxas says (`-v`) of the PTX that Triton makes, with Triton's own flags; nothing is run. `--quick` takes one config a
kernel, which is what the tests do.
"""

import argparse
import dataclasses
import datetime
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_attention_cases import attention_cases  # beside this script
from triton_case import Case

from codesign.engine.kernels.triton.affine import affine_kernel
from codesign.engine.kernels.triton.configs import ROW_BUCKETS, Config, Problem, candidates, default
from codesign.engine.kernels.triton.fused import (
    MAX_GATES,
    norm_heads_kernel,
    norm_kernel,
    norm_options,
    rotate_into_kernel,
    rotate_kernel,
    silu_mul_kernel,
)
from codesign.engine.kernels.triton.launch import ADDED_OUTPUTS
from codesign.engine.kernels.triton.nf4 import GROUP, SCALES_PER_STEP, nf4_kernel
from codesign.engine.kernels.triton.tile import add_splits
from codesign.engine.kernels.triton.w8a16 import w8a16_kernel

CAPABILITIES = (80, 90)
DTYPES = ("bf16", "fp16", "fp32")
SIZE = (4096, 4096)
HIDDEN_SIZES = (896, 4096, 16384)
HEAD_SIZES = (64, 128)
MULTIPLIES = {"wgmma": "wgmma", "mma.sync": "mma.sync", "fma.rn.f32": "fma"}  # in the PTX, the first that is there


def problems() -> list[Problem]:
    found = []
    for dtype in DTYPES:
        found.append(Problem("w8a16", dtype, *SIZE))
        found += [Problem(f"w{bits}a16", dtype, *SIZE, group) for bits, group in ((4, 128), (3, 64), (2, 32))]
        found.append(Problem("nf4", dtype, *SIZE, GROUP))
    return found + [Problem("w4a16", "bf16", *SIZE, group) for group in (16, 32, 64, 256)]


def work(*, is_quick: bool) -> list[tuple[Problem, Config]]:
    """What to compile.

    fp16 compiles to what bf16 does but for the type, so that it is there at the rule's configs only; so are the groups
    beside 128. Quick is one config a kernel in bf16, and one kernel in fp32.
    """
    if is_quick:
        chosen = [*problems()[:5], Problem("w8a16", "fp32", *SIZE)]
        return [(problem, default(problem, ROW_BUCKETS[0])) for problem in chosen]
    found: dict[tuple[Problem, int, Config], Config] = {}
    for problem in problems():
        is_first_choice = problem.dtype == "fp16" or (problem.kernel == "w4a16" and problem.group_size != 128)
        for bucket in ROW_BUCKETS[:1] if problem.dtype == "fp32" else ROW_BUCKETS:
            for config in [default(problem, bucket)] if is_first_choice else candidates(problem, bucket):
                # Of the splits only whether there are any matters to the code.
                found.setdefault((problem, min(config.split_k, 2), dataclasses.replace(config, split_k=1)), config)
    return [(problem, config) for (problem, _, _), config in found.items()]


def layer_cases(*, is_quick: bool) -> Iterator[Case]:
    for problem, config in work(is_quick=is_quick):
        yield weight_case(problem, config)
    for dtype in DTYPES[:1] if is_quick else DTYPES:
        pointers = {"sums_ptr": "*fp32", "y_ptr": f"*{dtype}"}
        constants = {"SPLIT_K": 4, "BLOCK": ADDED_OUTPUTS}
        yield Case(f"add_splits {dtype}: 4 splits", add_splits, pointers, constants, {"num_warps": 4, "num_stages": 3})
        yield from fused_cases(dtype, HIDDEN_SIZES[1:2] if is_quick else HIDDEN_SIZES)


def fused_cases(dtype: str, hidden_sizes: tuple[int, ...]) -> Iterator[Case]:
    """The small operations between products."""
    names = ("x", "change", "weight", "sum", "y", "q", "k", "v", "key", "value", "q_weight", "k_weight", "gate_up")
    pointers = {**{f"{name}_ptr": f"*{dtype}" for name in names}, "cos_ptr": "*fp32", "sin_ptr": "*fp32", "eps": "fp32"}
    pointers["rows_ptr"] = "*i64"
    for size in hidden_sizes:
        options = norm_options(size)
        constants = {"HAS_CHANGE": True, "BLOCK": options.pop("BLOCK")}
        yield Case(f"norm {dtype}: {size}", norm_kernel, pointers, constants, options)
    yield Case(f"silu_mul {dtype}: {MAX_GATES}", silu_mul_kernel, pointers, {"BLOCK": MAX_GATES}, {"num_warps": 4})
    for size in HEAD_SIZES:
        yield Case(f"norm_heads {dtype}: {size}", norm_heads_kernel, pointers, {"BLOCK": size}, {"num_warps": 1})
        for name, kernel in (("rotate", rotate_kernel), ("rotate_into", rotate_into_kernel)):
            yield Case(f"{name} {dtype}: {size}", kernel, pointers, {"BLOCK": size // 2}, {"num_warps": 1})


def weight_case(problem: Problem, config: Config) -> Case:
    x, stored = f"*{problem.dtype}", "*fp16" if problem.dtype == "fp16" else "*bf16"
    pointers = {"x_ptr": x, "y_ptr": "*fp32" if config.split_k > 1 else x, "packed_ptr": "*u8"}
    constants: dict[str, Any] = dict(config.constants())
    if problem.kernel == "w8a16":
        kernel = w8a16_kernel
        pointers |= {"codes_ptr": "*i8", "scale_ptr": x}
        constants |= {"IS_RAGGED": False}
    elif problem.kernel == "nf4":
        kernel = nf4_kernel
        pointers |= {"levels_ptr": x, "scale_codes_ptr": "*i8", "step_ptr": "*fp32", "mean_ptr": "*fp32"}
        constants |= {"GROUP": GROUP, "SCALES_PER_STEP": SCALES_PER_STEP}
    else:
        kernel = affine_kernel
        pointers |= {"scale_ptr": stored, "offset_ptr": stored}
        constants |= {"BITS": int(problem.kernel[1]), "GROUP": problem.group_size, "HAS_OFFSET": True}
    group = "" if problem.group_size is None else f" g{problem.group_size}"
    return Case(f"{problem.kernel} {problem.dtype}{group}: {config}", kernel, pointers, constants, config.options())


def compile_for(case: Case, capability: int) -> dict[str, Any]:
    """What one case needs on one target. Raises what Triton raises."""
    signature, constants, hints = {}, {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name], constants[(index,)] = "constexpr", case.constants[name]
            continue
        signature[name] = case.pointers.get(name, "i32")
        # Sizes and addresses of real layers are multiples of 16.
        if signature[name] != "fp32" and name not in (*case.kernel.do_not_specialize, "num_q"):
            hints[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(case.kernel, signature, constants, hints),
        target=GPUTarget("cuda", capability, 32),
        options=case.options,
    )
    ptx = compiled.asm["ptx"]
    return {
        **ptxas_figures(ptx, capability),
        "shared_bytes": compiled.metadata.shared,
        "multiplies": next((name for text, name in MULTIPLIES.items() if text in ptx), "add"),
        "copies_async": "cp.async" in ptx,
    }


def ptxas_figures(ptx: str, capability: int) -> dict[str, int]:
    """Registers and spills from ptxas, run with the flags that Triton runs it with."""
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--regAllocOptLevel=2", f"--gpu-name={arch}", str(source)]
        said = subprocess.run(
            [*command, "-o", str(Path(folder) / "kernel.cubin")], capture_output=True, text=True, check=True
        ).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert registers is not None and spills is not None, said
    return {
        "registers": int(registers[1]),
        "spill_store_bytes": int(spills[1]),
        "spill_load_bytes": int(spills[2]),
    }


WHAT = {
    "layers": (
        "triton_kernels",
        layer_cases,
        "# Triton kernels as compiled",
        "The first config of a kernel for each rows of a tile is the rule's, the others are tried on a device;\n"
        "every number of splits above 1 gives the same code.",
    ),
    "attention": (
        "triton_attention",
        attention_cases,
        "# Triton attention kernels as compiled",
        "Blocks of the rule: queries x rows. How many splits there are changes nothing in the code.",
    ),
}


def table(document: dict[str, Any], title: str, remark: str) -> str:
    lines = [
        title,
        "",
        f"`{document['command']}`, {document['date']}, triton {document['triton']}, {document['ptxas']}.",
        "Compiled for a device that was not there: these are registers and bytes, no speeds.",
        f"{len(document['kernels'])} compilations, {document['num_spilling']} of them spill registers.",
        remark,
        "",
        "| kernel, config | target | registers | bytes spilled (stores / loads) | shared | products | async copies |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["kernels"]:
        spilled = f"{row['spill_store_bytes']} / {row['spill_load_bytes']}"
        lines.append(
            f"| {row['name']} | {row['target']} | {row['registers']} | {spilled} | {row['shared_bytes']} "
            f"| {row['multiplies']} | {'yes' if row['copies_async'] else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def compile_all(name: str, *, is_quick: bool, out: Path) -> None:
    """Both files of one family of kernels."""
    stem, cases, title, remark = WHAT[name]
    rows = []
    for case in cases(is_quick=is_quick):
        for capability in CAPABILITIES:
            rows.append({"name": case.name, "target": f"sm_{capability}", **compile_for(case, capability)})
            print(rows[-1], file=sys.stderr, flush=True)
    version = subprocess.run([triton.knobs.nvidia.ptxas.path, "--version"], capture_output=True, text=True, check=True)
    document = {
        "command": f"python tests/benchmarks/triton_compile.py --only {name}{' --quick' if is_quick else ''}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "ptxas": "ptxas " + version.stdout.splitlines()[-1].removeprefix("Build "),
        "num_spilling": sum(row["spill_store_bytes"] + row["spill_load_bytes"] > 0 for row in rows),
        "kernels": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / f"{stem}.md").write_text(table(document, title, remark))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=WHAT, help="one family of kernels")
    parser.add_argument("--quick", action="store_true", help="one config a kernel")
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks"))
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: nothing would be compiled", file=sys.stderr)
        return 2
    for name in WHAT if arguments.only is None else (arguments.only,):
        compile_all(name, is_quick=arguments.quick, out=arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

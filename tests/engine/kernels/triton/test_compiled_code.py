"""The kernels compile for real targets, by Triton and ptxas, which need no GPU; in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "triton_compile.py"
MOST_SHARED_BYTES = 99 * 1024  # a block's on sm_86 and sm_89; sm_80 and sm_90 have more
ATTENTION = ("decode_native", "decode_int8", "decode_fp8", "decode_int4", "prompt_lse", "prompt_sums")
PRODUCTS = ("w8a16", "w4a16", "w3a16", "w2a16", "nf4", *ATTENTION)
OTHERS = ("add_splits", "norm", "norm_heads", "silu_mul", "rotate", "rotate_into", "combine", "columns")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    triton = pytest.importorskip("triton", reason="the package triton is not installed")
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if not ptxas.exists():
        pytest.skip("this triton brings no ptxas")
    folder = tmp_path_factory.mktemp("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [
        kernel
        for stem in ("triton_kernels", "triton_attention")
        for kernel in json.loads((folder / f"{stem}.json").read_text())["kernels"]
    ]


def test_every_kernel_compiles_for_both_targets(kernels: list[dict[str, Any]]) -> None:
    names = {(kernel["name"].split()[0], kernel["target"]) for kernel in kernels}

    assert names == {(name, target) for name in (*PRODUCTS, *OTHERS) for target in ("sm_80", "sm_90")}


def test_the_rules_configs_spill_no_registers(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        assert kernel["spill_store_bytes"] == kernel["spill_load_bytes"] == 0, kernel
        assert kernel["registers"] < 255, kernel
        assert kernel["shared_bytes"] <= MOST_SHARED_BYTES, kernel


def test_16_bit_products_run_on_tensor_cores_and_fp32_is_exact(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        if kernel["name"].split()[0] in PRODUCTS:
            expected = {"fma"} if " fp32" in kernel["name"] else {"mma.sync", "wgmma"}
            assert kernel["multiplies"] in expected, kernel
            assert kernel["copies_async"], kernel

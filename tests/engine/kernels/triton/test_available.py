import subprocess
import sys

import pytest
import torch

from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.triton import available
from codesign.engine.quantize import few_rows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_the_cpu_has_no_triton_kernels_unless_they_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available.missing(CPU) == Missing("no kernels for cpu")
    assert not available.is_target(CPU)

    monkeypatch.setenv("TRITON_INTERPRET", "1")

    assert available.is_target(CPU)


def test_without_the_package_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)

    assert available._missing.__wrapped__(CPU) == Missing("the package triton is not installed")


def test_an_old_device_is_left_to_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))

    assert available._missing.__wrapped__(torch.device("cuda", 0)) == Missing("needs compute capability 8.0")


def test_choosing_on_the_cpu_never_imports_triton() -> None:
    script = """
import sys, torch
from codesign.engine.quantize.few_rows import choose_cpu, choose_triton
choose_cpu("int4", dtype=torch.bfloat16, out_features=64)
choose_triton("int8", dtype=torch.bfloat16, device=torch.device("cpu"), out_features=64, in_features=64)
print("triton" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["int4", "int3", "int2", "nf4"])
def test_codes_without_gaps_have_no_kernel_on_the_cpu(name: str) -> None:
    """Of int4 there is one there, but it reads another order."""
    found = few_rows.choose_triton(
        name, dtype=torch.bfloat16, device=CPU, out_features=64, in_features=64, group_size=32
    )

    assert found is few_rows.NO_KERNEL

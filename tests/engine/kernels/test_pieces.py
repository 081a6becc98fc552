import subprocess
import sys

import pytest
import torch

from codesign.engine.kernels import fused
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.pieces import choose, describe
from codesign.engine.kernels.plain import PLAIN, Plain
from codesign.engine.kernels.triton import available

CPU = torch.device("cpu")


def test_unless_asked_for_nothing_is_fused() -> None:
    assert choose(False, dtype=torch.bfloat16, device=CPU) is PLAIN
    assert describe(PLAIN, has_qk_norm=True) == "none"


def test_the_cpu_runs_compiled_pieces_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "load", lambda dtype: Missing("no C compiler"))

    found = choose(True, dtype=torch.bfloat16, device=CPU)

    assert found == Plain("no C compiler")
    assert describe(found, has_qk_norm=False) == "none: no C compiler"


def test_a_gpu_without_triton_runs_plain_pieces_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "missing", lambda device: Missing("the package triton is not installed"))

    found = choose(True, dtype=torch.bfloat16, device=torch.device("cuda", 0))

    assert describe(found, has_qk_norm=False) == "none: the package triton is not installed"


@pytest.mark.skipif(isinstance(fused.load(torch.float32), Missing), reason=str(fused.load(torch.float32)))
@pytest.mark.parametrize("has_qk_norm", [False, True])
def test_a_record_names_the_pieces_that_the_model_has(has_qk_norm: bool) -> None:
    words = describe(choose(True, dtype=torch.float32, device=CPU), has_qk_norm=has_qk_norm)

    between = "q/k-norm, " if has_qk_norm else ""
    assert words == f"codesign::fused (residual + RMSNorm, {between}SiLU * up, RoPE + cache write)"


def test_choosing_on_the_cpu_never_imports_triton() -> None:
    script = """
import sys, torch
from codesign.engine.kernels.pieces import choose
choose(True, dtype=torch.bfloat16, device=torch.device("cpu"))
print("triton" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"

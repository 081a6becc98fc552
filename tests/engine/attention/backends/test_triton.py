"""The triton backend: where it runs, what it is called, and the contract of all backends in Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codesign.engine.attention.backends.triton import Triton
from codesign.engine.build import build_engine
from codesign.engine.models.tiny import tiny_spec
from codesign.errors import Unsupported
from codesign.spec.engine_config import EngineConfig

ROOT = Path(__file__).parents[4]
INTERPRETED = "tests.engine.kernels.triton.interpreted.conftest"


def test_a_cpu_refuses_it_by_name_and_names_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = EngineConfig.from_dict({"dtype": "fp32", "attention": "triton", "max_model_len": 64})

    with pytest.raises(
        Unsupported, match=r"attention 'triton' on cpu: its kernels are for CUDA.*; use attention 'sdpa'"
    ):
        build_engine(tiny_spec(), config)


def test_its_name_says_that_prompts_run_elsewhere() -> None:
    assert Triton().kernel == "triton::attend, prompts aten::scaled_dot_product_attention"


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_prompt_never_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch, is_causal: bool) -> None:
    monkeypatch.setitem(sys.modules, "codesign.engine.kernels.triton.attend", None)
    query, key = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)

    assert Triton().attend(query, key, key, mask=None, is_causal=is_causal, scale=1.0).shape == query.shape
    with pytest.raises(ImportError):
        Triton().attend(query, key.repeat(1, 2, 1, 1), key, mask=None, is_causal=False, scale=1.0)


def test_it_keeps_the_contract_in_the_interpreter() -> None:
    """In fp32 and bf16; the kernels' own tests take fp16 too."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    contract = Path(__file__).with_name("test_attention_backends.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", INTERPRETED]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

    done = subprocess.run(
        [*command, "-k", "triton and not torch.float16", str(contract)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout, done.stdout

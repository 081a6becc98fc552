"""H2O scores a prompt of 16k tokens without an n x n matrix: resident memory, measured in a process of its own."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def peaks() -> dict[str, list[int]]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc/self/clear_refs to measure peaks of resident memory")
    script = Path(__file__).with_name("prefill_peaks.py")
    # Freed blocks go back to the system at once, so that the peak of one length is not the floor of the next.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    env["PYTHONPATH"] = str(script.parents[3])
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[int]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", ["whole", "chunked"])
def test_peak_of_prompts_of_2k_to_16k_tokens_grows_linearly(peaks: dict[str, list[int]], case: str) -> None:
    """Twice the tokens, at most about twice the bytes; at 16k far below one head's 16k x 16k fp32 weights."""
    grown = peaks[case]

    assert len(grown) == 4
    assert all(twice < 2.3 * once for once, twice in itertools.pairwise(grown)), grown
    assert grown[-1] < 0.1 * 4 * 16384**2


def test_a_matrix_of_all_weights_would_be_noticed(peaks: dict[str, list[int]]) -> None:
    """The same pass in one tile: four times the bytes for twice the tokens."""
    assert all(twice > 3 * once for once, twice in itertools.pairwise(peaks["untiled"])), peaks["untiled"]

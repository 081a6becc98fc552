"""Building goes layer by layer: never much more in memory than the model that comes out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("peak_script.py")


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")
def test_a_build_peaks_at_the_built_weights_and_two_layers_at_most(tmp_path: Path) -> None:
    """Of twelve layers, for every format; layers that the cache maps count as held, whether touched or not."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for name, (peak, held, layer) in json.loads(done.stdout).items():
        assert peak <= held + 2 * layer, name
        assert peak >= layer / 2, name  # else nothing was measured

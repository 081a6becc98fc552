"""What passes between our environment and an oracle's, one safetensors file each way; and what is kept of it.

An oracle's side is a module `tests.oracles.NAME` that runs in the oracle's environment, where torch and safetensors are
all that it can count on: `python -m tests.oracles.NAME ASKED ANSWERED`. A golden is kept under `tests/golden/` with its
provenance inside, and stays as it is where nothing but the date would change.
"""

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"

Tensors = dict[str, Tensor]
Note = dict[str, Any]


def write(path: Path, tensors: Tensors, note: Note) -> None:
    """`note`: what JSON can say; it travels in the file's metadata."""
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in sorted(tensors.items())}
    save_file(own, path, metadata={"note": json.dumps(note)})


def read(path: Path) -> tuple[Tensors, Note]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["note"])  # noqa: SIM118


def ask(python: Path, oracle: str, tensors: Tensors, note: Note) -> tuple[Tensors, Note]:
    """Runs module `tests.oracles.{oracle}` in another environment and returns its answer.

    Raises:
        SystemExit: it failed; its output has been shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "asked", Path(folder) / "answered"
        write(asked, tensors, note)
        command = [python.absolute(), "-m", f"tests.oracles.{oracle}", asked, answered]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
            raise SystemExit(1)
        return read(answered)


def signature(*packages: str) -> Note:
    """Where an answer came from: versions of these packages, of torch and Python, and the kind of CPU."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in (*packages, "torch")},
        "python": platform.python_version(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def provenance(answered: Note, command: str) -> Note:
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return {"date": today, "command": f"make oracles ({command})", **answered}


def keep_tensors(name: str, tensors: Tensors, note: Note) -> Path:
    """Keeps a golden with tensors; its note is in the file's metadata."""
    path = GOLDEN / f"{name}.safetensors"
    if path.is_file():
        kept, kept_note = read(path)
        same = kept.keys() == tensors.keys() and all(torch.equal(kept[key], tensors[key]) for key in kept)
        if same and _undated(kept_note) == _undated(note):
            return path
    write(path, tensors, note)
    return path


def keep_figures(name: str, figures: Note) -> Path:
    """Keeps a golden of numbers."""
    path = GOLDEN / f"{name}.json"
    if not path.is_file() or _undated(json.loads(path.read_text())) != _undated(figures):
        path.write_text(json.dumps(figures, indent=1) + "\n")
    return path


def _undated(note: Note) -> Note:
    return {**note, "provenance": {key: value for key, value in note["provenance"].items() if key != "date"}}

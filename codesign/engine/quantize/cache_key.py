"""The name of packed weights: a hash of everything that they depend on, the code that packs them included."""

import functools
import hashlib
import json
from pathlib import Path

import torch

from codesign.engine.caches import cache_folder
from codesign.engine.kernels.triton import available
from codesign.engine.prune.pruner import Pruner
from codesign.engine.quantize import cpu
from codesign.engine.quantize.cache import file_digest
from codesign.engine.quantize.calibration_text import calibration_digest
from codesign.engine.quantize.format import WeightFormat
from codesign.spec.model import ModelSpec


def weights_key(
    model: ModelSpec,
    files: list[Path],
    weight_format: WeightFormat,
    pruner: Pruner,
    *,
    dtype: torch.dtype,
    device: torch.device,
    is_calibrated: bool = False,
) -> str:
    """32 hex digits.

    Args:
        files: of a checkpoint; none for random weights.
        is_calibrated: whether the calibration text matters though neither method nor pruner look at it.
    """
    method = weight_format.method_member
    is_calibrated = is_calibrated or pruner.needs_inputs or (method is not None and method.needs_inputs)
    memo = cache_folder("digests")
    random = {"architecture": dict(model.architecture or {}), "seed": model.seed}
    facts = {
        "model": [file_digest(file, memo) for file in files] if files else random,
        "config": "" if model.path is None else file_digest(Path(model.path) / "config.json", memo),
        "format": repr(weight_format),
        "pruner": repr(pruner),
        "method": repr(method),
        "calibration": calibration_digest(model) if is_calibrated else "",
        "dtype": str(dtype),
        "layout": "cuda" if available.is_target(device) else cpu.capability(),
        "torch": torch.__version__,
        "code": _code_digest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _code_digest() -> str:
    """Of the sources that decide codes and their order: two versions of a method never share an entry."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("quantize/**/*.py"), *folder.glob("prune/**/*.py")]):
        digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return digest.hexdigest()

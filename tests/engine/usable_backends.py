"""Which attention backends run on the CPU that tests run on: those for CUDA only where kernels are interpreted."""

from typing import Any

import pytest
import torch

from codesign.registry import ATTENTION

_MISSING = {name: ATTENTION.create(name).missing(torch.device("cpu")) for name in ATTENTION.names()}
USABLE_BACKENDS = [name for name, missing in _MISSING.items() if missing is None]


def backend_or_skip(name: str) -> Any:
    """The parameter `name`, skipped with the reason where the backend cannot run."""
    missing = _MISSING[name]
    marks = () if missing is None else pytest.mark.skip(reason=f"{name}: {missing.reason}")
    return pytest.param(name, marks=marks)

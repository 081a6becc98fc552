"""Tiny models run faster on one thread than on two, and a test run beside other work should not ask for every core.

Every test draws the same numbers in every run: what one draw in a thousand breaks would fail by nobody's fault.
"""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    torch.manual_seed(0)

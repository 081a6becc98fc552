"""FixedStep: the step that has begun, in a form that later steps can share."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class FixedStep:
    """Attributes:
    facts: all that attention reads in this step, dataclasses and tuples of tensors and plain values: what differs from
        step to step stands in tensors.
    resume: makes these facts those of the step that goes on.
    """

    facts: Any
    resume: Callable[[], None]

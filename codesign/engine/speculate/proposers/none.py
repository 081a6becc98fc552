"""none: one output token per sequence and step."""

import dataclasses
from typing import ClassVar

from codesign.engine.speculate.proposer import Target


@dataclasses.dataclass(frozen=True)
class NoSpeculation:
    """The neutral member: nothing is drafted."""

    num_draft_tokens: ClassVar[int] = 0
    adaptive: ClassVar[bool] = False

    def start(self, target: Target) -> None:
        return None

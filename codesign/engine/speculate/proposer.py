"""What a speculator is: knobs (one file below `proposers/`), and while an engine runs the Proposer that they start.

    proposer = member.start(target);  proposer.allocate(num_slots)        at build
    drafts = proposer.propose([(sequence, 4), ...])                       at each step, for the sequences that decode

A proposer keeps nothing that matters: sequences own their tokens, so whatever it drafted for, and whoever has a slot
now, it looks at the sequence and goes on from there.
"""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Protocol

import torch

from codesign.engine.kernels.pieces import Pieces
from codesign.engine.models.assemble import PackClock
from codesign.engine.models.shape import ModelShape
from codesign.engine.quantize.linear import Workspace
from codesign.engine.sequence import Sequence
from codesign.engine.speculate.exact import Draft
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What is drafted for.

    Attributes:
        workspace, clock: the target's own, which a draft shares and adds to.
    """

    model: ModelSpec
    shape: ModelShape
    config: EngineConfig
    dtype: torch.dtype
    device: torch.device
    pieces: Pieces
    workspace: Workspace
    clock: PackClock


class Proposer(Protocol):
    @property
    def slot_bytes(self) -> int:
        """Bytes of cache that a slot costs beside the target's."""

    def allocate(self, num_slots: int) -> None:
        """Called once, before anything is proposed."""

    def propose(self, wanted: Items[tuple[Sequence, int]]) -> dict[str, Draft]:
        """Request id -> what may follow, for those that there is anything for.

        Args:
            wanted: (sequence, most tokens to draft for it, at least 1), by slot.
        """

    def release(self, request_id: str) -> None:
        """The request is done or was dropped."""

    def num_bytes(self) -> Mapping[str, int]:
        """Part -> bytes, beside those of the target."""

    def device_busy_us(self) -> int:
        """Microseconds that the device spent on drafts since the last call, by CUDA events; 0 on a CPU."""


class Speculator(Protocol):
    """A member of the family: a frozen dataclass of knobs."""

    @property
    def num_draft_tokens(self) -> int: ...

    @property
    def adaptive(self) -> bool: ...

    def start(self, target: Target) -> Proposer | None:
        """None where nothing is drafted.

        Raises:
            InputError, Unsupported: a draft that cannot be built, or does not go with the target.
        """


def check_num_draft_tokens(value: object) -> None:
    """Raises ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 64:
        raise ValueError(f"num_draft_tokens must be a whole number from 1 to 64, got {value!r}")


def check_adaptive(value: object) -> None:
    """Raises ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"adaptive must be true or false, got {value!r}")

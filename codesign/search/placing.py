"""Where the trials of a search run, from what stands on the command line.

    nothing                   in the search's own process, on the whole machine
    --workers N, --storage    N worker processes (1 with --storage alone), each with its own cores or GPUs
    --ray local|HOST:PORT     Ray tasks, each reserving whole GPUs or cores

On a processor, workers of one user and machine take turns with their timing windows, unless a search with several
measures when it begins that they do not disturb each other (`overlap.py`). Ray's workers, whose cores are not known
beforehand, and searches with one worker each always do. What overlaps is the rest of a trial: building, quantising,
judging quality. GPUs do not wait for each other.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from codesign.errors import InputError
from codesign.measure.trial import TrialRunner
from codesign.search.interrupt import Interrupt
from codesign.search.local_pool import LocalPool
from codesign.search.measurer import order_of
from codesign.search.overlap import measure
from codesign.search.pool import InlinePool, Pool
from codesign.search.ray_pool import RayPool, check_address
from codesign.search.seat import Seat, ordered_cores, seats_of
from codesign.spec.engine_config import EngineConfig
from codesign.spec.hardware import Hardware
from codesign.spec.profile import Profile

# One name for all studies: the machine is one, whatever is measured on it.
_TURN = "workers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placing:
    """Attributes:
    seats: of the worker processes; none when the search measures itself, or Ray finds a place.
    ray: address, or None.
    num_cores: that a trial has.
    """

    seats: Sequence[Seat]
    ray: str | None
    num_cores: int

    @classmethod
    def of(cls, workers: int | None, ray: str | None, *, is_shared: bool, hardware: Hardware) -> Self:
        """Raises InputError for what this machine cannot give, before anything is started."""
        most = hardware.cores or len(ordered_cores())
        if ray is not None:
            if workers is not None:
                raise InputError("makes no sense with --ray, which finds the places itself", key="--workers")
            check_address(ray)
            return cls(seats=(), ray=ray, num_cores=most)
        if workers is None and not is_shared:
            return cls(seats=(), ray=None, num_cores=min(most, len(ordered_cores())))
        seats = seats_of(hardware, workers or 1)
        return cls(seats=seats, ray=None, num_cores=len(seats[0].cores))

    @property
    def described(self) -> str:
        if self.ray is not None:
            return f"; trials run on Ray ({self.ray})"
        places = "; ".join(str(seat) for seat in self.seats)
        return f"; {len(self.seats)} workers ({places})" if len(self.seats) > 1 else ""

    def world(self, here: Mapping[str, Any]) -> dict[str, Any]:
        """What trials will be measured on, given what this process says of itself."""
        return {**here, "placement": {**here["placement"], "cores": self.num_cores}}

    def pool(
        self,
        profile: Profile,
        baseline: EngineConfig,
        interrupt: Interrupt,
        stack: contextlib.ExitStack,
        say: Callable[[str], None],
    ) -> Pool:
        """The pool, to be closed by `stack`; says whether timing windows overlap, and why."""
        if self.ray is None and not self.seats:
            runner = stack.enter_context(TrialRunner(profile, baseline=baseline))
            return InlinePool(
                lambda identity, config, on_phase: runner.measure(identity, config, on_phase=on_phase), interrupt
            )
        turn = _TURN if profile.device == "cpu" else None
        if self.ray is None:
            overlap = measure(self.seats) if turn is not None and len(self.seats) > 1 else None
            if overlap is not None:
                say(overlap.described)
            return stack.enter_context(LocalPool(order_of(profile, baseline, turn=turn, overlap=overlap), self.seats))
        cores = self.num_cores if profile.device == "cpu" else None
        order = order_of(profile, baseline, turn=turn, cores=cores)
        num_gpus = profile.hardware.count if profile.device == "cuda" else 0
        return stack.enter_context(RayPool(order, address=self.ray, num_cores=self.num_cores, num_gpus=num_gpus))
